// What a piece of the vocabulary adds to the loss of each row        m = max x,  s = Σ exp(x − m),  t = x[label],  a = Σ x, merged piece by piece
//   x [M,V], logits of the words from `first` on   labels [M]   sums [M,4] = (m, s, t, a)   loss [M] = c·(log s + m − t) after the last
//   With SMOOTH, label smoothing e, the target is e/words for each word and 1 − e more for the label: c·(log s + m − t + e·(t − a/words)); else a is 0.
//   f32, labels i32; x in lanes of one element, or four by parts/piece-four.wgsl. Rows with a label below 0 take no part.
//
// A workgroup owns a row: its threads stride along it and are merged by halves, so the order is fixed. After the last piece sums[1] is log s.

const WG: u32 = 64u;
override SMOOTH: u32 = 0;

struct Dims { M: u32, lanes: u32, V: u32, first: u32, is_first: u32, is_last: u32, c: f32, e: f32, words: f32 }  // words of all pieces
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read> labels: array<i32>;
@group(0) @binding(3) var<storage, read_write> sums: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;

alias Lane = f32;

var<workgroup> shared_values: array<f32, WG>;

fn largest_of(lane: Lane) -> f32 { return lane; }

fn sum_of(lane: Lane) -> f32 { return lane; }

fn element(row: u32, j: u32) -> f32 { return x[row * d.lanes + j]; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= d.M) { return; }
  let label = labels[row];
  let begin = row * d.lanes;
  let end = select(0u, d.lanes, label >= 0);
  var high = Lane() - 3e38;
  for (var j = thread; j < end; j += WG) { high = max(high, x[begin + j]); }
  shared_values[thread] = largest_of(high);
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) { shared_values[thread] = max(shared_values[thread], shared_values[thread + half]); }
  }
  workgroupBarrier();
  let m = shared_values[0];
  workgroupBarrier();
  var acc = Lane();
  for (var j = thread; j < end; j += WG) { acc += exp(x[begin + j] - m); }
  shared_values[thread] = sum_of(acc);
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) { shared_values[thread] += shared_values[thread + half]; }
  }
  var s = 0.0;
  if (thread == 0u) { s = shared_values[0]; }
  if (SMOOTH == 1u) {
    workgroupBarrier();
    var total = Lane();
    for (var j = thread; j < end; j += WG) { total += x[begin + j]; }
    shared_values[thread] = sum_of(total);
    for (var half = WG / 2u; half > 0u; half /= 2u) {
      workgroupBarrier();
      if (thread < half) { shared_values[thread] += shared_values[thread + half]; }
    }
  }
  if (thread == 0u) {
    if (label < 0) {
      sums[row] = vec4f();
      loss[row] = 0.0;
    } else {
      var all = vec4f(m, s, 0.0, 0.0);
      if (SMOOTH == 1u) { all.w = shared_values[0]; }
      if (d.is_first == 0u) {
        let before = sums[row];
        let top = max(before.x, m);
        all = vec4f(top, before.y * exp(before.x - top) + all.y * exp(m - top), before.z, before.w + all.w);
      }
      let word = u32(label) - d.first;
      if (u32(label) >= d.first && word < d.V) { all.z = element(row, word); }
      if (d.is_last == 1u) {
        all.y = log(all.y);
        loss[row] = d.c * (all.y + (all.x - all.z));
        if (SMOOTH == 1u) { loss[row] = d.c * (all.y + (all.x - all.z) + d.e * (all.z - all.w / d.words)); }
      }
      sums[row] = all;
    }
  }
}
