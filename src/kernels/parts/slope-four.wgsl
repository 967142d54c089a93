// gated-backward.wgsl, four elements to a lane: with gated-four.wgsl

fn slope(v: Lane) -> Lane { return Lane(derivative(v.x), derivative(v.y), derivative(v.z), derivative(v.w)); }
