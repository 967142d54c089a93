// dx = y ∘ (dy − Σ dy∘y)        over each row; y = softmax(x)
//   y, dy, dx [M,N]   f32; a thread owns a row

override WG: u32 = 64;

struct Dims { M: u32, N: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> y: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  let first = i * d.N;
  var dot = 0.0;
  for (var j = 0u; j < d.N; j++) { dot += dy[first + j] * y[first + j]; }
  for (var j = 0u; j < d.N; j++) { dx[first + j] = y[first + j] * (dy[first + j] - dot); }
}
