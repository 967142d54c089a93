// reduce-rows.wgsl, four elements to a lane

alias Lane = vec4f;

fn within(lane: Lane) -> f32 { return combine(combine(lane.x, lane.y), combine(lane.z, lane.w)); }
