// x ← c·tanh(x/c)        in place; soft-capped logits: arXiv:2408.00118 §2
//   x [n]   f32

override WG: u32 = 64;

struct Dims { n: u32, c: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  let e = exp(-2.0 * abs(x[i] / d.c));
  x[i] = d.c * sign(x[i]) * (1.0 - e) / (1.0 + e);
}
