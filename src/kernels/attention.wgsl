// o = softmax(s·q·kᵀ where seen)·v        arXiv:1706.03762, eq. 1, by the online softmax of arXiv:1805.02867 in tiles (2205.14135)
//   q, o [B,T,H,D]   k, v [B,S,G,D], of which the first L keys count   lse [B,T,H] = log Σ exp, kept for backward
//   starts [B,T], if SEGMENTED: the first key that a query may see, not decreasing along T; [B] if BOTH_WAYS: how many keys a row has
//
// Query head h uses key head h / (H/G). Query t is at position p = L − T + t and sees keys max(starts, p + 1 − window) … p. With CAP
// a score x becomes c·tanh(x/c). A thread owns R queries of one head and takes 4·Q keys at a time; o is added up in place, so that
// the text is the same for every D and no T×T tensor exists. parts/attention-team.wgsl puts WX·WY threads to a tile of R·WY queries.

const R: u32 = 4u;
const Q: u32 = 2u;
const WX: u32 = 1u;
const WY: u32 = 1u;
const WG: u32 = 32u;
const TILE: u32 = WX * WY * R * Q;
override BOUNDED: u32 = 0;    // a window or starts: not all keys from 0 on
override SEGMENTED: u32 = 0;
override BOTH_WAYS: u32 = 0;  // every query sees the first starts[b] keys
override CAP: u32 = 0;
const HIDDEN: f32 = -3e38;    // a score; e to the power of it less any largest is 0

struct Dims { n: u32, first: u32, T: u32, S: u32, L: u32, H: u32, G: u32, D: u32, window: u32, s: f32, c: f32 }  // tiles first … n of all heads
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> starts: array<i32>;
@group(0) @binding(5) var<storage, read_write> o: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;

fn unit_of(group: u32, thread: u32) -> u32 { return group * WG + thread; }  // parts/attention-team.wgsl

fn meet() {}

fn share(at: u32, value: vec4f) {}

fn shared_at(at: u32, own: vec4f) -> vec4f { return own; }

fn four_of(own: vec4u, base: u32, step: u32, index: u32, last: u32) -> vec4u { return own; }

fn share_row(at: u32, value: f32) {}

fn row_at(at: u32, own: f32) -> f32 { return own; }

fn end_key(b: u32, t: u32) -> u32 {
  if (BOTH_WAYS == 1u) { return u32(starts[b]); }
  return d.L - d.T + t + 1u;
}

fn first_key(b: u32, t: u32) -> u32 {
  if (BOTH_WAYS == 1u) { return 0u; }
  let end = end_key(b, t);
  var start = end - min(end, d.window);
  if (SEGMENTED == 1u) { start = max(start, u32(starts[b * d.T + t])); }
  return start;
}

