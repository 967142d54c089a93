// y[n] = w[ids[n] − first] where first ≤ ids[n] ≤ last        rows of a table, or of a piece of it: the other rows of y keep their content
//   w [V,H]   ids [N]   y [N,H]     f32, ids i32; a thread owns one element of y

override WG: u32 = 64;

struct Dims { n: u32, H: u32, V: u32, first: u32, last: u32 }  // n = N·H
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> w: array<f32>;
@group(0) @binding(2) var<storage, read> ids: array<i32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let word = u32(ids[at / d.H]);
  if (word < d.first || word > d.last) { return; }
  y[at] = w[min(word - d.first, d.V - 1u) * d.H + at % d.H];
}
