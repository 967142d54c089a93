// y = n∘w + b,  n = (x − mean(x))·r,  r = 1 / √(var(x) + eps)        LayerNorm: arXiv:1607.06450
//   x, y [M,H]   w, b [H]   stats [M,2] = (mean, r), kept for backward     f32; a thread owns a row

override WG: u32 = 64;

struct Dims { M: u32, H: u32, eps: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(5) var<storage, read_write> stats: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  let first = i * d.H;
  var sum = 0.0;
  for (var h = 0u; h < d.H; h++) { sum += x[first + h]; }
  let mean = sum / f32(d.H);
  var squares = 0.0;  // of the differences: E[x²] − E[x]² would cancel
  for (var h = 0u; h < d.H; h++) { squares += (x[first + h] - mean) * (x[first + h] - mean); }
  let r = 1.0 / sqrt(squares / f32(d.H) + d.eps);
  stats[2u * i] = mean;
  stats[2u * i + 1u] = r;
  for (var h = 0u; h < d.H; h++) { y[first + h] = (x[first + h] - mean) * r * w[h] + b[h]; }
}