fn capped(score: vec4f) -> vec4f {
  if (CAP == 0u) { return score; }
  let e = exp(-2.0 * abs(score / d.c));
  return d.c * sign(score) * (1.0 - e) / (1.0 + e);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let unit = d.first + unit_of(group.x + group.y * groups.x, thread);
  if (unit >= d.n) { return; }
  let x = thread % WX;
  let y = thread / WX % WY;
  let tiles = (d.T + R * WY - 1u) / (R * WY);
  let h = unit % d.H;
  let b = unit / (d.H * tiles);
  let t0 = (tiles - 1u - unit / d.H % tiles) * R * WY;  // those with most keys go first
  let t = t0 + y * R;
  let D4 = d.D / 4u;
  let end = end_key(b, min(t0 + R * WY, d.T) - 1u);
  let step = d.G * D4;
  let keys = b * d.S * step + h / (d.H / d.G) * D4;
  var row: array<u32, R>;
  var first: array<u32, R>;
  var largest: array<f32, R>;
  var sum: array<f32, R>;
  for (var r = 0u; r < R; r++) {
    let own = min(t + r, d.T - 1u);
    row[r] = ((b * d.T + own) * d.H + h) * D4;
    if (BOUNDED == 1u) { first[r] = first_key(b, own); }
    largest[r] = -1e38;
    if (t + r < d.T) {
      for (var i = x; i < D4; i += WX) { o[row[r] + i] = vec4f(); }
    }
  }
  for (var j0 = first_key(b, t0); j0 < end; j0 += 4u * Q * WX) {
    var score: array<array<vec4f, Q>, R>;
    var at: array<vec4u, Q>;
    let j = j0 + x * 4u * Q;
    for (var n = 0u; n < Q; n++) {
      at[n] = keys + step * min(vec4u(0u, 1u, 2u, 3u) + (j + 4u * n), vec4u(end - 1u));
      // A var in a loop without a value kept that of the round before on SwiftShader.
      for (var r = 0u; r < R; r++) { score[r][n] = vec4f(); }
    }
    for (var i = 0u; i < D4; i += 1u) {
      var query: array<vec4f, R>;
      for (var r = 0u; r < R; r++) { query[r] = q[row[r] + i]; }
      for (var n = 0u; n < Q; n++) {
        let key = mat4x4f(k[at[n].x + i], k[at[n].y + i], k[at[n].z + i], k[at[n].w + i]);
        for (var r = 0u; r < R; r++) { score[r][n] += query[r] * key; }
      }
    }
    var top: array<f32, R>;
    for (var r = 0u; r < R; r++) {
      top[r] = HIDDEN;
      for (var n = 0u; n < Q; n++) {
        let key = vec4u(0u, 1u, 2u, 3u) + (j + 4u * n);
        var hidden = key >= vec4u(end_key(b, t + r));
        if (BOUNDED == 1u) { hidden = hidden | (key < vec4u(first[r])); }
        score[r][n] = select(capped(d.s * score[r][n]), vec4f(HIDDEN), hidden);
        let two = max(score[r][n].xy, score[r][n].zw);
        top[r] = max(top[r], max(two.x, two.y));
      }
      share_row((y * R + r) * WX + x, top[r]);
    }
    meet();
    var shrink: array<f32, R>;
    for (var r = 0u; r < R; r++) {
      var higher = largest[r];
      for (var other = 0u; other < WX; other += 1u) { higher = max(higher, row_at((y * R + r) * WX + other, top[r])); }
      shrink[r] = exp(largest[r] - higher);
      largest[r] = higher;
      sum[r] *= shrink[r];
      for (var n = 0u; n < Q; n++) {
        score[r][n] = exp(score[r][n] - higher);
        sum[r] += dot(score[r][n], vec4f(1.0));
        share(((y * WX + x) * Q + n) * R + r, score[r][n]);
      }
    }
    meet();
    for (var i = x; i < D4; i += WX) {
      var mixed: array<vec4f, R>;
      for (var r = 0u; r < R; r++) {
        mixed[r] = vec4f();
        if (t + r < d.T) { mixed[r] = shrink[r] * o[row[r] + i]; }
      }
      for (var other = 0u; other < WX; other++) {
        for (var n = 0u; n < Q; n++) {
          let at4 = four_of(at[n], keys, step, j0 + 4u * (other * Q + n), end - 1u) + i;
          let value = mat4x4f(v[at4.x], v[at4.y], v[at4.z], v[at4.w]);
          for (var r = 0u; r < R; r++) { mixed[r] += value * shared_at(((y * WX + other) * Q + n) * R + r, score[r][n]); }
        }
      }
      for (var r = 0u; r < R; r++) {
        if (t + r < d.T) { o[row[r] + i] = mixed[r]; }
      }
    }
  }
  for (var r = 0u; r < R; r++) { share_row((y * R + r) * WX + x, sum[r]); }
  meet();
  for (var r = 0u; r < R; r++) {
    var total = 0.0;
    for (var other = 0u; other < WX; other += 1u) { total += row_at((y * R + r) * WX + other, sum[r]); }
    if (t + r < d.T) {
      for (var i = x; i < D4; i += WX) { o[row[r] + i] /= total; }
      if (x == 0u) { lse[row[r] / D4] = largest[r] + log(total); }
    }
  }
}
