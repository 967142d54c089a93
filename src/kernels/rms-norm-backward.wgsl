// dx = r·(g − x·r²·mean(g∘x)),  g = dy∘w        gradient of rms-norm.wgsl with respect to x
//   x, dy, dx [M,H]   w [H]   r [M]     f32; a thread owns a row

override WG: u32 = 64;

struct Dims { M: u32, H: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read> r: array<f32>;
@group(0) @binding(4) var<storage, read> dy: array<f32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  let first = i * d.H;
  var along = 0.0;
  for (var h = 0u; h < d.H; h++) { along += dy[first + h] * w[h] * x[first + h]; }
  let back = along * r[i] * r[i] / f32(d.H);
  for (var h = 0u; h < d.H; h++) { dx[first + h] = r[i] * (dy[first + h] * w[h] - x[first + h] * back); }
}
