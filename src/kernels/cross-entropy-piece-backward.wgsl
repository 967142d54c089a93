// x ← c·(exp(x − m − l) − own·[word = label] − rest)·cap′        in place: the logits of a piece become their gradients; zeros in rows with a label below 0
//   x [M,V], of the words from `first` on   labels [M]   sums [M,4] = (m, l, …) of cross-entropy-piece.wgsl after the last piece
//   f32, labels i32; a thread owns one element. With label smoothing e: own = 1 − e, rest = e/words; else 1 and 0

override WG: u32 = 64;
override CAP: u32 = 0;  // x are logits that were capped: cap′ = 1 − (x/cap)², else 1

struct Dims { n: u32, V: u32, first: u32, c: f32, cap: f32, own: f32, rest: f32 }  // n = M·V
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> labels: array<i32>;
@group(0) @binding(2) var<storage, read> sums: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> x: array<Lane>;

alias Lane = f32;

const LANE: u32 = 1u;

fn one_hot(word: u32, label: u32) -> Lane { return select(0.0, 1.0, word == label); }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let row = at / d.V;
  let label = labels[row];
  var gradient = Lane();
  if (label >= 0) {
    let word = at % d.V * LANE + d.first;
    gradient = d.c * (exp(x[at] - sums[row].x - sums[row].y) - d.own * one_hot(word, u32(label)) - d.rest);
    if (CAP == 1u) { gradient *= 1.0 - x[at] * x[at] / (d.cap * d.cap); }
  }
  x[at] = gradient;
}
