// y = s·(x·w + c·u·b)          LoRA is R more columns of one product: y = s·[x | c·u]·[w ; b], written once
//   x [M,K], or [K,M] if X_T     w [K,N], or [N,K] if W_T     u [M,R]     b [R,N], or [N,R] if W_T     y [M,N]
//   row-major, f32; the rows of x, w and y hold multiples of 4 elements (parts/ragged-*.wgsl take all others)
//
// For GPUs. A workgroup owns BM × BN elements of y and walks k in stages of BK: both operands' share of a stage is put into
// workgroup memory, k-major, in vec4 along M and N. It gets there in 4×4 blocks, which a transposed operand has turned in
// registers, so NN, NT and TN share the inner loop: TM/4 + TN/4 reads of a vec4 for TM × TN multiply-adds. The blocks of the next
// stage are fetched while this one is computed. A thread's own 4×4 blocks lie WX (WY) blocks apart, so that neighbouring threads
// read neighbouring vec4. Every element of y sums its k upwards whatever the tile, so all tiles give the same bits.
// Splits share out the stages of one product where y alone has too few tiles; matmul-splits.wgsl then adds their results.

const BK: u32 = 8u;
const TM: u32 = 4u;
const TN: u32 = 4u;
const WX: u32 = 8u;
const WY: u32 = 8u;
override X_T: u32 = 0;
override W_T: u32 = 0;
override LOW_RANK: u32 = 1;  // 0 where R is 0: less to compile

const TM4: u32 = TM / 4u;
const TN4: u32 = TN / 4u;
const BM4: u32 = TM4 * WY;
const BN4: u32 = TN4 * WX;
const BK4: u32 = BK / 4u;
const ROW: u32 = BM4 + BN4 + 1u;        // of one k: left, right, and one vec4 that spreads the blocks over the banks
const THREADS: u32 = WX * WY;
const BLOCKS: u32 = (BM4 + BN4) * BK4;  // in a stage
const SHARE: u32 = (BLOCKS + THREADS - 1u) / THREADS;
const FOUR: u32 = 4u;

struct Dims {
  M: u32, N: u32, K: u32, R: u32,
  s: f32, c: f32,
  x_batch: u32, w_batch: u32,  // elements from one batch to the next; 0 repeats the operand
  splits: u32,
  group_bits: u32,                  // 2^group_bits elements of w share a scale: parts/weight-*.wgsl
  block: u32, block_size: u32,      // of columns: parts/blocked.wgsl
  low: u32,                         // pairs of a row of u: parts/lora-rows.wgsl
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Left>;
@group(0) @binding(2) var<storage, read> w: array<Stored>;
@group(0) @binding(3) var<storage, read> u: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<Result>;

alias Left = vec4f;
alias Stored = vec4f;
alias Result = vec4f;
alias Staged = vec4f;  // parts/half.wgsl: vec4h

var<workgroup> stage: array<Staged, BK * ROW>;
var<private> x0: u32;
var<private> w0: u32;

fn x_at(row: u32, column: u32) -> u32 { return x0 + row * select(d.K, d.M, X_T == 1u) + column; }

fn y_at(row: u32, column: u32) -> u32 { return row * d.N + column; }

// Four elements of row-major x, w, u or b from (row, column) on; zeros outside the matrix.
fn x4(row: u32, column: u32) -> vec4f {
  let size = select(vec2u(d.M, d.K), vec2u(d.K, d.M), X_T == 1u);
  if (row >= size.x || column >= size.y) { return vec4f(); }
  return x[x_at(row, column) / 4u];
}

fn w4(row: u32, column: u32) -> vec4f {
  let size = select(vec2u(d.K, d.N), vec2u(d.N, d.K), W_T == 1u);
  if (row >= size.x || column >= size.y) { return vec4f(); }
  return widen((w0 + row * size.y + column) / 4u);
}

fn widen(at: u32) -> vec4f { return w[at]; }

fn u4(row: u32, column: u32) -> vec4f {
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) {
    if (row < d.M && column + q < d.R) { four[q] = u[row * d.R + column + q]; }
  }
  return four;
}

fn b4(row: u32, column: u32) -> vec4f {
  let size = select(vec2u(d.R, d.N), vec2u(d.N, d.R), W_T == 1u);
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) {
    if (row < size.x && column + q < size.y) { four[q] = b[row * size.y + column + q]; }
  }
  return four;
}

// Where block n of a stage lies: its four steps of k, and its four rows, or columns from BM4 on. Neighbouring blocks are
// neighbours in memory.
fn place(n: u32) -> vec2u {
  const LEFT = BM4 * BK4;
  if (n < LEFT) { return select(vec2u(n % BK4, n / BK4), vec2u(n / BM4, n % BM4), X_T == 1u); }
  return select(vec2u((n - LEFT) / BN4, BM4 + (n - LEFT) % BN4), vec2u((n - LEFT) % BK4, BM4 + (n - LEFT) / BK4), W_T == 1u);
}

