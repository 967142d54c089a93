// y = w        a matrix kept in fewer than 32 bits per element, as f32
//   w, y [4·n]   row-major, f32; a thread owns four elements
//
// As it stands w is f32 too. Parts/weight-*.wgsl bring `Stored` and `widen` for every other format, the ones the products use.

override WG: u32 = 64;

struct Dims {
  n: u32,
  group_bits: u32,  // 2^group_bits elements of w share a scale: parts/weight-*.wgsl
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> w: array<Stored>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4f>;

alias Stored = vec4f;

fn widen(at: u32) -> vec4f { return w[at]; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.n) { y[i] = widen(i); }
}
