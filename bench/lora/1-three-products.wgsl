// y = y0 + s·t,   y0 = x·Wᵀ,   t = u·Bᵀ,   u = x·Aᵀ        LoRA forward: arXiv:2106.09685, eq. 3; s = alpha / r
//   x [M,K]   W [N,K]   A [R,K]   u [M,R]   B [N,R]   y0, t, y [M,N]      all f32, row-major
//
// Rung 1. The formula as a framework runs it: 4 dispatches, three products by 0-product.wgsl and this sum of two of
// them.
//
// 2MNK + 2R(MK + MN) operations: with M = N = K = 4096 and R = 16, 0.8 % more than the base product alone. So the
// low-rank term ought to be free. It is not, because of what it moves: matrices of the size of y are written three
// times (y0, t, y) and read twice, 20MN bytes where the base product writes 4MN. This kernel does 2 operations for 12
// bytes and can run no faster than memory, however fast the products are.
//
// Next limit: t and y0, which exist only to be added.

override WG: u32 = 256;

struct Dims { n: u32, s: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> y0: array<f32>;
@group(0) @binding(2) var<storage, read> t: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * WG * groups.x;
  if (i < d.n) { y[i] = y0[i] + d.s * t[i]; }
}
