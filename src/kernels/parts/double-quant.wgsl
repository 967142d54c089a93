// scale = map[code]·outer + offset        NF4's scales quantised once more, in 256s: arXiv:2305.14314, §3
//   words: the map's 256 values, the offset, then for each 256 blocks their outer scale and 64 words of four codes

@group(0) @binding(6) var<storage, read> scales: array<u32>;

fn scale_of(n: u32) -> f32 {
  let outer = 257u + n / 256u * 65u;
  let code = (scales[outer + 1u + n % 256u / 4u] >> (8u * (n % 4u))) & 255u;
  return bitcast<f32>(scales[code]) * bitcast<f32>(scales[outer]) + bitcast<f32>(scales[256]);
}
