// dropout.wgsl: y = x + s·u in place of a mask, u uniform in [−1, 1) of the upper 24 bits of each word; four elements to a lane

alias Lane = vec4f;

fn dropped(at: u32, value: Lane) -> Lane { return value + d.s * (vec4f(bits(at) >> vec4u(8u)) * 0x1p-23 - 1.0); }
