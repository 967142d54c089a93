// y = x·w        x [M,K]   w [K,N]   y [M,N]      f32, row-major, any size; x and w bound in multiples of 16 bytes
//
// Rung 5. The tile and the registers of rung 4, moved four elements at a time.
//
// Both tiles lie in workgroup memory K-major, as vec4 along M and along N, so a step of k reads one row of each. The
// tile of w is in that order already. x is not: a thread reads 4×4 of its elements, turns them in registers, and writes
// them as four vec4. (A transposed x would not need turning, a transposed w would: the inner loop is the same for every
// layout.)
//
// Fragments are interleaved. A thread's 8 rows are two groups of 4, one in each half of the tile, and so are its 8
// columns: neighbouring lanes read neighbouring vec4. t.x = 0…7 reads 32 words side by side, one from each of 32 banks,
// and the 4 values of t.y in a subgroup read 16 words side by side: no conflicts, where rung 4 took three passes per
// load.
//
// Per multiply-add: as many words as rung 4 (1/4 from workgroup memory, 1/32 from global) by a quarter of the
// instructions: 4 vec4 loads for 64 multiply-adds, 1/16, and 1/128 from global memory. The gain is in workgroup memory;
// a cache line is fetched whole either way, and vec4 loads of the activations gave only 1–2 % on an M4 Pro
// (pytorch/executorch PR 20882). What still collides, 4 ways, is the turned x on its way in: 4 stores per thread for
// every 64 loads. Where K or N is no multiple of 4, rows begin within a vec4 and each load from global memory is two.
//
// Next limit: waiting. A workgroup loads, waits, computes, waits; only another workgroup on the same core fills the
// gaps. And one size does not fit all: a 64×64 tile wastes most of itself on 5 rows, and leaves a large GPU idle where
// y has few tiles. The shipped kernel, src/kernels/matmul-tiled.wgsl, goes on from here: other layouts, and a tile
// chosen for device and shape.

const TM: u32 = 8u;
const TN: u32 = 8u;
const TM4: u32 = TM / 4u;
const TN4: u32 = TN / 4u;
const BK: u32 = 16u;
const QUAD: u32 = 4u;
override WX: u32 = 8;
override WY: u32 = 8;

struct Dims { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<vec4f>;
@group(0) @binding(2) var<storage, read> w: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

var<workgroup> lhs: array<vec4f, BK * TM4 * WY>;  // [BK][BM / 4]
var<workgroup> rhs: array<vec4f, BK * TN4 * WX>;  // [BK][BN / 4]

// Four elements from the r-th of `a` on, where `b` follows `a`.
fn shift(a: vec4f, b: vec4f, r: u32) -> vec4f {
  if (r == 1u) { return vec4f(a.yzw, b.x); }
  if (r == 2u) { return vec4f(a.zw, b.xy); }
  return vec4f(a.w, b.xyz);
}

// x[i, k…k+3] and w[k, j…j+3]. Zeros past K, where the sum ends; rows past M and columns past N may hold anything.
fn x_four(i: u32, k: u32) -> vec4f {
  let at = i * d.K + k;
  var four = x[at / 4u];
  if (at % 4u != 0u) { four = shift(four, x[at / 4u + 1u], at % 4u); }
  return select(vec4f(), four, vec4u(k, k + 1u, k + 2u, k + 3u) < vec4u(d.K));
}

fn w_four(k: u32, j: u32) -> vec4f {
  if (k >= d.K) { return vec4f(); }
  let at = k * d.N + j;
  if (at % 4u == 0u) { return w[at / 4u]; }
  return shift(w[at / 4u], w[at / 4u + 1u], at % 4u);
}

@compute @workgroup_size(WX, WY)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_id) t: vec3u) {
  let BM4 = TM4 * WY;
  let BN4 = TN4 * WX;
  let i0 = tile.y * BM4 * 4u;
  let j0 = tile.x * BN4 * 4u;
  let thread = t.y * WX + t.x;
  var acc: array<array<vec4f, TN4>, TM>;
  var left: array<vec4f, TM4>;
  var right: array<vec4f, TN4>;

  for (var k0 = 0u; k0 < d.K; k0 += BK) {
    for (var e = thread; e < BM4 * BK / 4u; e += WX * WY) {
      let k = e % (BK / 4u) * 4u;  // first along K, so that lanes side by side read one row of x
      let i4 = e / (BK / 4u);
      let i = i0 + 4u * i4;
      let rows = mat4x4f(x_four(i, k0 + k), x_four(i + 1u, k0 + k), x_four(i + 2u, k0 + k), x_four(i + 3u, k0 + k));
      let turned = transpose(rows);
      for (var q = 0u; q < QUAD; q++) { lhs[(k + q) * BM4 + i4] = turned[q]; }
    }
    for (var e = thread; e < BK * BN4; e += WX * WY) { rhs[e] = w_four(k0 + e / BN4, j0 + e % BN4 * 4u); }
    workgroupBarrier();
    for (var k = 0u; k < BK; k += 1u) {
      for (var i = 0u; i < TM4; i++) { left[i] = lhs[k * BM4 + i * WY + t.y]; }
      for (var j = 0u; j < TN4; j++) { right[j] = rhs[k * BN4 + j * WX + t.x]; }
      for (var i = 0u; i < TM4; i++) {
        for (var q = 0u; q < QUAD; q++) {
          for (var j = 0u; j < TN4; j++) { acc[4u * i + q][j] += left[i][q] * right[j]; }
        }
      }
    }
    workgroupBarrier();
  }

  for (var i = 0u; i < TM4; i++) {
    for (var q = 0u; q < QUAD; q++) {
      for (var j = 0u; j < TN4; j++) {
        let row = i0 + 4u * (i * WY + t.y) + q;
        let column = j0 + 4u * (j * WX + t.x);
        for (var p = 0u; p < QUAD; p++) {
          if (row < d.M && column + p < d.N) { y[row * d.N + column + p] = acc[4u * i + q][j][p]; }
        }
      }
    }
  }
}
