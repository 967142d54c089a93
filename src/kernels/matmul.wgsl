// y = s·x·w + c·u·b        a product with R more columns: LoRA's low-rank term rides along and y is written once
//   x [M,K], or [K,M] if X_T     w [K,N], or [N,K] if W_T     u [M,R]     b [R,N], or [N,R] if W_T     y [M,N]
//   all f32, row-major; the contiguous axes of x and w must be multiples of 4 (matmul-naive.wgsl takes the rest)
//
// Register tiles: a thread owns TM × TN elements of y and takes four steps of k at a time, so every value it reads is used
// TN (or TM) times. A transposed operand is turned in registers, so all layouts share one inner loop. There is no workgroup
// memory and no barrier: caches serve what neighbouring threads share. Batches lie along z.

const TM: u32 = 8u;
const TN: u32 = 8u;
const TM4: u32 = (TM + 3u) / 4u;
const TN4: u32 = TN / 4u;
const STEP: u32 = 4u;
override WX: u32 = 8;
override WY: u32 = 8;
override X_T: u32 = 0;
override W_T: u32 = 0;

struct Dims {
  M: u32, N: u32, K: u32, R: u32,
  s: f32, c: f32,
  x_batch: u32, w_batch: u32,  // elements from one batch to the next; 0 repeats the operand
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<vec4f>;
@group(0) @binding(2) var<storage, read> w: array<vec4f>;
@group(0) @binding(3) var<storage, read> u: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

// Four consecutive elements of row k of a [K, …] operand; zeros past its end, so that the last step may overshoot.
fn x_row(at: u32, k: u32) -> vec4f {
  if (k < d.K) { return x[at]; }
  return vec4f();
}

fn w_row(at: u32, k: u32) -> vec4f {
  if (k < d.K) { return w[at]; }
  return vec4f();
}

fn b_at(k: u32, j: u32) -> f32 { return b[select(k * d.N + j, j * d.R + k, W_T == 1u)]; }

@compute @workgroup_size(WX, WY)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let i0 = id.y * TM;
  let j0 = id.x * TN;
  if (i0 >= d.M || j0 >= d.N) { return; }
  let x0 = id.z * d.x_batch / 4u;
  let w0 = id.z * d.w_batch / 4u;
  let M4 = d.M / 4u;
  let N4 = d.N / 4u;
  let K4 = d.K / 4u;
  var acc: array<array<vec4f, TN4>, TM>;
  var left: array<array<vec4f, STEP>, TM4>;   // left[i / 4][i % 4]: four steps of row i
  var right: array<array<vec4f, TN4>, STEP>;  // right[k][j / 4]: four columns at step k

  // Rows past M and columns past N may hold anything: they reach only elements of y that are never written.
  for (var k = 0u; k < d.K; k += STEP) {
    for (var i = 0u; i < TM4; i++) {
      if (X_T == 1u) {
        let at = x0 + k * M4 + i0 / 4u + i;
        let turned = transpose(mat4x4f(x_row(at, k), x_row(at + M4, k + 1u), x_row(at + 2u * M4, k + 2u), x_row(at + 3u * M4, k + 3u)));
        for (var q = 0u; q < STEP; q++) { left[i][q] = turned[q]; }
      } else {
        for (var q = 0u; q < STEP; q++) { left[i][q] = x[x0 + (i0 + 4u * i + q) * K4 + k / 4u]; }
      }
    }
    for (var j = 0u; j < TN4; j++) {
      if (W_T == 1u) {
        let at = w0 + (j0 + 4u * j) * K4 + k / 4u;
        let turned = transpose(mat4x4f(w[at], w[at + K4], w[at + 2u * K4], w[at + 3u * K4]));
        for (var q = 0u; q < STEP; q++) { right[q][j] = turned[q]; }
      } else {
        for (var q = 0u; q < STEP; q++) { right[q][j] = w_row(w0 + (k + q) * N4 + j0 / 4u + j, k + q); }
      }
    }
    for (var q = 0u; q < STEP; q++) {
      for (var i = 0u; i < TM; i++) {
        for (var j = 0u; j < TN4; j++) { acc[i][j] += left[i / 4u][i % 4u][q] * right[q][j]; }
      }
    }
  }
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN4; j++) { acc[i][j] *= d.s; }
  }
  for (var k = 0u; k < d.R; k++) {
    for (var j = 0u; j < TN4; j++) {
      let column = j0 + 4u * j;
      right[0][j] = d.c * vec4f(b_at(k, column), b_at(k, column + 1u), b_at(k, column + 2u), b_at(k, column + 3u));
    }
    for (var i = 0u; i < TM; i++) {
      let u_ik = u[(i0 + i) * d.R + k];
      for (var j = 0u; j < TN4; j++) { acc[i][j] += u_ik * right[0][j]; }
    }
  }
  for (var i = 0u; i < TM; i++) {
    if (i0 + i < d.M) {
      let row = (id.z * d.M + i0 + i) * d.N + j0;
      for (var j = 0u; j < TN4; j++) {
        for (var q = 0u; q < STEP; q++) {
          if (j0 + 4u * j + q < d.N) { y[row + 4u * j + q] = acc[i][j][q]; }
        }
      }
    }
  }
}
