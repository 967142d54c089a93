// dv = Σₜ pₜ·doₜ,  dk = s·Σₜ dsₜ·qₜ,  dsₜ = pₜ·(doₜ·v − deltaₜ),  pₜ = exp(s·qₜ·k − lseₜ)        arXiv:2205.14135, algorithm 4
//   shapes as in attention.wgsl; dout like o; delta [B,T,H]; dk, dv [B,S,G,D]. A thread owns one key of one key head and passes
//   over the queries that see it, in every query head that shares the key head. Keys past L get zeros.

const D: u32 = 8u;
const D4: u32 = D / 4u;
override WG: u32 = 32;

struct Dims { n: u32, T: u32, S: u32, L: u32, H: u32, G: u32, s: f32 }  // n = B·S·G keys
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> dout: array<vec4f>;
@group(0) @binding(5) var<storage, read> lse: array<f32>;
@group(0) @binding(6) var<storage, read> delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> dk: array<vec4f>;
@group(0) @binding(8) var<storage, read_write> dv: array<vec4f>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let row = id.x + id.y * groups.x * WG;
  if (row >= d.n) { return; }
  let g = row % d.G;
  let j = row / d.G % d.S;
  let b = row / (d.G * d.S);
  let first = j - min(j, d.L - d.T);  // the query at the key's own position
  let heads = d.H / d.G;
  var key: array<vec4f, D4>;
  var value: array<vec4f, D4>;
  var dkey: array<vec4f, D4>;
  var dvalue: array<vec4f, D4>;
  for (var i = 0u; i < D4; i++) {
    key[i] = d.s * k[row * D4 + i];
    value[i] = v[row * D4 + i];
  }
  let last = select(0u, d.T, j < d.L);
  for (var h = g * heads; h < (g + 1u) * heads; h++) {
    for (var t = first; t < last; t++) {
      let query = (b * d.T + t) * d.H + h;
      let at = query * D4;
      var score = -lse[query];
      var dp = -delta[query];
      for (var i = 0u; i < D4; i++) {
        score += dot(q[at + i], key[i]);
        dp += dot(dout[at + i], value[i]);
      }
      let p = exp(score);
      let ds = d.s * p * dp;
      for (var i = 0u; i < D4; i++) {
        dvalue[i] += p * dout[at + i];
        dkey[i] += ds * q[at + i];
      }
    }
  }
  for (var i = 0u; i < D4; i++) {
    dk[row * D4 + i] = dkey[i];
    dv[row * D4 + i] = dvalue[i];
  }
}
