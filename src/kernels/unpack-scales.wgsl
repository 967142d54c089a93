// y[n] = the scale of the n-th block of a packed matrix, as f32        y [n]; a thread owns one
//
// As it stands the scales are f32 already; parts/double-quant.wgsl makes them of codes.

override WG: u32 = 64;

struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> scales: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

fn scale_of(n: u32) -> f32 { return scales[n]; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.n) { y[i] = scale_of(i); }
}
