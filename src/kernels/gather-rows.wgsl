// y[n] = x[ids[n]], or zeros where the id is negative        rows by index, and back: with the inverse index it is its own gradient
//   x [M,H]   ids [N]   y [N,H]     f32, ids i32; a thread owns one lane of y

override WG: u32 = 64;

struct Dims { n: u32, lanes: u32, M: u32 }  // n = N·lanes
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read> ids: array<i32>;
@group(0) @binding(3) var<storage, read_write> y: array<Lane>;

alias Lane = f32;  // parts/four-lanes.wgsl, parts/sixteen-lanes.wgsl

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let row = ids[at / d.lanes];
  var value = Lane();
  if (row >= 0) { value = x[min(u32(row), d.M - 1u) * d.lanes + at % d.lanes]; }
  y[at] = value;
}
