// o = softmax(s·q·kᵀ + causal mask)·v        arXiv:1706.03762, eq. 1, by the online softmax of arXiv:1805.02867
//   q, o [B,T,H,D]   k, v [B,S,G,D], of which the first L keys count   lse [B,T,H] = log Σ exp, kept for backward
//
// Query head h uses key head h / (H/G). Query t is at position L − T + t and sees the keys up to there. A thread owns one
// query row: it keeps q and o in registers and passes over the keys once, so no T×T tensor exists.

const D: u32 = 8u;
const D4: u32 = D / 4u;
override WG: u32 = 32;

struct Dims { n: u32, T: u32, S: u32, L: u32, H: u32, G: u32, s: f32 }  // n = B·T·H rows
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> o: array<vec4f>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let row = id.x + id.y * groups.x * WG;
  if (row >= d.n) { return; }
  let h = row % d.H;
  let t = row / d.H % d.T;
  let b = row / (d.H * d.T);
  let g = h / (d.H / d.G);
  var query: array<vec4f, D4>;
  var mixed: array<vec4f, D4>;
  for (var i = 0u; i < D4; i++) { query[i] = d.s * q[row * D4 + i]; }
  var largest = -3e38;
  var sum = 0.0;
  for (var j = 0u; j <= d.L - d.T + t; j++) {
    let at = ((b * d.S + j) * d.G + g) * D4;
    var score = 0.0;
    for (var i = 0u; i < D4; i++) { score += dot(query[i], k[at + i]); }
    let higher = max(largest, score);
    let shrink = exp(largest - higher);
    let p = exp(score - higher);
    largest = higher;
    sum = sum * shrink + p;
    for (var i = 0u; i < D4; i++) { mixed[i] = mixed[i] * shrink + p * v[at + i]; }
  }
  for (var i = 0u; i < D4; i++) { o[row * D4 + i] = mixed[i] / sum; }
  lse[row] = largest + log(sum);
}
