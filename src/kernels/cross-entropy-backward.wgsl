// dx[i,j] = dy·c·(exp(x[i,j] − m − l) − [j = label])        gradient of cross-entropy-piece.wgsl; zeros in rows with a label below 0
//   x, dx [M,V]   labels [M]   stats [M,4] = (m, l, …)   dy [1]     f32, labels i32; a thread owns one element of dx

override WG: u32 = 64;

struct Dims { n: u32, V: u32, c: f32 }  // n = M·V
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> labels: array<i32>;
@group(0) @binding(3) var<storage, read> stats: array<vec4f>;
@group(0) @binding(4) var<storage, read> dy: array<f32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let i = at / d.V;
  let label = labels[i];
  var gradient = 0.0;
  if (label >= 0) {
    gradient = dy[0] * d.c * (exp(x[at] - stats[i].x - stats[i].y) - select(0.0, 1.0, at % d.V == u32(label)));
  }
  dx[at] = gradient;
}
