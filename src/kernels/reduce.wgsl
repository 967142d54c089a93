// y[o,c,i] = s · Σ x[o,k,i] over the k ≡ c (mod C), or their maximum        one axis of [outer, axis, inner]
//   x [outer,axis,inner]   y [outer,C,inner]   f32; 1 ≤ C ≤ axis
//
// A thread owns one element of y and walks its k upwards, so the order is fixed. C = 1 reduces the axis; a larger C makes C
// partial results of it, side by side, for a second pass.

override WG: u32 = 64;
override MAX: u32 = 0;

struct Dims { n: u32, axis: u32, inner: u32, C: u32, s: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let row = at / d.inner;
  let first = row / d.C * d.axis * d.inner + at % d.inner;
  let c = row % d.C;
  var acc = x[first + c * d.inner];
  for (var k = c + d.C; k < d.axis; k += d.C) {
    let value = x[first + k * d.inner];
    acc = select(acc + value, max(acc, value), MAX == 1u);
  }
  y[at] = d.s * acc;
}
