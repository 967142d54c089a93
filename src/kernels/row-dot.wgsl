// y[i] = Σⱼ a[i,j]·b[i,j]        the dot product of each row: attention's delta
//   a, b [M,N]   y [M]     f32; a thread owns a row

override WG: u32 = 64;

struct Dims { M: u32, N: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  var sum = 0.0;
  for (var j = i * d.N; j < (i + 1u) * d.N; j++) { sum += a[j] * b[j]; }
  y[i] = sum;
}
