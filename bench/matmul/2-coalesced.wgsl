// y = x·w        x [M,K]   w [K,N]   y [M,N]      f32, row-major, any size
//
// Rung 2. The same loop; only i and j have changed places, so that neighbouring lanes own neighbours in a row of y.
//
// Per multiply-add: still 2 loads from global memory. What changes is what a load of a whole subgroup costs. At each k,
// 32 lanes now read 32 elements of a row of w that lie side by side, 128 bytes: one cache line of that size, all of it
// used. The element of x that all lanes share is one line more. 2 lines instead of 33, and one instead of 32 for the
// store. No arithmetic was saved: coalescing is only about which thread does what.
//
// Next limit: there is no reuse that the program controls. Each element of x is asked for by N threads and each of w by
// M, and it is up to the caches to notice. Two load instructions for each multiply-add also keep the load units busy
// while the arithmetic units wait.

override WX: u32 = 32;
override WY: u32 = 8;

struct Dims { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WX, WY)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let i = id.y;
  let j = id.x;
  if (i >= d.M || j >= d.N) { return; }
  var acc = 0.0;
  for (var k = 0u; k < d.K; k++) { acc += x[i * d.K + k] * w[k * d.N + j]; }
  y[i * d.N + j] = acc;
}
