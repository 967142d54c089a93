// gated.wgsl and its backward pass, four elements to a lane

alias Lane = vec4f;

fn each(v: Lane) -> Lane { return Lane(activate(v.x), activate(v.y), activate(v.z), activate(v.w)); }
