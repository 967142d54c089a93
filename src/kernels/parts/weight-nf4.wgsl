// w = NF4[code] · scale        4-bit NormalFloat: Dettmers et al., arXiv:2305.14314, appendix E; levels as bitsandbytes has them
//   codes of 4 bits, two to a byte, the first in the high half, bytes in order of their addresses; a scale for each 2^group_bits

alias Stored = u32;

@group(0) @binding(6) var<storage, read> scales: array<f32>;

const NF4 = array<f32, 16>(
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0);

fn scale_of(n: u32) -> f32 { return scales[n]; }

fn level(code: u32) -> f32 { return NF4[code]; }

fn widen(at: u32) -> vec4f {
  let word = w[at / 2u] >> (16u * (at % 2u));
  let code = (vec4u(word) >> vec4u(4u, 0u, 12u, 8u)) & vec4u(15u);
  return scale_of(at >> (d.group_bits - 2u)) * vec4f(level(code.x), level(code.y), level(code.z), level(code.w));
}
