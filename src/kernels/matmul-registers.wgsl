// y = s·(x·w + c·u·b)          the same product as matmul-tiled.wgsl, without workgroup memory
//   x [M,K], or [K,M] if X_T     w [K,N], or [N,K] if W_T     u [M,R]     b [R,N], or [N,R] if W_T     y [M,N]
//   row-major, f32; the rows of x, w and y hold multiples of 4 elements (parts/ragged-*.wgsl take all others)
//
// For devices whose caches serve what neighbouring threads share: some GPUs, and CPU adapters that move a vec4 at once. A thread owns
// TM × TN elements of y and takes four steps of k at a time, so every value it reads is used TN (or TM) times. A transposed operand
// is turned in registers, so all layouts share one inner loop.

const TM: u32 = 4u;
const TN: u32 = 4u;
const TM4: u32 = (TM + 3u) / 4u;
const TN4: u32 = TN / 4u;
const FOUR: u32 = 4u;
const WX: u32 = 8u;
const WY: u32 = 8u;
override X_T: u32 = 0;
override W_T: u32 = 0;
override LOW_RANK: u32 = 1;  // 0 where R is 0: less to compile

struct Dims {
  M: u32, N: u32, K: u32, R: u32,
  s: f32, c: f32,
  x_batch: u32, w_batch: u32,  // elements from one batch to the next; 0 repeats the operand
  group_bits: u32,             // 2^group_bits elements of w share a scale: parts/weight-*.wgsl
  block: u32, block_size: u32, // of columns: parts/blocked.wgsl
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

var<private> x0: u32;
var<private> w0: u32;

fn x_at(row: u32, column: u32) -> u32 { return x0 + row * select(d.K, d.M, X_T == 1u) + column; }

fn y_at(row: u32, column: u32) -> u32 { return row * d.N + column; }

// Four elements of row-major x or w from (row, column) on; zeros past the last k. Rows of x (columns of w) past the end repeat
// earlier ones and are not written.
fn x4(row: u32, column: u32) -> vec4f {
  if (X_T == 1u) { return select(vec4f(), x[x_at(min(row, d.K - 1u), min(column, d.M - 4u)) / 4u], row < d.K); }
  return x[x_at(min(row, d.M - 1u), column) / 4u];
}

fn w4(row: u32, column: u32) -> vec4f {
  if (W_T == 1u) { return widen((w0 + min(row, d.N - 1u) * d.K + column) / 4u); }
  return select(vec4f(), widen((w0 + min(row, d.K - 1u) * d.N + min(column, d.N - 4u)) / 4u), row < d.K);
}

fn widen(at: u32) -> vec4f { return w[at]; }

fn b1(k: u32, column: u32) -> f32 {
  let j = min(column, d.N - 1u);
  return b[select(k * d.N + j, j * d.R + k, W_T == 1u)];
}

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

fn store(row: u32, column: u32, value: vec4f) { y[y_at(row, column) / 4u] = value; }

@compute @workgroup_size(WX, WY)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let i0 = id.y * TM;
  let j0 = id.x * TN;
  if (i0 >= d.M || j0 >= d.N) { return; }
  x0 = id.z * d.x_batch;
  w0 = id.z * d.w_batch;
  var acc: array<array<vec4f, TN4>, TM>;
  // left[i / 4][i % 4]: four steps of row i. right[k][j / 4]: four columns at step k.
  var left: array<array<vec4f, FOUR>, TM4>;
  var right: array<array<vec4f, TN4>, FOUR>;

  for (var k = 0u; k < d.K; k += 4u) {
    for (var i = 0u; i < TM4; i++) {
      let row = i0 + 4u * i;
      if (X_T == 1u) {
        let turned = transpose(mat4x4f(x4(k, row), x4(k + 1u, row), x4(k + 2u, row), x4(k + 3u, row)));
        for (var q = 0u; q < FOUR; q++) { left[i][q] = turned[q]; }
      } else {
        for (var q = 0u; q < FOUR; q++) {
          if (4u * i + q < TM) { left[i][q] = x4(row + q, k); }
        }
      }
    }
    for (var j = 0u; j < TN4; j++) {
      let column = j0 + 4u * j;
      if (W_T == 1u) {
        let turned = transpose(mat4x4f(w4(column, k), w4(column + 1u, k), w4(column + 2u, k), w4(column + 3u, k)));
        for (var q = 0u; q < FOUR; q++) { right[q][j] = turned[q]; }
      } else {
        for (var q = 0u; q < FOUR; q++) { right[q][j] = w4(k + q, column); }
      }
    }
    for (var q = 0u; q < FOUR; q++) {
      for (var i = 0u; i < TM; i++) {
        for (var j = 0u; j < TN4; j++) { acc[i][j] += left[i / 4u][i % 4u][q] * right[q][j]; }
      }
    }
  }
  if (LOW_RANK == 1u) {
    for (var k = 0u; k < d.R; k++) {
      for (var j = 0u; j < TN4; j++) {
        let column = j0 + 4u * j;
        for (var q = 0u; q < FOUR; q++) { right[0][j][q] = d.c * b1(k, column + q); }
      }
      for (var i = 0u; i < TM; i++) {
        let low = u[min(i0 + i, d.M - 1u) * d.R + k];
        for (var j = 0u; j < TN4; j++) { acc[i][j] += low * right[0][j]; }
      }
    }
  }
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN4; j++) {
      let column = j0 + 4u * j;
      if (i0 + i < d.M && column < d.N) {
        let to = id.z * d.M + i0 + i;
        for (var q = 0u; q < FOUR; q++) { acc[i][j][q] = finish(d.s * acc[i][j][q], to, column + q); }
        store(to, column, acc[i][j]);
      }
    }
  }
}
