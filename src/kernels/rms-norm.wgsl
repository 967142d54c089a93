// y = x·r·(o + w),  r = 1 / √(mean(x²) + eps)        RMSNorm: arXiv:1910.07467, eq. 4; o = 1 in Gemma, else 0
//   x, y [M,H]   w [H]   r [M], kept for backward     f32; n lanes to a row
//
// A workgroup owns a row: its threads stride along it and are added up by halves, so the order is fixed.

const WG: u32 = 64u;

struct Dims { M: u32, n: u32, H: u32, eps: f32, o: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read> w: array<Lane>;
@group(0) @binding(3) var<storage, read_write> y: array<Lane>;
@group(0) @binding(4) var<storage, read_write> r: array<f32>;

alias Lane = f32;  // parts/norm-four.wgsl

fn within(lane: Lane) -> f32 { return lane; }

fn take(at: u32) -> Lane { return x[at]; }  // parts/add-norm.wgsl

fn again(at: u32) -> Lane { return x[at]; }

var<workgroup> sums: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= d.M) { return; }
  let start = row * d.n;
  var squares = Lane();
  for (var h = thread; h < d.n; h += WG) {
    let value = take(start + h);
    squares += value * value;
  }
  sums[thread] = within(squares);
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) { sums[thread] += sums[thread + half]; }
  }
  workgroupBarrier();
  let scale = 1.0 / sqrt(sums[0] / f32(d.H) + d.eps);
  if (thread == 0u) { r[row] = scale; }
  for (var h = thread; h < d.n; h += WG) { y[start + h] = again(start + h) * scale * (d.o + w[h]); }
}
