// y ← y + x        elementwise, in place: gradients of several batches
//   x, y [n]   f32

override WG: u32 = 64;

struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read_write> y: array<Lane>;

alias Lane = f32;  // parts/four-lanes.wgsl, parts/sixteen-lanes.wgsl

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.n) { y[i] += x[i]; }
}
