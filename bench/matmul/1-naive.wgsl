// y = x·w        x [M,K]   w [K,N]   y [M,N]      f32, row-major, any size
//
// Rung 1. One thread per element of y: a row of x times a column of w. Nothing is shared and nothing is kept.
//
// Per multiply-add: 2 loads from global memory, 8 bytes for 2 operations. That is 0.25 operations per byte; a GPU that
// does 10 TFLOP/s would need 40 TB/s to keep up. Caches catch most of it, yet each load has to be issued and waited
// for.
//
// Next limit: how lanes meet addresses. Threads next to each other in a workgroup run in lockstep as the lanes of one
// subgroup, x first, and the hardware serves a load of a subgroup one cache line at a time. Here x runs along the rows
// of y: 32 lanes want the same k of 32 rows of x, which lie K elements apart: 32 cache lines, to use 4 bytes of each.
// (Later steps of k use the rest, if the lines are still there.) The element of w that all lanes share is in a 33rd.
// The store is as scattered.

override WX: u32 = 32;
override WY: u32 = 8;

struct Dims { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WX, WY)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let i = id.x;
  let j = id.y;
  if (i >= d.M || j >= d.N) { return; }
  var acc = 0.0;
  for (var k = 0u; k < d.K; k++) { acc += x[i * d.K + k] * w[k * d.N + j]; }
  y[i * d.N + j] = acc;
}
