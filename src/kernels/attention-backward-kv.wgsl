// dv = Σₜ pₜ·doₜ,  dk = s·Σₜ dsₜ·qₜ,  dsₜ = pₜ·(doₜ·v − deltaₜ)·cap′,  pₜ = exp(xₜ − lseₜ)        arXiv:2205.14135, algorithm 4
//   shapes, options and tiles as in attention.wgsl, x its scores; dout like o; stats [B,T,H,2] = lse and delta; dk, dv [B,S,G,D]
//
// A thread owns R keys of one key head and passes over the queries that see them, 4·Q at a time, in every query head that shares the
// key head; dk and dv are added up in place. Keys past L get zeros.

const R: u32 = 4u;
const Q: u32 = 2u;
const FOUR: u32 = 4u;
const WX: u32 = 1u;
const WY: u32 = 1u;
const WG: u32 = 32u;
const HALF: u32 = WX * WY * R * Q;
const TILE: u32 = 2u * HALF;
override BOUNDED: u32 = 0;
override SEGMENTED: u32 = 0;
override BOTH_WAYS: u32 = 0;
override CAP: u32 = 0;
const HIDDEN: f32 = -3e38;

struct Dims { n: u32, first: u32, T: u32, S: u32, L: u32, H: u32, G: u32, D: u32, window: u32, s: f32, c: f32 }  // tiles first … n of all key heads
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> starts: array<i32>;
@group(0) @binding(5) var<storage, read> dout: array<vec4f>;
@group(0) @binding(6) var<storage, read> stats: array<vec2f>;
@group(0) @binding(7) var<storage, read_write> dk: array<vec4f>;
@group(0) @binding(8) var<storage, read_write> dv: array<vec4f>;

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

// Four queries from t on; those past the last repeat it.
fn four(t: u32) -> vec4u { return min(vec4u(0u, 1u, 2u, 3u) + t, vec4u(d.T - 1u)); }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let unit = d.first + unit_of(group.x + group.y * groups.x, thread);
  if (unit >= d.n) { return; }
  let x = thread % WX;
  let y = thread / WX % WY;
  let tiles = (d.S + R * WY - 1u) / (R * WY);
  let g = unit % d.G;
  let b = unit / (d.G * tiles);
  let j0 = unit / d.G % tiles * R * WY;
  let j = j0 + y * R;
  let last = j0 + R * WY - 1u;
  let D4 = d.D / 4u;
  let heads = d.H / d.G;
  let step = d.H * D4;
  let before = d.L - d.T;
  let first_query = select(j0 - min(j0, before), 0u, BOTH_WAYS == 1u);
  var row: array<u32, R>;
  for (var r = 0u; r < R; r++) {
    row[r] = ((b * d.S + min(j + r, d.L - 1u)) * d.G + g) * D4;
    let own = ((b * d.S + j + r) * d.G + g) * D4;
    if (j + r < d.S) {
      for (var i = x; i < D4; i += WX) {
        dk[own + i] = vec4f();
        dv[own + i] = vec4f();
      }
    }
  }
  if (j0 >= d.L) { return; }
  for (var h = g * heads; h < (g + 1u) * heads; h += 1u) {
    let queries = b * d.T * step + h * D4;
    for (var t0 = first_query; t0 < d.T && (BOUNDED == 0u || first_key(b, t0) <= last); t0 += 4u * Q * WX) {
      var score: array<array<vec4f, Q>, R>;
      var dp: array<array<vec4f, Q>, R>;
      var at: array<vec4u, Q>;
      let t = t0 + x * 4u * Q;
      for (var n = 0u; n < Q; n++) {
        at[n] = queries + step * four(t + 4u * n);
        // A var in a loop without a value kept that of the round before on SwiftShader.
        for (var r = 0u; r < R; r++) {
          score[r][n] = vec4f();
          dp[r][n] = vec4f();
        }
      }
      for (var i = 0u; i < D4; i += 1u) {
        var key: array<vec4f, R>;
        var value: array<vec4f, R>;
        for (var r = 0u; r < R; r++) {
          key[r] = k[row[r] + i];
          value[r] = v[row[r] + i];
        }
        for (var n = 0u; n < Q; n++) {
          let query = mat4x4f(q[at[n].x + i], q[at[n].y + i], q[at[n].z + i], q[at[n].w + i]);
          let dmixed = mat4x4f(dout[at[n].x + i], dout[at[n].y + i], dout[at[n].z + i], dout[at[n].w + i]);
          for (var r = 0u; r < R; r++) {
            score[r][n] += key[r] * query;
            dp[r][n] += value[r] * dmixed;
          }
        }
      }
      for (var n = 0u; n < Q; n++) {
        var lse: vec4f;
        var delta: vec4f;
        var first: vec4u;
        for (var m = 0u; m < FOUR; m++) {
          let stat = stats[at[n][m] / D4];
          lse[m] = stat.x;
          delta[m] = stat.y;
          if (BOUNDED == 1u) { first[m] = first_key(b, four(t + 4u * n)[m]); }
        }
        let place = vec4u(0u, 1u, 2u, 3u) + (t + 4u * n);
        for (var r = 0u; r < R; r++) {
          var hidden = place >= vec4u(d.T);
          if (BOTH_WAYS == 1u) { hidden = hidden | vec4<bool>(j + r >= end_key(b, t)); } else { hidden = hidden | (place + before < vec4u(j + r)); }
          if (BOUNDED == 1u) { hidden = hidden | (first > vec4u(j + r)); }
          var ds = d.s * (dp[r][n] - delta);
          var seen = d.s * score[r][n];
          if (CAP == 1u) {
            let bent = tanh_of(seen / d.c);
            ds *= 1.0 - bent * bent;
            seen = d.c * bent;
          }
          score[r][n] = exp(select(seen - lse, vec4f(HIDDEN), hidden));
          dp[r][n] = ds * score[r][n];
          share(((y * WX + x) * Q + n) * R + r, score[r][n]);
          share(HALF + ((y * WX + x) * Q + n) * R + r, dp[r][n]);
        }
      }
      meet();
      for (var i = x; i < D4; i += WX) {
        var dkey: array<vec4f, R>;
        var dvalue: array<vec4f, R>;
        for (var r = 0u; r < R; r++) {
          let own = ((b * d.S + j + r) * d.G + g) * D4 + i;
          dkey[r] = vec4f();
          dvalue[r] = vec4f();
          if (j + r < d.S) {
            dkey[r] = dk[own];
            dvalue[r] = dv[own];
          }
        }
        for (var other = 0u; other < WX; other++) {
          for (var n = 0u; n < Q; n++) {
            let at4 = four_of(at[n], queries, step, t0 + 4u * (other * Q + n), d.T - 1u) + i;
            let query = mat4x4f(q[at4.x], q[at4.y], q[at4.z], q[at4.w]);
            let dmixed = mat4x4f(dout[at4.x], dout[at4.y], dout[at4.z], dout[at4.w]);
            let first_of = ((y * WX + other) * Q + n) * R;
            for (var r = 0u; r < R; r++) {
              dkey[r] += query * shared_at(HALF + first_of + r, dp[r][n]);
              dvalue[r] += dmixed * shared_at(first_of + r, score[r][n]);
            }
          }
        }
        for (var r = 0u; r < R; r++) {
          let own = ((b * d.S + j + r) * d.G + g) * D4 + i;
          if (j + r < d.S) {
            dk[own] = dkey[r];
            dv[own] = dvalue[r];
          }
        }
      }
      meet();
    }
  }
}
