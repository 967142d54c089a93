// rms-norm.wgsl and its backward pass, four elements to a lane

alias Lane = vec4f;

fn within(lane: Lane) -> f32 { return (lane.x + lane.y) + (lane.z + lane.w); }
