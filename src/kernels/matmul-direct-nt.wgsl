// y = s·(x·wᵀ + c·u·bᵀ)        for "nt": the rows of x and of w both run along k
//   x [M,K]     w [N,K]     u [M,R]     b [N,R]     y [M,N]     row-major, f32, any size
//
// The twin of matmul-direct.wgsl for CPU adapters. Here the lanes of a load must run along k, so the LANES threads of a workgroup
// own the same TM × TN elements of y, each sums every LANES-th k, and workgroup memory adds them up once at the end.

const TM: u32 = 4u;
const TN: u32 = 4u;
const LANES: u32 = 4u;
const TILE: u32 = TM * TN;
override LOW_RANK: u32 = 1;  // 0 where R is 0: less to compile

struct Dims {
  M: u32, N: u32, K: u32, R: u32,
  s: f32, c: f32,
  x_batch: u32, w_batch: u32,  // elements from one batch to the next; 0 repeats the operand
  group_bits: u32,                  // 2^group_bits elements of w share a scale: parts/weight-*.wgsl
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<Stored>;
@group(0) @binding(3) var<storage, read> u: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

alias Stored = f32;

var<workgroup> sums: array<f32, TILE * LANES>;

fn w1(at: u32) -> f32 { return w[at]; }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_id) lane: vec3u) {
  var row: array<u32, TM>;
  var column: array<u32, TN>;
  var acc: array<array<f32, TN>, TM>;
  var left: array<f32, TM>;

  // Rows and columns past the end repeat the last one and are not written.
  for (var i = 0u; i < TM; i++) { row[i] = min(tile.y * TM + i, d.M - 1u); }
  for (var j = 0u; j < TN; j++) { column[j] = min(tile.x * TN + j, d.N - 1u); }
  for (var k = lane.x; k < d.K; k += LANES) {
    for (var i = 0u; i < TM; i++) { left[i] = x[tile.z * d.x_batch + row[i] * d.K + k]; }
    for (var j = 0u; j < TN; j++) {
      let right = w1(tile.z * d.w_batch + column[j] * d.K + k);
      for (var i = 0u; i < TM; i++) { acc[i][j] += left[i] * right; }
    }
  }
  if (LOW_RANK == 1u) {
    for (var r = lane.x; r < d.R; r += LANES) {
      for (var i = 0u; i < TM; i++) { left[i] = d.c * u[row[i] * d.R + r]; }
      for (var j = 0u; j < TN; j++) {
        let right = b[column[j] * d.R + r];
        for (var i = 0u; i < TM; i++) { acc[i][j] += left[i] * right; }
      }
    }
  }
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN; j++) { sums[(i * TN + j) * LANES + lane.x] = acc[i][j]; }
  }
  workgroupBarrier();
  for (var e = lane.x; e < TILE; e += LANES) {
    var sum = 0.0;
    for (var n = 0u; n < LANES; n++) { sum += sums[e * LANES + n]; }
    let i = tile.y * TM + e / TN;
    let j = tile.x * TN + e % TN;
    if (i < d.M && j < d.N) { y[(tile.z * d.M + i) * d.N + j] = finish(d.s * sum, tile.z * d.M + i, j); }
  }
}
