// y = x        16-bit floats, two to a word (the first in its low half), to f32; exact
//   x [⌈n/2⌉] words   y [n] f32
//
// Bits in, bits out: a GPU may flush subnormal floats to zero and lose NaN payloads, integers pass untouched.

override WG: u32 = 64;
override BF16: u32 = 0;

struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<u32>;

// IEEE 754: binary16 has 5 bits of exponent with a bias of 15, and 10 of fraction; binary32 8 with 127, and 23.
fn from_f16(h: u32) -> u32 {
  let sign = (h & 0x8000u) << 16u;
  let exponent = (h >> 10u) & 31u;
  let fraction = h & 0x3ffu;
  if (exponent == 31u) { return sign | 0x7f800000u | (fraction << 13u); }
  if (exponent == 0u) { return sign | bitcast<u32>(f32(fraction) * 5.9604644775390625e-8); }  // fraction · 2⁻²⁴
  return sign | ((exponent + 112u) << 23u) | (fraction << 13u);
}

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  let h = (x[i / 2u] >> (16u * (i % 2u))) & 0xffffu;
  if (BF16 == 1u) { y[i] = h << 16u; } else { y[i] = from_f16(h); }
}
