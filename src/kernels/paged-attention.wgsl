// o = softmax(s·q·kᵀ)·v over the keys of each token's own sequence, which lie in pages        arXiv:2309.06180 §4.1
//   q, o [T,H,D]   k, v [P,2^bits,G,D]   sequences, positions [T], tables [S,most]: as in paged-write.wgsl
//
// Token t sees keys max(0, p + 1 − window) … p of its sequence, p its position, by the online softmax of arXiv:1805.02867; query head h uses
// key head h / (H/G). One of no sequence (−1) gives zeros. Tokens of one sequence and of many are the same to it: it serves prefill and
// decoding in one batch. A thread owns one head of one token; parts/attention-team.wgsl puts WX threads to it, 4 keys each at a time.

const R: u32 = 1u;
const WX: u32 = 1u;
const WY: u32 = 1u;
const WG: u32 = 32u;
const TILE: u32 = WX * WY;
override CAP: u32 = 0;
const HIDDEN: f32 = -3e38;

struct Dims { n: u32, H: u32, G: u32, D: u32, window: u32, most: u32, bits: u32, s: f32, c: f32 }  // n = T·H
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
  if (unit >= d.n) { return; }
  let x = thread % WX;
  let D4 = d.D / 4u;
  let t = unit / d.H;
  let head = unit % d.H / (d.H / d.G) * D4;
  let row = unit * D4;
  let sequence = sequences[t];
  for (var i = x; i < D4; i += WX) { o[row + i] = vec4f(); }
  if (sequence < 0) { return; }
  let table = u32(sequence) * d.most;
  let last = u32(positions[t]);
  let first = last + 1u - min(last + 1u, d.window);
  var largest = -1e38;
  var sum = 0.0;
  for (var j0 = first; j0 <= last; j0 += 4u * WX) {
    let j = j0 + x * 4u;
    let at = places(table, j, last) + head;
    var score = vec4f();
    for (var i = 0u; i < D4; i += 1u) {
      score += q[row + i] * mat4x4f(widened(k[at.x + i]), widened(k[at.y + i]), widened(k[at.z + i]), widened(k[at.w + i]));
    }
    score = select(capped(d.s * score), vec4f(HIDDEN), vec4u(0u, 1u, 2u, 3u) + j > vec4u(last));
    let two = max(score.xy, score.zw);
    let top = max(two.x, two.y);
    share_row(x, top);
    meet();
    var higher = largest;
    for (var other = 0u; other < WX; other += 1u) { higher = max(higher, row_at(other, top)); }
    let shrink = exp(largest - higher);
    largest = higher;
    score = exp(score - higher);
    sum = sum * shrink + dot(score, vec4f(1.0));
    share(x, score);
    meet();
    for (var i = x; i < D4; i += WX) {
      var mixed = shrink * o[row + i];
      for (var other = 0u; other < WX; other += 1u) {
        let at4 = places(table, j0 + 4u * other, last) + head + i;
        mixed += mat4x4f(widened(v[at4.x]), widened(v[at4.y]), widened(v[at4.z]), widened(v[at4.w])) * shared_at(other, score);
      }
      o[row + i] = mixed;
    }
  }
  share_row(x, sum);
  meet();
  var total = 0.0;
  for (var other = 0u; other < WX; other += 1u) { total += row_at(other, sum); }
  for (var i = x; i < D4; i += WX) { o[row + i] /= total; }
}
