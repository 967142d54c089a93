// y = x·w        x [M,K]   w [K,N]   y [M,N]      f32, row-major, any size
//
// Rung 4. A thread owns TM×TN elements of y instead of one. At each k it reads TM values of a column of lhs and TN of a
// row of rhs into registers and adds their outer product to TM·TN accumulators, which are registers as well: the
// fastest memory there is, and the only one that keeps up with the multiply-add units.
//
// Per multiply-add, at TM = TN = 8: (TM + TN) / (TM·TN) = 1/4 load from workgroup memory; rung 3 had 2. And 64
// threads now cover a tile of 64×64 (BM = TM·WY by BN = TN·WX), where 256 covered 16×16, so global loads fall as well:
// 1/BM + 1/BN = 1/32, and a fetched element is used 64 times, 16 operations per byte. On an M4 Pro, blocks of 4×4 alone, without workgroup
// memory, made a naive kernel 3.4 times faster (pytorch/executorch PR 20456), and tiles of 64×64 instead of 32×32
// another 1.75 to 3.17 times (PR 20730).
//
// Price: 64 accumulators per thread, so fewer threads fit on a core at once to hide each other's waiting, and a small y
// no longer fills the machine: there is one workgroup for each 64×64 tile.
//
// Next limit: the loads that remain are scalar and collide. 32 lanes are 4 rows of 8 threads. Thread t.x reads rhs at
// 8·t.x + j: 8 words 8 apart, t.x and t.x + 4 meet in one of 32 banks, 2 passes. Thread t.y reads lhs in row 8·t.y + i:
// 4 words 8·BK apart, all in the same bank, 4 passes. 8·2 + 8·4 = 48 passes for 16 loads.

const TM: u32 = 8u;
const TN: u32 = 8u;
const BK: u32 = 16u;
override WX: u32 = 8;
override WY: u32 = 8;

struct Dims { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

var<workgroup> lhs: array<f32, TM * WY * BK>;  // [BM][BK]
var<workgroup> rhs: array<f32, BK * TN * WX>;  // [BK][BN]

// Zero past K, where the sum ends. Rows past M and columns past N may hold anything: they reach only elements of y that are
// never written.
fn x_at(i: u32, k: u32) -> f32 {
  if (k < d.K) { return x[i * d.K + k]; }
  return 0.0;
}

fn w_at(k: u32, j: u32) -> f32 {
  if (k < d.K) { return w[k * d.N + j]; }
  return 0.0;
}

@compute @workgroup_size(WX, WY)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_id) t: vec3u) {
  let BM = TM * WY;
  let BN = TN * WX;
  let thread = t.y * WX + t.x;
  var acc: array<array<f32, TN>, TM>;
  var left: array<f32, TM>;
  var right: array<f32, TN>;

  for (var k0 = 0u; k0 < d.K; k0 += BK) {
    for (var e = thread; e < BM * BK; e += WX * WY) { lhs[e] = x_at(tile.y * BM + e / BK, k0 + e % BK); }
    for (var e = thread; e < BK * BN; e += WX * WY) { rhs[e] = w_at(k0 + e / BN, tile.x * BN + e % BN); }
    workgroupBarrier();
    for (var k = 0u; k < BK; k += 1u) {
      for (var i = 0u; i < TM; i++) { left[i] = lhs[(t.y * TM + i) * BK + k]; }
      for (var j = 0u; j < TN; j++) { right[j] = rhs[k * BN + t.x * TN + j]; }
      for (var i = 0u; i < TM; i++) {
        for (var j = 0u; j < TN; j++) { acc[i][j] += left[i] * right[j]; }
      }
    }
    workgroupBarrier();
  }

  let i0 = tile.y * BM + t.y * TM;
  let j0 = tile.x * BN + t.x * TN;
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN; j++) {
      if (i0 + i < d.M && j0 + j < d.N) { y[(i0 + i) * d.N + j0 + j] = acc[i][j]; }
    }
  }
}
