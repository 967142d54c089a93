// w in bfloat16, the upper halves of f32s, two to a word, the first in the low half

alias Stored = vec2u;

fn widen(at: u32) -> vec4f {
  let words = w[at];
  return bitcast<vec4f>(vec4u(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
}
