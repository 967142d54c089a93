// dx = r·(g − mean(g) − n·mean(g∘n)),  g = dy∘w,  n = (x − mean)·r        gradient of layer-norm.wgsl with respect to x
//   x, dy, dx [M,H]   w [H]   stats [M,2] = (mean, r)     f32; a thread owns a row

override WG: u32 = 64;

struct Dims { M: u32, H: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read> stats: array<f32>;
@group(0) @binding(4) var<storage, read> dy: array<f32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  let first = i * d.H;
  let mean = stats[2u * i];
  let r = stats[2u * i + 1u];
  var sum = 0.0;
  var along = 0.0;
  for (var h = 0u; h < d.H; h++) {
    let g = dy[first + h] * w[h];
    sum += g;
    along += g * (x[first + h] - mean) * r;
  }
  sum /= f32(d.H);
  along /= f32(d.H);
  for (var h = 0u; h < d.H; h++) {
    dx[first + h] = r * (dy[first + h] * w[h] - sum - (x[first + h] - mean) * r * along);
  }
}
