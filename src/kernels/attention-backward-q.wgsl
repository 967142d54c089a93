// dq = s·Σⱼ dsⱼ·kⱼ,  dsⱼ = pⱼ·(do·vⱼ − delta)·cap′,  pⱼ = exp(xⱼ − lse)        arXiv:2205.14135, algorithm 4
//   shapes, options and tiles as in attention.wgsl, x its scores; dout like o; stats [B,T,H,2] = lse and delta = Σ do∘o
//
// A thread owns R queries of one head and adds their dq up in place.

const R: u32 = 4u;
const Q: u32 = 2u;
const WX: u32 = 1u;
const WY: u32 = 1u;
const WG: u32 = 32u;
const TILE: u32 = WX * WY * R * Q;
override BOUNDED: u32 = 0;
override SEGMENTED: u32 = 0;
override BOTH_WAYS: u32 = 0;
override CAP: u32 = 0;
const HIDDEN: f32 = -3e38;

struct Dims { n: u32, first: u32, T: u32, S: u32, L: u32, H: u32, G: u32, D: u32, window: u32, s: f32, c: f32 }  // tiles first … n of all heads
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> starts: array<i32>;
@group(0) @binding(5) var<storage, read> dout: array<vec4f>;
@group(0) @binding(6) var<storage, read> stats: array<vec2f>;
@group(0) @binding(7) var<storage, read_write> dq: array<vec4f>;

fn unit_of(group: u32, thread: u32) -> u32 { return group * WG + thread; }  // parts/attention-team.wgsl

fn meet() {}

fn share(at: u32, value: vec4f) {}

fn shared_at(at: u32, own: vec4f) -> vec4f { return own; }

fn four_of(own: vec4u, base: u32, step: u32, index: u32, last: u32) -> vec4u { return own; }

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

fn tanh_of(x: vec4f) -> vec4f {
  let e = exp(-2.0 * abs(x));
  return sign(x) * (1.0 - e) / (1.0 + e);
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
  let t0 = (tiles - 1u - unit / d.H % tiles) * R * WY;
  let t = t0 + y * R;
  let D4 = d.D / 4u;
  let end = end_key(b, min(t0 + R * WY, d.T) - 1u);
  let step = d.G * D4;
  let keys = b * d.S * step + h / (d.H / d.G) * D4;
  var row: array<u32, R>;
  var first: array<u32, R>;
  var stat: array<vec2f, R>;
  for (var r = 0u; r < R; r++) {
    let own = min(t + r, d.T - 1u);
    row[r] = ((b * d.T + own) * d.H + h) * D4;
    stat[r] = stats[row[r] / D4];
    if (BOUNDED == 1u) { first[r] = first_key(b, own); }
    if (t + r < d.T) {
      for (var i = x; i < D4; i += WX) { dq[row[r] + i] = vec4f(); }
    }
  }
  for (var j0 = first_key(b, t0); j0 < end; j0 += 4u * Q * WX) {
    var score: array<array<vec4f, Q>, R>;
    var dp: array<array<vec4f, Q>, R>;
    var at: array<vec4u, Q>;
    let j = j0 + x * 4u * Q;
    for (var n = 0u; n < Q; n++) {
      at[n] = keys + step * min(vec4u(0u, 1u, 2u, 3u) + (j + 4u * n), vec4u(end - 1u));
      // A var in a loop without a value kept that of the round before on SwiftShader.
      for (var r = 0u; r < R; r++) {
        score[r][n] = vec4f();
        dp[r][n] = vec4f();
      }
    }
    for (var i = 0u; i < D4; i += 1u) {
      var query: array<vec4f, R>;
      var dmixed: array<vec4f, R>;
      for (var r = 0u; r < R; r++) {
        query[r] = q[row[r] + i];
        dmixed[r] = dout[row[r] + i];
      }
      for (var n = 0u; n < Q; n++) {
        let key = mat4x4f(k[at[n].x + i], k[at[n].y + i], k[at[n].z + i], k[at[n].w + i]);
        let value = mat4x4f(v[at[n].x + i], v[at[n].y + i], v[at[n].z + i], v[at[n].w + i]);
        for (var r = 0u; r < R; r++) {
          score[r][n] += query[r] * key;
          dp[r][n] += dmixed[r] * value;
        }
      }
    }
    for (var r = 0u; r < R; r++) {
      for (var n = 0u; n < Q; n++) {
        let key = vec4u(0u, 1u, 2u, 3u) + (j + 4u * n);
        var hidden = key >= vec4u(end_key(b, t + r));
        if (BOUNDED == 1u) { hidden = hidden | (key < vec4u(first[r])); }
        var ds = d.s * (dp[r][n] - stat[r].y);
        var seen = d.s * score[r][n];
        if (CAP == 1u) {
          let bent = tanh_of(seen / d.c);
          ds *= 1.0 - bent * bent;
          seen = d.c * bent;
        }
        score[r][n] = ds * exp(select(seen - stat[r].x, vec4f(HIDDEN), hidden));
        share(((y * WX + x) * Q + n) * R + r, score[r][n]);
      }
    }
    meet();
    for (var i = x; i < D4; i += WX) {
      var sum: array<vec4f, R>;
      for (var r = 0u; r < R; r++) {
        sum[r] = vec4f();
        if (t + r < d.T) { sum[r] = dq[row[r] + i]; }
      }
      for (var other = 0u; other < WX; other++) {
        for (var n = 0u; n < Q; n++) {
          let at4 = four_of(at[n], keys, step, j0 + 4u * (other * Q + n), end - 1u) + i;
          let key = mat4x4f(k[at4.x], k[at4.y], k[at4.z], k[at4.w]);
          for (var r = 0u; r < R; r++) { sum[r] += key * shared_at(((y * WX + other) * Q + n) * R + r, score[r][n]); }
        }
      }
      for (var r = 0u; r < R; r++) {
        if (t + r < d.T) { dq[row[r] + i] = sum[r]; }
      }
    }
    meet();
  }
}
