// y = s·(x·w + c·u·b)          the same product as matmul-tiled.wgsl, without workgroup memory
//   x [M,K], or [K,M] if X_T     w [K,N], or [N,K] if W_T     u [M,R]     b [R,N], or [N,R] if W_T     y [M,N]
//   row-major, f32; the rows of x, w and y hold multiples of 4 elements (parts/ragged-*.wgsl take all others)
//
// For devices whose caches serve what neighbouring threads share: CPU adapters that move a vec4 at once. A thread owns TM × TN
// elements of y, so every value it reads is used TN (or TM) times. Four threads make a quad, two rows of tiles by two columns, and take
// eight steps of k at a time, in two halves. Each reads one half of x and of w; the other half is what its neighbour in the row has of x
// and its neighbour in the column of w (parts/quads.wgsl; without it each reads both). A transposed operand is turned in registers, so
// all layouts share one inner loop. Sums are nested so that acc is written once in eight steps: on SwiftShader a write costs as much as a
// step, and a branch in the loop doubles the time.

const TM: u32 = 4u;
const TN: u32 = 4u;
const TM4: u32 = TM / 4u;
const TN4: u32 = TN / 4u;
const FOUR: u32 = 4u;
const HALVES: u32 = 2u;
const READS: u32 = 2u;  // of the halves, by each thread
const WG: u32 = 4u;
override X_T: u32 = 0;
override W_T: u32 = 0;
override LOW_RANK: u32 = 1;  // 0 where R is 0: less to compile

