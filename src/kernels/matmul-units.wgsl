// y = s·(x·w + c·u·b)        in f16 on the device's matrix units, summed in f32: a subgroup multiplies UM × UK by UK × UN at a time
//   x [M,K], or [K,M] if X_T     w [K,N], or [N,K] if W_T     u [M,R]     b [R,N], or [N,R] if W_T     y [M,N]
//   row-major; x, w, u, b f16, eight to a vec4u; y f32
//
// For `chromium-experimental-subgroup-matrix`. A workgroup of WX × WY subgroups owns BM × BN elements of y, a subgroup TM × TN
// matrices of it. Nothing is checked: M and N are multiples of BM and BN, K of BK, R of 8 (of BK with BUFFERS = 0), and 0 if X_T.
//
// Both operands' share of BK steps of k is copied into workgroup memory as it is stored, 16 bytes at a time: whether a matrix
// is transposed is said when it is loaded. Each row is longer by 16 bytes, which makes it an odd number of them, so that the
// eight rows a unit takes at once lie in different banks. The next stage is fetched while this one is multiplied.
// With BUFFERS = 0 matrices are loaded straight from the operands, for devices whose caches serve that as well.
//
// Bytes per multiply-add: 2·(1/BM + 1/BN) from the operands, through L2 and L1 (128 × 128: 1/32), and 2·(1/(TM·UM) + 1/(TN·UN))
// from workgroup memory, or from L1 with BUFFERS = 0 (64 × 64 to a subgroup: 1/16). Matrices loaded per product:
// (TM + TN) / (TM·TN), which is 1/2 for 4 × 4.
enable f16;
enable chromium_experimental_subgroup_matrix;

const UM: u32 = 16u;
const UN: u32 = 16u;
const UK: u32 = 16u;
const TM: u32 = 4u;
const TN: u32 = 4u;
const WX: u32 = 2u;
const WY: u32 = 2u;
const WG: u32 = 128u;     // threads: WX × WY subgroups
const BK: u32 = 32u;
const BUFFERS: u32 = 2u;  // stages held: with two a round needs one barrier, with one it needs two
const X_T: u32 = 0u;
const W_T: u32 = 0u;

const BM: u32 = UM * TM * WY;
const BN: u32 = UN * TN * WX;
const STEPS: u32 = BK / UK;
const X_SHARE: u32 = BM * BK / 8u / WG;  // vec4u of a stage that a thread copies
const W_SHARE: u32 = BN * BK / 8u / WG;
const X_ROW = select(BK, BM, X_T == 1u) / 8u;
const W_ROW = select(BN, BK, W_T == 1u) / 8u;
const X_STAGE = select(BM, BK, X_T == 1u) * (X_ROW + 1u);
const W_STAGE = select(BK, BN, W_T == 1u) * (W_ROW + 1u);
const HELD = max(BUFFERS, 1u);

