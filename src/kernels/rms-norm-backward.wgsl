// dx = r·(g − x·r²·mean(g∘x)),  g = dy∘(o + w)        gradient of rms-norm.wgsl with respect to x
//   x, dy, dx [M,H]   w [H]   r [M]     f32; n lanes to a row
//
// A workgroup owns a row: its threads stride along it and are added up by halves, so the order is fixed.

const WG: u32 = 64u;

struct Dims { M: u32, n: u32, H: u32, o: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read> w: array<Lane>;
@group(0) @binding(3) var<storage, read> r: array<f32>;
@group(0) @binding(4) var<storage, read> dy: array<Lane>;
@group(0) @binding(5) var<storage, read_write> dx: array<Lane>;

alias Lane = f32;  // parts/norm-four.wgsl

fn within(lane: Lane) -> f32 { return lane; }

fn finish(at: u32, gradient: Lane) -> Lane { return gradient; }  // parts/add-gradient.wgsl

var<workgroup> sums: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= d.M) { return; }
  let start = row * d.n;
  var along = Lane();
  for (var h = thread; h < d.n; h += WG) { along += dy[start + h] * (d.o + w[h]) * x[start + h]; }
  sums[thread] = within(along);
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) { sums[thread] += sums[thread + half]; }
  }
  workgroupBarrier();
  let scale = r[row];
  let back = sums[0] * scale * scale / f32(d.H);
  for (var h = thread; h < d.n; h += WG) {
    dx[start + h] = finish(start + h, (dy[start + h] * (d.o + w[h]) - x[start + h] * back) * scale);
  }
}
