// y = x·w        x [M,K]   w [K,N]   y [M,N]      f32, row-major, any size
//
// Rung 3. A workgroup owns a T×T tile of y. It walks along K in steps of T: its T² threads fetch one T×T tile of x and
// one of w into workgroup memory, one element of each per thread, wait for each other, and then each thread takes T
// products from there.
//
//          k →          j →
//     i  [ lhs ]    k [ rhs ]         y[i, j] += Σ lhs[i, k] · rhs[k, j]  over the T steps of this tile
//     ↓             ↓
//
// Per multiply-add: 2/T loads from global memory (1/8 at T = 16) and 2 from workgroup memory. A fetched element is used
// T times, so there are T/4 operations per byte fetched, 4 at T = 16, whatever the caches do. On an M4 Pro a 32×32 tile
// made a kernel that already had the next rung's registers 2.5 to 4 times as fast (pytorch/executorch PR 20605).
//
// Two barriers per step: the first so that no one reads a tile before it is whole, the second so that no one overwrites
// it while others still read. Both must be reached by all threads; hence no early return, and edges are zeros instead.
//
// Banks: workgroup memory gives out one word from each of (say) 32 banks at a time. 32 lanes are two rows of 16
// threads. rhs[k, t.x] is 16 words side by side, lhs[t.y, k] two words 16 banks apart, and lanes that want the same
// word share it: no conflicts.
//
// Next limit: workgroup memory. Two loads for one multiply-add, where hardware has several multiply-add units to each
// load port. (NVIDIA's: four subgroup FMAs a cycle to one subgroup load. At two loads per FMA, 7 of 8 FMA slots stay
// empty.)

override T: u32 = 16;

struct Dims { M: u32, N: u32, K: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

var<workgroup> lhs: array<f32, T * T>;
var<workgroup> rhs: array<f32, T * T>;

// Zero past K, where the sum ends. Rows past M and columns past N may hold anything: they reach only elements of y that are
// never written.
fn x_at(i: u32, k: u32) -> f32 {
  if (k < d.K) { return x[i * d.K + k]; }
  return 0.0;
}

fn w_at(k: u32, j: u32) -> f32 {
  if (k < d.K) { return w[k * d.N + j]; }
  return 0.0;
}

@compute @workgroup_size(T, T)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(local_invocation_id) t: vec3u) {
  let i = id.y;
  let j = id.x;
  var acc = 0.0;
  for (var k0 = 0u; k0 < d.K; k0 += T) {
    lhs[t.y * T + t.x] = x_at(i, k0 + t.x);
    rhs[t.y * T + t.x] = w_at(k0 + t.y, j);
    workgroupBarrier();
    for (var k = 0u; k < T; k++) { acc += lhs[t.y * T + k] * rhs[k * T + t.x]; }
    workgroupBarrier();
  }
  if (i < d.M && j < d.N) { y[i * d.N + j] = acc; }
}