struct Dims {
  M: u32, N: u32, K: u32, R: u32,
  s: f32,
  c: f32,
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<vec4u>;
@group(0) @binding(2) var<storage, read> w: array<vec4u>;
@group(0) @binding(3) var<storage, read> u: array<vec4u>;
@group(0) @binding(4) var<storage, read> b: array<vec4u>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

alias Left = subgroup_matrix_left<f16, UK, UM>;
alias Right = subgroup_matrix_right<f16, UN, UK>;
alias Sum = subgroup_matrix_result<f32, UN, UM>;

var<workgroup> stage: array<vec4u, HELD * (X_STAGE + W_STAGE)>;

// The n-th vec4u of a stage's left operand, from row i and step k on; of u, zeros past R.
fn fetch_left(n: u32, i: u32, k: u32, is_low: bool) -> vec4u {
  let at = vec2u(n / X_ROW, n % X_ROW);
  if (is_low) {
    if (k / 8u + at.y >= d.R / 8u) { return vec4u(); }
    return u[(i + at.x) * (d.R / 8u) + k / 8u + at.y];
  }
  if (X_T == 1u) { return x[(k + at.x) * (d.M / 8u) + i / 8u + at.y]; }
  return x[(i + at.x) * (d.K / 8u) + k / 8u + at.y];
}

fn fetch_right(n: u32, j: u32, k: u32, is_low: bool) -> vec4u {
  let at = vec2u(n / W_ROW, n % W_ROW);
  if (is_low) {
    if (k + select(at.x, 8u * at.y, W_T == 1u) >= d.R) { return vec4u(); }
    if (W_T == 1u) { return b[(j + at.x) * (d.R / 8u) + k / 8u + at.y]; }
    return b[(k + at.x) * (d.N / 8u) + j / 8u + at.y];
  }
  if (W_T == 1u) { return w[(j + at.x) * (d.K / 8u) + k / 8u + at.y]; }
  return w[(k + at.x) * (d.N / 8u) + j / 8u + at.y];
}

// Places and strides of a matrix count elements of the array it is loaded from: vec4u.
fn staged_left(stage_at: u32, i: u32, k: u32) -> Left {
  const STRIDE = X_ROW + 1u;
  if (X_T == 1u) { return subgroupMatrixLoad<Left, col_major>(&stage, stage_at + k * STRIDE + i / 8u, STRIDE); }
  return subgroupMatrixLoad<Left, row_major>(&stage, stage_at + i * STRIDE + k / 8u, STRIDE);
}

fn staged_right(stage_at: u32, k: u32, j: u32) -> Right {
  const STRIDE = W_ROW + 1u;
  if (W_T == 1u) { return subgroupMatrixLoad<Right, col_major>(&stage, stage_at + X_STAGE + j * STRIDE + k / 8u, STRIDE); }
  return subgroupMatrixLoad<Right, row_major>(&stage, stage_at + X_STAGE + k * STRIDE + j / 8u, STRIDE);
}

fn stored_left(i: u32, k: u32, is_low: bool) -> Left {
  if (is_low) { return subgroupMatrixLoad<Left, row_major>(&u, (i * d.R + k) / 8u, d.R / 8u); }
  if (X_T == 1u) { return subgroupMatrixLoad<Left, col_major>(&x, (k * d.M + i) / 8u, d.M / 8u); }
  return subgroupMatrixLoad<Left, row_major>(&x, (i * d.K + k) / 8u, d.K / 8u);
}

fn stored_right(k: u32, j: u32, is_low: bool) -> Right {
  if (W_T == 1u) {
    if (is_low) { return subgroupMatrixLoad<Right, col_major>(&b, (j * d.R + k) / 8u, d.R / 8u); }
    return subgroupMatrixLoad<Right, col_major>(&w, (j * d.K + k) / 8u, d.K / 8u);
  }
  if (is_low) { return subgroupMatrixLoad<Right, row_major>(&b, (k * d.N + j) / 8u, d.N / 8u); }
  return subgroupMatrixLoad<Right, row_major>(&w, (k * d.N + j) / 8u, d.N / 8u);
}

fn multiply_add(left: Left, right: Right, sum: Sum) -> Sum { return subgroupMatrixMultiplyAccumulate(left, right, sum); }

fn times(sum: Sum, factor: f32) -> Sum { return subgroupMatrixScalarMultiply(sum, factor); }

fn put(i: u32, j: u32, sum: Sum) { subgroupMatrixStore<row_major>(&y, i * d.N + j, sum, d.N); }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) tile: vec3u, @builtin(local_invocation_index) thread: u32, @builtin(subgroup_id) subgroup: u32) {
  let low_stages = (d.R + BK - 1u) / BK;
  let stages = low_stages + d.K / BK;
  let i0 = tile.y * BM;
  let j0 = tile.x * BN;
  let row = subgroup / WX * TM * UM;  // of this subgroup within the tile
  let column = subgroup % WX * TN * UN;
  var sum: array<array<Sum, TN>, TM>;
  var left: array<Left, TM>;
  var next_x: array<vec4u, X_SHARE>;
  var next_w: array<vec4u, W_SHARE>;

  // Each round fetches a stage and multiplies the one before it. The stages of u and b come first.
  for (var at = 0u; at <= stages; at++) {
    if (BUFFERS > 0u && at < stages) {
      let is_low = at < low_stages;
      let k = select(at - low_stages, at, is_low) * BK;
      for (var n = 0u; n < X_SHARE; n++) { next_x[n] = fetch_left(n * WG + thread, i0, k, is_low); }
      for (var n = 0u; n < W_SHARE; n++) { next_w[n] = fetch_right(n * WG + thread, j0, k, is_low); }
    }
    if (at > 0u) {
      let is_low = at <= low_stages;
      let k = select(at - 1u - low_stages, at - 1u, is_low) * BK;
      let stage_at = (at - 1u) % HELD * (X_STAGE + W_STAGE);
      for (var q = 0u; q < STEPS; q++) {
        for (var i = 0u; i < TM; i++) {
          if (BUFFERS > 0u) { left[i] = staged_left(stage_at, row + i * UM, q * UK); }
          else { left[i] = stored_left(i0 + row + i * UM, k + q * UK, is_low); }
        }
        for (var j = 0u; j < TN; j++) {
          var right: Right;
          if (BUFFERS > 0u) { right = staged_right(stage_at, q * UK, column + j * UN); }
          else { right = stored_right(k + q * UK, j0 + column + j * UN, is_low); }
          for (var i = 0u; i < TM; i++) { sum[i][j] = multiply_add(left[i], right, sum[i][j]); }
        }
      }
      if (at == low_stages) {
        for (var i = 0u; i < TM; i++) {
          for (var j = 0u; j < TN; j++) { sum[i][j] = times(sum[i][j], d.c); }
        }
      }
    }
    if (BUFFERS == 1u) { workgroupBarrier(); }
    if (BUFFERS > 0u && at < stages) {
      let to = at % HELD * (X_STAGE + W_STAGE);
      for (var n = 0u; n < X_SHARE; n++) {
        let m = n * WG + thread;
        stage[to + m / X_ROW * (X_ROW + 1u) + m % X_ROW] = next_x[n];
      }
      for (var n = 0u; n < W_SHARE; n++) {
        let m = n * WG + thread;
        stage[to + X_STAGE + m / W_ROW * (W_ROW + 1u) + m % W_ROW] = next_w[n];
      }
    }
    if (BUFFERS > 0u) { workgroupBarrier(); }
  }

  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN; j++) { put(i0 + row + i * UM, j0 + column + j * UN, times(sum[i][j], d.s)); }
  }
}
