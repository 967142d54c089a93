// y = x·wᵀ        x [M,K]   w [N,K]   y [M,N]      f32, row-major, any size
//
// The product that every rung of this ladder is made of: u = x·Aᵀ for all of them, and the base product x·Wᵀ alone. A
// workgroup owns a T×T tile of y, a thread one element of it; ../matmul/3-shared-tile.wgsl explains how, and ../matmul
// goes on to faster ways. This ladder stays on that rung, so that its kernels differ in nothing but their low-rank
// term.
//
// 2MNK operations. Read x and w, write y: 4(MK + NK + MN) bytes, each operand counted once.
//
// w is stored by its outputs, so a tile of it is fetched along K, as that of x is, and read down a column. Rows of
// T + 1 words put the T words of a column into T different banks; with rows of T = 16 they would share two of 32.

override T: u32 = 16;

struct Dims { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

var<workgroup> lhs: array<f32, T * T>;
var<workgroup> rhs: array<f32, T * (T + 1)>;

// Zero past K, where the sum ends. Rows past M or N may hold anything: they reach only elements of y that are never
// written.
fn lhs_at(i: u32, k: u32) -> f32 {
  if (k < d.K) { return x[i * d.K + k]; }
  return 0.0;
}

fn rhs_at(j: u32, k: u32) -> f32 {
  if (k < d.K) { return w[j * d.K + k]; }
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
  if (i < d.M && j < d.N) { y[i * d.N + j] = acc; }
}
