// y = x·Wᵀ + s·u·Bᵀ,   u = x·Aᵀ        LoRA forward: arXiv:2106.09685, eq. 3; s = alpha / r
//   x [M,K]   W [N,K]   A [R,K]   u [M,R]   B [N,R]   y [M,N]      all f32, row-major, any size
//
// Rung 2. 2 dispatches: u by 0-product.wgsl, then this one. u is small (R is 4 to 64), so writing it costs next to
// nothing, and with u at hand a thread can finish its element of y by itself: after the loop over K it takes R more
// products and adds them before it stores. y is written once and never read, 4MN bytes as in the base product alone; t
// and y0 are gone.
//
// 2MNK + 2R(MK + MN) operations, as before. Bytes, each operand counted once: those of the base product, 4(MK + NK +
// MN), and 4(MK + RK + MR) for u, and 4(MR + NR) to read it back with B.
//
// Next limit: the loop over R is a naive kernel at the end of a good one. Its products take two loads from global
// memory each, where the loop over K takes 2/T, and lanes side by side read rows of B that lie R elements apart. At
// R = 16 and T = 16 that is as many loads from global memory as 256 steps along K. And whatever is done to speed up the
// first loop has to be done to the second once more.

override T: u32 = 16;

struct Dims { M: u32, N: u32, K: u32, R: u32, s: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> W: array<f32>;
@group(0) @binding(3) var<storage, read> u: array<f32>;
@group(0) @binding(4) var<storage, read> B: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

var<workgroup> lhs: array<f32, T * T>;
var<workgroup> rhs: array<f32, T * (T + 1)>;

// Zero past K, where the sum ends. Rows past M or N may hold anything: they reach only elements of y that are never
// written.
fn lhs_at(i: u32, k: u32) -> f32 {
  if (k < d.K) { return x[i * d.K + k]; }
  return 0.0;
}

fn rhs_at(j: u32, k: u32) -> f32 {
  if (k < d.K) { return W[j * d.K + k]; }
  return 0.0;
}

@compute @workgroup_size(T, T)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_id) t: vec3u) {
  let i = tile.y * T + t.y;
  let j = tile.x * T + t.x;
  var acc = 0.0;
  for (var k0 = 0u; k0 < d.K; k0 += T) {
    lhs[t.y * T + t.x] = lhs_at(i, k0 + t.x);
    rhs[t.y * (T + 1) + t.x] = rhs_at(tile.x * T + t.y, k0 + t.x);
    workgroupBarrier();
    for (var k = 0u; k < T; k++) { acc += lhs[t.y * T + k] * rhs[t.x * (T + 1) + k]; }
    workgroupBarrier();
  }
  if (i >= d.M || j >= d.N) { return; }
  for (var k = 0u; k < d.R; k++) { acc += d.s * u[i * d.R + k] * B[j * d.R + k]; }
  y[i * d.N + j] = acc;
}
