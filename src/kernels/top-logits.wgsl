// The likeliest of each row and the weight of its others        a chunk of a row gives its TOP greatest; then TOP of each 16 lists, until there is one
//   x [N,count] f32, or after the first pass lists [N,⌈count/TOP⌉]   temperatures [N] f32   y [N,chunks] of lists
//   A list is TOP ids, TOP logits and Σ exp(x − m), Σ exp((x − m)/temperature) over what was left out of it, m its greatest logit. It is sorted by
//   logit and, of equals, by id; where there are fewer, the ids at its end are −1. A NaN counts as −∞, −0 as 0.
//
// A workgroup sorts blocks of TOP either way in turn (Batcher 1968); of two neighbours the greater one at each place are the TOP of both and
// still rise or fall but once, so that log TOP steps sort them. Numbers are compared as whole numbers, as infinities need not be known in WGSL.

const WG: u32 = 256u;
const TOP: u32 = 64u;
const CHUNK: u32 = 1024u;
const WORDS: u32 = 2u * TOP + 2u;
const NONE: u32 = 0xffffffffu;
const LOWEST: u32 = 0x007fffffu;  // the key of −∞
const HIGHEST: u32 = 0xff800000u;  // of ∞
override FIRST: u32 = 0;

struct Dims { n: u32, count: u32, chunks: u32 }  // n = N·chunks
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read> temperatures: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;

var<workgroup> keys: array<u32, CHUNK>;
var<workgroup> ids: array<u32, CHUNK>;
var<workgroup> sums: array<vec2f, WG>;

// Ordered as the number is; 0 is below all.
fn key_of(number: u32) -> u32 {
  var bits = number;
  if ((bits & 0x7fffffffu) > 0x7f800000u) { bits = 0xff800000u; }
  if (bits == 0x80000000u) { bits = 0u; }
  return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn bits_of(key: u32) -> u32 { return select(~key, key & 0x7fffffffu, key >= 0x80000000u); }

// exp(x − m), exp((x − m)/temperature)
fn weights(key: u32, most: u32, temperature: f32) -> vec2f {
  if (key == most && key > LOWEST) { return vec2f(1.0); }
  if (key <= LOWEST || most == HIGHEST) { return vec2f(); }
  let below = bitcast<f32>(bits_of(key)) - bitcast<f32>(bits_of(most));
  return exp(max(vec2f(below, below / temperature), vec2f(-104.0)));
}

// Whether what is at a comes after what is at b.
fn is_after(a: u32, b: u32) -> bool { return keys[a] < keys[b] || (keys[a] == keys[b] && ids[a] > ids[b]); }

fn order(a: u32, b: u32, rises: bool) {
  if (is_after(a, b) == rises) { return; }
  let key = keys[a];
  keys[a] = keys[b];
  keys[b] = key;
  let id = ids[a];
  ids[a] = ids[b];
  ids[b] = id;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let at = group.x + group.y * groups.x;
  if (at >= d.n) { return; }
  let row = at / d.chunks;
  let start = at % d.chunks * CHUNK;
  let temperature = temperatures[row];
  let lists = row * (d.count / TOP) + start / TOP;
  for (var e = thread; e < CHUNK; e += WG) {
    keys[e] = 0u;
    ids[e] = NONE;
    if (start + e < d.count) {
      if (FIRST == 1u) {
        ids[e] = start + e;
        keys[e] = key_of(x[row * d.count + start + e]);
      } else {
        let source = (lists + e / TOP) * WORDS + e % TOP;
        ids[e] = x[source];
        if (ids[e] != NONE) { keys[e] = key_of(x[source + TOP]); }
      }
    }
  }
  for (var size = 2u; size <= TOP; size *= 2u) {
    for (var stride = size / 2u; stride > 0u; stride /= 2u) {
      workgroupBarrier();
      for (var pair = thread; pair < CHUNK / 2u; pair += WG) {
        let a = 2u * pair - (pair & (stride - 1u));
        order(a, a + stride, (a & size) != 0u);
      }
    }
  }
  workgroupBarrier();
  var most = 0u;
  for (var part = 0u; part < CHUNK / TOP; part += 2u) { most = max(most, max(keys[part * TOP], keys[part * TOP + 2u * TOP - 1u])); }
  var sum = vec2f();
  if (FIRST == 0u && thread < CHUNK / TOP && start + thread * TOP < d.count) {
    let source = (lists + thread) * WORDS;
    sum = vec2f(bitcast<f32>(x[source + 2u * TOP]), bitcast<f32>(x[source + 2u * TOP + 1u])) * weights(key_of(x[source + TOP]), most, temperature);
  }
  for (var gap = TOP; gap < CHUNK; gap *= 2u) {
    workgroupBarrier();
    for (var pair = thread; pair < CHUNK / gap * TOP / 2u; pair += WG) {
      let a = pair / TOP * 2u * gap + pair % TOP;
      order(a, a + gap, false);
      sum += weights(keys[a + gap], most, temperature);
    }
    for (var stride = TOP / 2u; stride > 0u; stride /= 2u) {
      workgroupBarrier();
      for (var pair = thread; pair < CHUNK / gap * TOP / 4u; pair += WG) {
        let part = pair / (TOP / 2u);
        let within = pair % (TOP / 2u);
        let a = part * 2u * gap + 2u * within - (within & (stride - 1u));
        order(a, a + stride, part % 2u != 0u);
      }
    }
  }
  sums[thread] = sum;
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) { sums[thread] += sums[thread + half]; }
  }
  let to = at * WORDS;
  if (thread < TOP) {
    y[to + thread] = ids[thread];
    y[to + TOP + thread] = bits_of(max(keys[thread], LOWEST));
  }
  if (thread == 0u) {
    y[to + 2u * TOP] = bitcast<u32>(sums[0].x);
    y[to + 2u * TOP + 1u] = bitcast<u32>(sums[0].y);
  }
}