// A block, one step of k to a column of the matrix: from x and w, and from u and b after the stages of K.
fn fetch(at: vec2u, tile: vec2u, stage_at: u32) -> mat4x4f {
  let base_stages = (d.K + BK - 1u) / BK;
  if (at.y < BM4) {
    let i = 4u * (tile.y * BM4 + at.y);
    if (LOW_RANK == 1u && stage_at >= base_stages) {
      let k = (stage_at - base_stages) * BK + 4u * at.x;
      return d.c * transpose(mat4x4f(u4(i, k), u4(i + 1u, k), u4(i + 2u, k), u4(i + 3u, k)));
    }
    let k = stage_at * BK + 4u * at.x;
    if (X_T == 1u) { return mat4x4f(x4(k, i), x4(k + 1u, i), x4(k + 2u, i), x4(k + 3u, i)); }
    return transpose(mat4x4f(x4(i, k), x4(i + 1u, k), x4(i + 2u, k), x4(i + 3u, k)));
  }
  let j = 4u * (tile.x * BN4 + at.y - BM4);
  if (LOW_RANK == 1u && stage_at >= base_stages) {
    let k = (stage_at - base_stages) * BK + 4u * at.x;
    if (W_T == 1u) { return transpose(mat4x4f(b4(j, k), b4(j + 1u, k), b4(j + 2u, k), b4(j + 3u, k))); }
    return mat4x4f(b4(k, j), b4(k + 1u, j), b4(k + 2u, j), b4(k + 3u, j));
  }
  let k = stage_at * BK + 4u * at.x;
  if (W_T == 1u) { return transpose(mat4x4f(w4(j, k), w4(j + 1u, k), w4(j + 2u, k), w4(j + 3u, k))); }
  return mat4x4f(w4(k, j), w4(k + 1u, j), w4(k + 2u, j), w4(k + 3u, j));
}

// What all threads do first: parts/nf4-levels.wgsl.
fn prepare(thread: u32) {}

// What a row's own adapter makes of four finished elements, before `finish`: parts/lora-rows.wgsl.
fn adapt4(value: vec4f, row: u32, column: u32) -> vec4f { return value; }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

fn store(row: u32, column: u32, value: vec4f) { y[y_at(row, column) / 4u] = value; }

@compute @workgroup_size(WX, WY)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_id) thread: vec3u, @builtin(local_invocation_index) n0: u32) {
  prepare(n0);
  x0 = tile.z / d.splits * d.x_batch;
  w0 = tile.z / d.splits * d.w_batch;
  let stages = (d.K + BK - 1u) / BK + (d.R + BK - 1u) / BK;
  let share = (stages + d.splits - 1u) / d.splits;
  let first = min(tile.z % d.splits * share, stages);
  let end = min(first + share, stages);
  var acc: array<array<vec4f, TN4>, TM>;
  var next: array<mat4x4f, SHARE>;
  var left: array<Staged, TM4>;
  var right: array<Staged, TN4>;

  // Each round fetches a stage and computes the one before it.
  for (var at = first; at <= end; at++) {
    for (var n = 0u; n < SHARE; n++) {
      if (n0 + n * THREADS < BLOCKS && at < end) { next[n] = fetch(place(n0 + n * THREADS), tile.xy, at); }
    }
    if (at > first) {
      for (var k = 0u; k < BK; k += 1u) {
        for (var i = 0u; i < TM4; i++) { left[i] = stage[k * ROW + thread.y + i * WY]; }
        for (var j = 0u; j < TN4; j++) { right[j] = stage[k * ROW + BM4 + thread.x + j * WX]; }
        for (var i = 0u; i < TM; i++) {
          for (var j = 0u; j < TN4; j++) { acc[i][j] += vec4f(left[i / 4u][i % 4u] * right[j]); }
        }
      }
    }
    workgroupBarrier();
    for (var n = 0u; n < SHARE; n++) {
      if (n0 + n * THREADS < BLOCKS && at < end) {
        let to = place(n0 + n * THREADS);
        for (var q = 0u; q < FOUR; q++) { stage[(4u * to.x + q) * ROW + to.y] = Staged(next[n][q]); }
      }
    }
    workgroupBarrier();
  }

  for (var i = 0u; i < TM; i++) {
    let row = 4u * (tile.y * BM4 + thread.y + i / 4u * WY) + i % 4u;
    for (var j = 0u; j < TN4; j++) {
      let column = 4u * (tile.x * BN4 + thread.x + j * WX);
      if (row < d.M && column < d.N) {
        let to = tile.z * d.M + row;
        acc[i][j] = adapt4(d.s * acc[i][j], to, column);
        for (var q = 0u; q < FOUR; q++) { acc[i][j][q] = finish(acc[i][j][q], to, column + q); }
        store(to, column, acc[i][j]);
      }
    }
  }
}
