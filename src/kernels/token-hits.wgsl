// hits[i] = 1 where the label of row i is the argmax of its logits, the first of ties, else 0        piece by piece of the vocabulary, each after the first a factor
//   x [M,V], logits of the words from `first` on   labels [M]   sums [M,4] = (m, l, x[label], …) of cross-entropy-piece.wgsl after the last piece   hits [M]
//   f32, labels i32. A workgroup owns a row; one with a label below 0 is no hit

const WG: u32 = 64u;

struct Dims { M: u32, V: u32, first: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> labels: array<i32>;
@group(0) @binding(3) var<storage, read> sums: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> hits: array<f32>;

var<workgroup> shared_hits: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= d.M) { return; }
  let label = labels[row];
  let own = sums[row].z;
  var hit = select(0.0, 1.0, label >= 0);
  for (var j = thread; j < select(0u, d.V, label >= 0); j += WG) {
    let other = x[row * d.V + j];
    let is_behind = other < own || (other == own && i32(d.first + j) >= label);
    if (!is_behind) { hit = 0.0; }
  }
  shared_hits[thread] = hit;
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) { shared_hits[thread] = min(shared_hits[thread], shared_hits[thread + half]); }
  }
  if (thread == 0u) {
    var before = 1.0;
    if (d.first > 0u) { before = hits[row]; }
    hits[row] = before * shared_hits[0];
  }
}
