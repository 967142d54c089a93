// y = x·r·w,  r = 1 / √(mean(x²) + eps)        RMSNorm: arXiv:1910.07467, eq. 4
//   x, y [M,H]   w [H]   r [M], kept for backward     f32; a thread owns a row

override WG: u32 = 64;

struct Dims { M: u32, H: u32, eps: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read_write> r: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  let first = i * d.H;
  var squares = 0.0;
  for (var h = 0u; h < d.H; h++) { squares += x[first + h] * x[first + h]; }
  let scale = 1.0 / sqrt(squares / f32(d.H) + d.eps);
  r[i] = scale;
  for (var h = 0u; h < d.H; h++) { y[first + h] = x[first + h] * scale * w[h]; }
}
