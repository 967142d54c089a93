// y[o,c] = s · Σ x[o,k] over the c-th of C stretches of k, or their maximum        the last axis of [outer, axis]
//   x [outer,axis], in lanes of one element, or four by parts/reduce-four.wgsl   y [outer,C]   f32; 1 ≤ C ≤ axis, axis counts lanes
//
// The twin of reduce.wgsl for elements that lie side by side: a workgroup owns one element of y, its threads stride along the
// stretch and are added up by halves, so the order is fixed. C = 1 reduces the axis; a larger C leaves work for a second pass.

const WG: u32 = 64u;
override MAX: u32 = 0;

struct Dims { n: u32, axis: u32, C: u32, s: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

alias Lane = f32;

var<workgroup> accs: array<f32, WG>;

fn combine(a: f32, b: f32) -> f32 { return select(a + b, max(a, b), MAX == 1u); }

fn within(lane: Lane) -> f32 { return lane; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let at = group.x + group.y * groups.x;
  if (at >= d.n) { return; }
  let row = at / d.C * d.axis;
  let stretch = (d.axis + d.C - 1u) / d.C;
  let start = min(at % d.C * stretch, d.axis);
  let end = min(start + stretch, d.axis);
  var acc = Lane();
  if (MAX == 1u) { acc = x[row + min(start, d.axis - 1u)]; }
  for (var k = start + thread; k < end; k += WG) {
    if (MAX == 1u) { acc = max(acc, x[row + k]); } else { acc += x[row + k]; }
  }
  accs[thread] = within(acc);
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) { accs[thread] = combine(accs[thread], accs[thread + half]); }
  }
  if (thread == 0u) { y[at] = d.s * accs[0]; }
}
