// o = softmax(s·q·kᵀ)·v over the keys of each token's own sequence, which lie in pages        arXiv:2309.06180 §4.1
//   q [T,H,D]   k, v [P,2^bits,G,D]   sequences, positions [T], tables [S,most]: as in paged-write.wgsl
//   o [T,H,D]; if splits > 1, of each split [splits,T,H,D+4]: o times its sum, its largest score, its sum, 0, 0: see paged-combine.wgsl
//
// Token t sees keys max(0, p + 1 − window) … p of its sequence, p its position, by the online softmax of arXiv:1805.02867; query head h uses
// key head h / (H/G). One of no sequence (−1) gives zeros. Tokens of one sequence and of many are the same to it: it serves prefill and
// decoding in one batch. A thread owns a tile of R rows, which share what they read: HEADS heads of one key head, each of up to R / HEADS
// tokens. Tokens R/HEADS·i, … are cut where the sequence changes; the first of each piece has the tile, the others have nothing to do. The keys
// of a tile are shared out to `splits` units (arXiv:2311.01282 §3), SHARE or a multiple to each; parts/attention-team.wgsl puts WX threads
// to a unit, 4 keys each at a time.

const R: u32 = 1u;
const HEADS: u32 = 1u;  // divides R and H/G
const WX: u32 = 1u;
const WY: u32 = 1u;
const WG: u32 = 32u;
const TILE: u32 = WX * WY * R;
const SHARE: u32 = 128u;  // a multiple of 4·WX
override CAP: u32 = 0;
const HIDDEN: f32 = -3e38;

