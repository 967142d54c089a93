// y = s·(x·w + c·u·b)          for "nn" and "tn": the columns of w lie side by side
//   x [M,K], or [K,M] if X_T     w [K,N]     u [M,R]     b [R,N]     y [M,N]     row-major, f32, any size
//
// For adapters that run on a CPU, where workgroup memory and barriers cost and threads are the lanes of vector registers. A thread
// owns TM × TN elements of y and nothing is shared. Its columns lie LANES apart, so that the lanes of one load read one stretch of
// w, while all lanes read the same element of x: a load each, where four columns side by side would make it a gather.

const TM: u32 = 4u;
const TN: u32 = 4u;
const LANES: u32 = 4u;
const FOUR: u32 = 4u;
override X_T: u32 = 0;
override LOW_RANK: u32 = 1;  // 0 where R is 0: half as much to compile

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

fn w1(at: u32) -> f32 { return w[at]; }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_id) lane: vec3u) {
  let x_k = select(1u, d.M, X_T == 1u);  // elements from one k to the next
  var start: array<u32, TM>;              // k = 0 of each row of x
  var column: array<u32, TN>;
  var acc: array<array<f32, TN>, TM>;
  var right: array<f32, TN>;

  // Rows and columns past the end repeat the last one and are not written.
  for (var i = 0u; i < TM; i++) {
    start[i] = tile.z * d.x_batch + min(tile.y * TM + i, d.M - 1u) * select(d.K, 1u, X_T == 1u);
  }
  for (var j = 0u; j < TN; j++) { column[j] = min((tile.x * TN + j) * LANES + lane.x, d.N - 1u); }
  for (var k0 = 0u; k0 < d.K; k0 += FOUR) {
    for (var q = 0u; q < FOUR; q++) {
      let k = min(k0 + q, d.K - 1u);
      let counts = k0 + q < d.K;  // the last round may overshoot
      for (var j = 0u; j < TN; j++) { right[j] = select(0.0, w1(tile.z * d.w_batch + k * d.N + column[j]), counts); }
      for (var i = 0u; i < TM; i++) {
        let left = select(0.0, x[start[i] + k * x_k], counts);
        for (var j = 0u; j < TN; j++) { acc[i][j] += left * right[j]; }
      }
    }
  }
  if (LOW_RANK == 1u) {
    for (var r = 0u; r < d.R; r++) {
      for (var j = 0u; j < TN; j++) { right[j] = d.c * b[r * d.N + column[j]]; }
      for (var i = 0u; i < TM; i++) {
        let left = u[min(tile.y * TM + i, d.M - 1u) * d.R + r];
        for (var j = 0u; j < TN; j++) { acc[i][j] += left * right[j]; }
      }
    }
  }
  for (var i = 0u; i < TM; i++) {
    let row = tile.y * TM + i;
    for (var j = 0u; j < TN; j++) {
      if (row < d.M && (tile.x * TN + j) * LANES + lane.x < d.N) {
        y[(tile.z * d.M + row) * d.N + column[j]] = finish(d.s * acc[i][j], tile.z * d.M + row, column[j]);
      }
    }
  }
}
