// y = s·x·w + c·u·b        the same product as matmul.wgsl, one thread per element of y, any size
//   x [M,K], or [K,M] if X_T     w [K,N], or [N,K] if W_T     u [M,R]     b [R,N], or [N,R] if W_T     y [M,N]

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
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read> u: array<f32>;
@group(0) @binding(4) var<storage, read> b: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WX, WY)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let i = id.y;
  let j = id.x;
  if (i >= d.M || j >= d.N) { return; }
  let x0 = id.z * d.x_batch;
  let w0 = id.z * d.w_batch;
  var base = 0.0;
  for (var k = 0u; k < d.K; k++) {
    base += x[x0 + select(i * d.K + k, k * d.M + i, X_T == 1u)] * w[w0 + select(k * d.N + j, j * d.K + k, W_T == 1u)];
  }
  var low_rank = 0.0;
  for (var k = 0u; k < d.R; k++) {
    low_rank += u[i * d.R + k] * b[select(k * d.N + j, j * d.R + k, W_T == 1u)];
  }
  y[(id.z * d.M + i) * d.N + j] = d.s * base + d.c * low_rank;
}
