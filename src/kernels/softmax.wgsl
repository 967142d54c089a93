// y = exp(x − max x) / Σ exp(x − max x)        over each row; subtracting the maximum keeps exp from overflowing
//   x, y [M,N]   f32; a thread owns a row

override WG: u32 = 64;

struct Dims { M: u32, N: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  let first = i * d.N;
  var largest = x[first];
  for (var j = 1u; j < d.N; j++) { largest = max(largest, x[first + j]); }
  var sum = 0.0;
  for (var j = 0u; j < d.N; j++) {
    let e = exp(x[first + j] - largest);
    y[first + j] = e;
    sum += e;
  }
  for (var j = 0u; j < d.N; j++) { y[first + j] /= sum; }
}
