// y = x·Wᵀ + s·u·Bᵀ,   u = x·Aᵀ        LoRA forward: arXiv:2106.09685, eq. 3; s = alpha / r
//   x [M,K]   W [N,K]   A [R,K]   u [M,R]   B [N,R]   y [M,N]      all f32, row-major, any size
//
// Rung 3. Two sums of products are one longer sum: x·Wᵀ + s·u·Bᵀ = [x | s·u]·[W | B]ᵀ. The low-rank term is R more
// columns of the same product, and one loop over K+R covers both. Only the two functions that fetch know where x ends
// and u begins; the inner loop, the barriers and the store are those of 0-product.wgsl.
//
// 2 dispatches, the operations and the bytes of rung 2. What changes is where the R products are done: from workgroup
// memory, with 2/T loads from global memory per multiply-add like all others. Over the base product, this kernel takes
// K+R steps instead of K: 0.4 % more at K = 4096, R = 16. With R = 0 it is the base product. It reads as one loop, so
// every improvement of the product (../matmul) is one of LoRA too; and dx = [dy | v]·[W ; A], v = s·dy·B, is the same
// again.
//
// Next limit: u. It reads all of x for R columns, one or few tiles wide: few workgroups, each with a long loop. What
// helps is more workgroups along K (split-K) rather than a better inner loop. The shipped path, `loraLinear`, is these
// two dispatches with the shipped product.

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

// Zero past K+R, where the sum ends. Rows past M or N may hold anything: they reach only elements of y that are
// never written.
fn lhs_at(i: u32, k: u32) -> f32 {
  if (k < d.K) { return x[i * d.K + k]; }
  if (k < d.K + d.R) { return d.s * u[i * d.R + k - d.K]; }
  return 0.0;
}

fn rhs_at(j: u32, k: u32) -> f32 {
  if (k < d.K) { return W[j * d.K + k]; }
  if (k < d.K + d.R) { return B[j * d.R + k - d.K]; }
  return 0.0;
}

@compute @workgroup_size(T, T)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_id) t: vec3u) {
  let i = tile.y * T + t.y;
  let j = tile.x * T + t.x;
  var acc = 0.0;
  for (var k0 = 0u; k0 < d.K + d.R; k0 += T) {
    lhs[t.y * T + t.x] = lhs_at(i, k0 + t.x);
    rhs[t.y * (T + 1) + t.x] = rhs_at(tile.x * T + t.y, k0 + t.x);
    workgroupBarrier();
    for (var k = 0u; k < T; k++) { acc += lhs[t.y * T + k] * rhs[t.x * (T + 1) + k]; }
    workgroupBarrier();
  }
  if (i < d.M && j < d.N) { y[i * d.N + j] = acc; }
}