struct Dims { T: u32, H: u32, G: u32, D: u32, window: u32, most: u32, bits: u32, splits: u32, s: f32, c: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<Cached>;
@group(0) @binding(3) var<storage, read> v: array<Cached>;
@group(0) @binding(4) var<storage, read> sequences: array<i32>;
@group(0) @binding(5) var<storage, read> positions: array<i32>;
@group(0) @binding(6) var<storage, read> tables: array<i32>;
@group(0) @binding(7) var<storage, read_write> o: array<vec4f>;

alias Cached = vec4f;

// parts/paged-f16.wgsl
fn widened(stored: Cached) -> vec4f { return stored; }

fn unit_of(group: u32, thread: u32) -> u32 { return group * WG + thread; }  // parts/attention-team.wgsl

fn meet() {}

fn share(at: u32, value: vec4f) {}

fn shared_at(at: u32, own: vec4f) -> vec4f { return own; }

fn share_row(at: u32, value: f32) {}

fn row_at(at: u32, own: f32) -> f32 { return own; }

fn capped(score: vec4f) -> vec4f {
  if (CAP == 0u) { return score; }
  let e = exp(-2.0 * abs(score / d.c));
  return d.c * sign(score) * (1.0 - e) / (1.0 + e);
}

// Where in the pages key j of the sequence begins; those past `last` are it again.
fn place(table: u32, j: u32, last: u32) -> u32 {
  let key = min(j, last);
  let page = u32(tables[table + (key >> d.bits)]);
  return ((page << d.bits) + (key & ((1u << d.bits) - 1u))) * d.G * (d.D / 4u);
}

fn places(table: u32, j: u32, last: u32) -> vec4u {
  return vec4u(place(table, j, last), place(table, j + 1u, last), place(table, j + 2u, last), place(table, j + 3u, last));
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let unit = unit_of(group.x + group.y * groups.x, thread);
  let x = thread % WX;
  let blocks = d.H / HEADS;
  let h = unit % blocks * HEADS;
  let tiles = (d.T + R / HEADS - 1u) / (R / HEADS);
  let within = unit / (blocks * tiles) % (R / HEADS);
  let t = unit / blocks % tiles * (R / HEADS) + within;  // those that have a tile in any case first: threads next to each other do the same
  let split = unit / (blocks * tiles * (R / HEADS));
  if (t >= d.T || split >= d.splits) { return; }
  let sequence = sequences[t];
  if (within > 0u && sequences[max(t, 1u) - 1u] == sequence) { return; }
  var count = 1u;
  for (; count < min(R / HEADS - within, d.T - t); count += 1u) {
    if (sequences[t + count] != sequence) { break; }
  }
  let D4 = d.D / 4u;
  let width = select(D4, D4 + 1u, d.splits > 1u);
  var query: array<u32, R>;
  var row: array<u32, R>;
  var first: array<u32, R>;
  var last: array<u32, R>;
  var largest: array<f32, R>;
  var sum: array<f32, R>;
  var start = 0xffffffffu;
  var end = 0u;
  for (var r = 0u; r < R; r++) {
    let own = t + min(r / HEADS, count - 1u);
    let at = own * d.H + h + r % HEADS;
    query[r] = at * D4;
    row[r] = (split * d.T * d.H + at) * width;
    last[r] = u32(positions[own]);
    first[r] = last[r] + 1u - min(last[r] + 1u, d.window);
    largest[r] = -1e38;
    start = min(start, first[r]);
    end = max(end, last[r] + 1u);
    if (r / HEADS < count) {
      for (var i = x; i < D4; i += WX) { o[row[r] + i] = vec4f(); }
    }
  }
  if (sequence < 0) { end = start; }
  let table = u32(sequence) * d.most;
  let head = h / (d.H / d.G) * D4;
  let keys = (end - start + d.splits * SHARE - 1u) / (d.splits * SHARE) * SHARE;
  let begin = start + split * keys;
  for (var j0 = begin; j0 < min(begin + keys, end); j0 += 4u * WX) {
    let j = j0 + x * 4u;
    let at = places(table, j, end - 1u) + head;
    var score: array<vec4f, R>;
    // A var in a loop without a value kept that of the round before on SwiftShader.
    for (var r = 0u; r < R; r++) { score[r] = vec4f(); }
    for (var i = 0u; i < D4; i += 1u) {
      let key = mat4x4f(widened(k[at.x + i]), widened(k[at.y + i]), widened(k[at.z + i]), widened(k[at.w + i]));
      for (var r = 0u; r < R; r++) { score[r] += q[query[r] + i] * key; }
    }
    var top: array<f32, R>;
    for (var r = 0u; r < R; r++) {
      let key = vec4u(0u, 1u, 2u, 3u) + j;
      score[r] = select(capped(d.s * score[r]), vec4f(HIDDEN), (key < vec4u(first[r])) | (key > vec4u(last[r])));
      let two = max(score[r].xy, score[r].zw);
      top[r] = max(two.x, two.y);
      share_row(r * WX + x, top[r]);
    }
    meet();
    var shrink: array<f32, R>;
    for (var r = 0u; r < R; r++) {
      var higher = largest[r];
      for (var other = 0u; other < WX; other += 1u) { higher = max(higher, row_at(r * WX + other, top[r])); }
      shrink[r] = exp(largest[r] - higher);
      largest[r] = higher;
      score[r] = exp(score[r] - higher);
      sum[r] = sum[r] * shrink[r] + dot(score[r], vec4f(1.0));
      share(x * R + r, score[r]);
    }
    meet();
    for (var i = x; i < D4; i += WX) {
      var mixed: array<vec4f, R>;
      for (var r = 0u; r < R; r++) {
        mixed[r] = vec4f();
        if (r / HEADS < count) { mixed[r] = shrink[r] * o[row[r] + i]; }
      }
      for (var other = 0u; other < WX; other += 1u) {
        var at4 = at;
        if (WX > 1u) { at4 = places(table, j0 + 4u * other, end - 1u) + head; }
        let value = mat4x4f(widened(v[at4.x + i]), widened(v[at4.y + i]), widened(v[at4.z + i]), widened(v[at4.w + i]));
        for (var r = 0u; r < R; r++) { mixed[r] += value * shared_at(other * R + r, score[r]); }
      }
      for (var r = 0u; r < R; r++) {
        if (r / HEADS < count) { o[row[r] + i] = mixed[r]; }
      }
    }
  }
  for (var r = 0u; r < R; r++) { share_row(r * WX + x, sum[r]); }
  meet();
  for (var r = 0u; r < R; r++) {
    var total = 0.0;
    for (var other = 0u; other < WX; other += 1u) { total += row_at(r * WX + other, sum[r]); }
    if (r / HEADS < count) {
      if (d.splits > 1u) {
        if (x == 0u) { o[row[r] + D4] = vec4f(largest[r], total, 0.0, 0.0); }
      } else {
        for (var i = x; i < D4; i += WX) { o[row[r] + i] /= max(total, 0.5); }  // 0 of no sequence, else 1 or more
      }
    }
  }
}
