// y = x        f32 to 16-bit floats, two to a word (the first in its low half), rounded to nearest, ties to even
//   x [n] f32   y [⌈n/2⌉] words; the high half of an odd last word is 0
//
// By bits, because WGSL leaves the rounding of pack2x16float open. To round off the low s bits of a pattern, add half a unit
// less one, and one more if the bit above is odd: what overflows carries into the exponent, as it should.

override WG: u32 = 64;
override BF16: u32 = 0;

struct Dims { n: u32, words: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<u32>;

fn round_off(bits: u32, s: u32) -> u32 { return (bits + (1u << (s - 1u)) - 1u + ((bits >> s) & 1u)) >> s; }

fn to_bf16(bits: u32) -> u32 {
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return (bits >> 16u) | 0x40u; }  // NaN stays NaN
  return round_off(bits, 16u);
}

fn to_f16(bits: u32) -> u32 {
  let sign = (bits >> 16u) & 0x8000u;
  let size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) { return sign | 0x7e00u | ((size >> 13u) & 0x3ffu); }  // NaN
  if (size >= 0x477ff000u) { return sign | 0x7c00u; }  // from 65520 on: infinity
  if (size >= 0x38800000u) { return sign | round_off(size - 0x38000000u, 13u); }  // from 2⁻¹⁴ on: normal
  if (size <= 0x33000000u) { return sign; }  // up to half the smallest subnormal: zero
  return sign | round_off((size & 0x7fffffu) | 0x800000u, 126u - (size >> 23u));  // in units of 2⁻²⁴
}

fn half_at(i: u32) -> u32 {
  if (i >= d.n) { return 0u; }
  if (BF16 == 1u) { return to_bf16(x[i]); }
  return to_f16(x[i]);
}

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.words) { y[i] = half_at(2u * i) | (half_at(2u * i + 1u) << 16u); }
}
