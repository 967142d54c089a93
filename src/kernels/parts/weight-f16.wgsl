// w in IEEE binary16, two to a word, the first in the low half

alias Stored = vec2u;

fn widen(at: u32) -> vec4f {
  let words = w[at];
  return vec4f(unpack2x16float(words.x), unpack2x16float(words.y));
}
