// clip = [norm, factor]        norm = s·√total, factor = s·min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ of s·g
//   total [1]   clip [2]   f32; max_norm = 0 asks for no clipping: factor = s
//
// A total that overflowed gives factor 0, a NaN stays NaN. Told by bits: WGSL lets a compiler assume there are neither.

struct Dims { max_norm: f32, s: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> total: array<u32>;
@group(0) @binding(2) var<storage, read_write> clip: array<u32>;

@compute @workgroup_size(1)
fn main() {
  let bits = total[0];
  if (bits >= 0x7f800000u) {  // infinity or NaN: the total passes for the norm
    clip[0] = bits;
    clip[1] = select(select(bits, 0u, bits == 0x7f800000u), bitcast<u32>(d.s), d.max_norm == 0.0);
    return;
  }
  let norm = d.s * sqrt(bitcast<f32>(bits));
  clip[0] = bitcast<u32>(norm);
  clip[1] = bitcast<u32>(d.s * select(min(1.0, d.max_norm / (norm + 1e-6)), 1.0, d.max_norm == 0.0));
}
