// dq = s·Σⱼ dsⱼ·kⱼ,  dsⱼ = pⱼ·(do·vⱼ − delta),  pⱼ = exp(s·q·kⱼ − lse)        arXiv:2205.14135, algorithm 4
//   shapes as in attention.wgsl; dout like o; delta [B,T,H] = Σ do∘o. A thread owns one query row.

const D: u32 = 8u;
const D4: u32 = D / 4u;
override WG: u32 = 32;

struct Dims { n: u32, T: u32, S: u32, L: u32, H: u32, G: u32, s: f32 }  // n = B·T·H rows
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> q: array<vec4f>;
@group(0) @binding(2) var<storage, read> k: array<vec4f>;
@group(0) @binding(3) var<storage, read> v: array<vec4f>;
@group(0) @binding(4) var<storage, read> dout: array<vec4f>;
@group(0) @binding(5) var<storage, read> lse: array<f32>;
@group(0) @binding(6) var<storage, read> delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> dq: array<vec4f>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let row = id.x + id.y * groups.x * WG;
  if (row >= d.n) { return; }
  let h = row % d.H;
  let t = row / d.H % d.T;
  let b = row / (d.H * d.T);
  let g = h / (d.H / d.G);
  var query: array<vec4f, D4>;
  var dmixed: array<vec4f, D4>;
  var sum: array<vec4f, D4>;
  for (var i = 0u; i < D4; i++) {
    query[i] = d.s * q[row * D4 + i];
    dmixed[i] = dout[row * D4 + i];
  }
  for (var j = 0u; j <= d.L - d.T + t; j++) {
    let at = ((b * d.S + j) * d.G + g) * D4;
    var score = -lse[row];
    var dp = -delta[row];
    for (var i = 0u; i < D4; i++) {
      score += dot(query[i], k[at + i]);
      dp += dot(dmixed[i], v[at + i]);
    }
    let ds = exp(score) * dp;
    for (var i = 0u; i < D4; i++) { sum[i] += ds * k[at + i]; }
  }
  for (var i = 0u; i < D4; i++) { dq[row * D4 + i] = d.s * sum[i]; }
}
