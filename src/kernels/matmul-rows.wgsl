// y = s·(x·wᵀ + c·u·bᵀ)        few rows, as in decoding: the parallelism is taken from k
//   x [M,K]     w [N,K]     u [M,R]     b [N,R]     y [M,N]     row-major, f32; K a multiple of 4 (parts/ragged-*.wgsl)
//
// Such a product is bound by the bytes of w, so each of its elements is read once and used for all TM rows. A workgroup owns
// TM × TN elements of y, its threads stride along k, and their sums are added up once at the end, in a fixed order.

const TM: u32 = 1u;
const TN: u32 = 4u;
const WG: u32 = 64u;
const TILE: u32 = TM * TN;
override X_T: u32 = 0;
override W_T: u32 = 1;
override LOW_RANK: u32 = 1;  // 0 where R is 0: less to compile

struct Dims {
  M: u32, N: u32, K: u32, R: u32,
  s: f32, c: f32,
  group_bits: u32,              // 2^group_bits elements of w share a scale: parts/weight-*.wgsl
  block: u32, block_size: u32,  // of columns: parts/blocked.wgsl
  low: u32,                     // pairs of a row of u: parts/lora-rows.wgsl
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Left>;
@group(0) @binding(2) var<storage, read> w: array<Stored>;
@group(0) @binding(3) var<storage, read> u: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

alias Left = vec4f;
alias Stored = vec4f;

const x0 = 0u;
const w0 = 0u;
var<workgroup> sums: array<f32, TILE * WG>;

fn x_at(row: u32, column: u32) -> u32 { return row * d.K + column; }

fn y_at(row: u32, column: u32) -> u32 { return row * d.N + column; }

// Four elements from (row, column) on. Rows past the end repeat the last one and are not written.
fn x4(row: u32, column: u32) -> vec4f { return x[x_at(min(row, d.M - 1u), column) / 4u]; }

fn w4(row: u32, column: u32) -> vec4f { return widen((min(row, d.N - 1u) * d.K + column) / 4u); }

fn u1(row: u32, rank: u32) -> f32 { return u[min(row, d.M - 1u) * d.R + rank]; }

fn b1(row: u32, rank: u32) -> f32 { return b[min(row, d.N - 1u) * d.R + rank]; }

fn widen(at: u32) -> vec4f { return w[at]; }

// What all threads do first: parts/nf4-levels.wgsl.
fn prepare(thread: u32) {}

// What a row's own adapter makes of a finished element, before `finish`: parts/lora-rows.wgsl.
fn adapt(value: f32, row: u32, column: u32) -> f32 { return value; }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

// Adds up sums[e * WG … e * WG + WG), where each thread has put one value, into its first place.
fn add_up(thread: u32) {
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) {
      for (var e = 0u; e < TILE; e += 1u) { sums[e * WG + thread] += sums[e * WG + thread + half]; }
    }
  }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_index) thread: u32) {
  prepare(thread);
  var acc: array<array<f32, TN>, TM>;
  var left: array<vec4f, TM>;
  var low: array<f32, TM>;
  for (var k = 4u * thread; k < d.K; k += 4u * WG) {
    for (var i = 0u; i < TM; i++) { left[i] = x4(tile.y * TM + i, k); }
    for (var j = 0u; j < TN; j++) {
      let right = w4(tile.x * TN + j, k);
      for (var i = 0u; i < TM; i++) { acc[i][j] += dot(left[i], right); }
    }
  }
  if (LOW_RANK == 1u) {
    for (var r = thread; r < d.R; r += WG) {
      for (var i = 0u; i < TM; i++) { low[i] = d.c * u1(tile.y * TM + i, r); }
      for (var j = 0u; j < TN; j++) {
        let right = b1(tile.x * TN + j, r);
        for (var i = 0u; i < TM; i++) { acc[i][j] += low[i] * right; }
      }
    }
  }
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN; j++) { sums[(i * TN + j) * WG + thread] = acc[i][j]; }
  }
  add_up(thread);
  workgroupBarrier();
  for (var e = thread; e < TILE; e += WG) {
    let i = tile.y * TM + e / TN;
    let j = tile.x * TN + e % TN;
    if (i < d.M && j < d.N) { y[y_at(i, j)] = finish(adapt(d.s * sums[e * WG], i, j), i, j); }
  }
}
