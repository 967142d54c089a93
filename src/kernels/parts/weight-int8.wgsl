// w = code · scale        codes in i8, four to a word, the first in the lowest byte; a scale for each 2^group_bits

alias Stored = u32;

@group(0) @binding(6) var<storage, read> scales: array<f32>;

fn widen(at: u32) -> vec4f { return scales[at >> (d.group_bits - 2u)] * vec4f(unpack4xI8(w[at])); }
