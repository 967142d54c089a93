// stats = (lse, Σ over D of do∘o): what the backward pass of attention needs of each query row        arXiv:2205.14135, algorithm 4
//   dout, o [n,D]   lse [n]   stats [n,2]     a thread owns a row

override WG: u32 = 64;

struct Dims { n: u32, D: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> dout: array<vec4f>;
@group(0) @binding(2) var<storage, read> o: array<vec4f>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read_write> stats: array<vec2f>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let row = id.x + id.y * groups.x * WG;
  if (row >= d.n) { return; }
  let D4 = d.D / 4u;
  var sum = 0.0;
  for (var i = row * D4; i < (row + 1u) * D4; i++) { sum += dot(dout[i], o[i]); }
  stats[row] = vec2f(lse[row], sum);
}
