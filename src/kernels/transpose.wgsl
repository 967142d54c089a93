// y[j,i] = x[i,j]        a matrix the other way around
//   x [M,N] → y [N,M]     f32; a thread writes one element

override WG: u32 = 64;

struct Dims { n: u32, M: u32, N: u32 }  // n = M·N
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at < d.n) { y[at] = x[at % d.M * d.N + at / d.M]; }
}