struct Dims {
  M: u32, N: u32, K: u32, R: u32,
  s: f32, c: f32,
  x_batch: u32, w_batch: u32,  // elements from one batch to the next; 0 repeats the operand
  group_bits: u32,             // 2^group_bits elements of w share a scale: parts/weight-*.wgsl
  block: u32, block_size: u32, // of columns: parts/blocked.wgsl
  low: u32,                    // pairs of a row of u: parts/lora-rows.wgsl
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Left>;
@group(0) @binding(2) var<storage, read> w: array<Stored>;
@group(0) @binding(3) var<storage, read> u: array<Low>;
@group(0) @binding(4) var<storage, read> b: array<Low>;
@group(0) @binding(5) var<storage, read_write> y: array<Result>;

alias Left = vec4f;
alias Stored = vec4f;
alias Result = vec4f;
alias Low = vec4f;

var<private> x0: u32;
var<private> w0: u32;

fn x_at(row: u32, column: u32) -> u32 { return x0 + row * select(d.K, d.M, X_T == 1u) + column; }

fn y_at(row: u32, column: u32) -> u32 { return row * d.N + column; }

// Four elements of row-major x or w from (row, column) on; zeros past the last k. Rows of x (columns of w) past the end repeat
// earlier ones and are not written.
fn x4(row: u32, column: u32) -> vec4f {
  if (X_T == 1u) { return select(vec4f(), x[x_at(min(row, d.K - 1u), min(column, d.M - 4u)) / 4u], row < d.K); }
  return select(vec4f(), x[x_at(min(row, d.M - 1u), column) / 4u], column < d.K);
}

fn w4(row: u32, column: u32) -> vec4f {
  if (W_T == 1u) { return select(vec4f(), widen((w0 + min(row, d.N - 1u) * d.K + column) / 4u), column < d.K); }
  return select(vec4f(), widen((w0 + min(row, d.K - 1u) * d.N + min(column, d.N - 4u)) / 4u), row < d.K);
}

// Four elements of row-major u or b from (row, column) on; zeros past the last of R.
fn u4(row: u32, column: u32) -> vec4f { return select(vec4f(), u[(min(row, d.M - 1u) * d.R + column) / 4u], column < d.R); }

fn b4(row: u32, column: u32) -> vec4f {
  if (W_T == 1u) { return select(vec4f(), b[(min(row, d.N - 1u) * d.R + column) / 4u], column < d.R); }
  return select(vec4f(), b[(min(row, d.R - 1u) * d.N + min(column, d.N - 4u)) / 4u], row < d.R);
}

// Four rows of x by four steps of k, and four steps of k by four columns of w.
fn x44(row: u32, k: u32) -> mat4x4f {
  if (X_T == 1u) { return transpose(mat4x4f(x4(k, row), x4(k + 1u, row), x4(k + 2u, row), x4(k + 3u, row))); }
  return mat4x4f(x4(row, k), x4(row + 1u, k), x4(row + 2u, k), x4(row + 3u, k));
}

fn w44(k: u32, column: u32) -> mat4x4f {
  if (W_T == 1u) { return transpose(mat4x4f(w4(column, k), w4(column + 1u, k), w4(column + 2u, k), w4(column + 3u, k))); }
  return mat4x4f(w4(k, column), w4(k + 1u, column), w4(k + 2u, column), w4(k + 3u, column));
}

fn u44(row: u32, k: u32) -> mat4x4f {
  return d.c * mat4x4f(u4(row, k), u4(row + 1u, k), u4(row + 2u, k), u4(row + 3u, k));
}

fn b44(k: u32, column: u32) -> mat4x4f {
  if (W_T == 1u) { return transpose(mat4x4f(b4(column, k), b4(column + 1u, k), b4(column + 2u, k), b4(column + 3u, k))); }
  return mat4x4f(b4(k, column), b4(k + 1u, column), b4(k + 2u, column), b4(k + 3u, column));
}

// The second half of k: read, or the one that the neighbour has read first.
fn second_left(first: mat4x4f, both: mat4x4f) -> mat4x4f { return both; }

fn second_right(first: mat4x4f, both: mat4x4f) -> mat4x4f { return both; }

fn widen(at: u32) -> vec4f { return w[at]; }

// Four steps of k of four columns of a row.
fn plus(row: vec4f, columns: mat4x4f, sum: vec4f) -> vec4f {
  let two = fma(vec4f(row[1]), columns[1], fma(vec4f(row[0]), columns[0], sum));
  return fma(vec4f(row[3]), columns[3], fma(vec4f(row[2]), columns[2], two));
}

// What a row's own adapter makes of four finished elements, before `finish`: parts/lora-rows.wgsl.
fn adapt4(value: vec4f, row: u32, column: u32) -> vec4f { return value; }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

fn store(row: u32, column: u32, value: vec4f) { y[y_at(row, column) / 4u] = value; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let down = id.x / 2u % 2u;
  let i0 = (2u * id.y + down) * TM;
  let j0 = (id.x / 4u * 2u + id.x % 2u) * TN;
  x0 = id.z * d.x_batch;
  w0 = id.z * d.w_batch;
  let own_half = 4u * ((down + id.x) % 2u); // which is read first: neighbours differ
  var acc: array<array<vec4f, TN4>, TM>;
  // left[half][i / 4]: rows by k. right[half][j / 4]: vectors of four columns, one for each k.
  var left: array<array<mat4x4f, TM4>, HALVES>;
  var right: array<array<mat4x4f, TN4>, HALVES>;

  for (var k = 0u; k < d.K; k += 8u) {
    for (var h = 0u; h < READS; h++) {
      let from_k = k + (own_half + 4u * h) % 8u;
      for (var i = 0u; i < TM4; i++) { left[h][i] = x44(i0 + 4u * i, from_k); }
      for (var j = 0u; j < TN4; j++) { right[h][j] = w44(from_k, j0 + 4u * j); }
    }
    for (var i = 0u; i < TM4; i++) { left[1][i] = second_left(left[0][i], left[1][i]); }
    for (var j = 0u; j < TN4; j++) { right[1][j] = second_right(right[0][j], right[1][j]); }
    for (var i = 0u; i < TM; i++) {
      for (var j = 0u; j < TN4; j++) {
        acc[i][j] = plus(left[1][i / 4u][i % 4u], right[1][j], plus(left[0][i / 4u][i % 4u], right[0][j], acc[i][j]));
      }
    }
  }
  if (LOW_RANK == 1u) {
    for (var k = 0u; k < d.R; k += 4u) {
      for (var i = 0u; i < TM4; i++) { left[0][i] = u44(i0 + 4u * i, k); }
      for (var j = 0u; j < TN4; j++) { right[0][j] = b44(k, j0 + 4u * j); }
      for (var i = 0u; i < TM; i++) {
        for (var j = 0u; j < TN4; j++) { acc[i][j] = plus(left[0][i / 4u][i % 4u], right[0][j], acc[i][j]); }
      }
    }
  }
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN4; j++) {
      let column = j0 + 4u * j;
      if (i0 + i < d.M && column < d.N) {
        let to = id.z * d.M + i0 + i;
        acc[i][j] = adapt4(d.s * acc[i][j], to, column);
        for (var q = 0u; q < FOUR; q++) { acc[i][j][q] = finish(acc[i][j][q], to, column + q); }
        store(to, column, acc[i][j]);
      }
    }
  }
}
