// Keys and values in IEEE binary16, two to a word, the first in its low half. `to_f16` and `round_off`: narrow16.wgsl

alias Cached = vec2u;

fn widened(stored: Cached) -> vec4f {
  return vec4f(unpack2x16float(stored.x), unpack2x16float(stored.y));
}

fn narrow(value: vec4f) -> Cached {
  let bits = bitcast<vec4u>(value);
  return vec2u(to_f16(bits.x) | (to_f16(bits.y) << 16u), to_f16(bits.z) | (to_f16(bits.w) << 16u));
}
