// dropout.wgsl, four elements to a lane: all four words of a counter at once

alias Lane = vec4f;

fn dropped(at: u32, value: Lane) -> Lane { return select(Lane(), d.s * value, bits(at) >= vec4u(d.threshold)); }
