// cross-entropy-piece.wgsl, four elements to a lane

alias Lane = vec4f;

fn largest_of(lane: Lane) -> f32 { return max(max(lane.x, lane.y), max(lane.z, lane.w)); }

fn sum_of(lane: Lane) -> f32 { return (lane.x + lane.y) + (lane.z + lane.w); }

fn element(row: u32, j: u32) -> f32 { return x[row * d.lanes + j / 4u][j % 4u]; }
