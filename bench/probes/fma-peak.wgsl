// y = Σ x, each x ← a·x + b, N times        the most f32 multiply-adds that a device does in a second
//   y [n]   f32
//
// A thread keeps CHAINS vec4s. No chain waits for another, so that the latency of one hides behind the rest; STEPS steps are
// written out between two tests of the loop. a and b arrive as uniforms and the start values differ by thread and chain, so that
// no compiler can know the sums beforehand. They have a closed form, aᴺ·x₀ + b·(1 − aᴺ) / (1 − a), and are checked against it.
// 8 · CHAINS · N operations per thread; N must be a multiple of STEPS.

override WG: u32 = 64;
override FUSED: u32 = 1; // 1: fma(a, x, b); 0: a·x + b, which a compiler may fuse
const CHAINS: u32 = 8;
const STEPS: u32 = 16;

struct Dims { n: u32, N: u32, a: f32, b: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u) {
  let a = vec4f(d.a);
  let b = vec4f(d.b);
  var x: array<vec4f, CHAINS>;
  for (var c = 0u; c < CHAINS; c++) {
    x[c] = (vec4f(1, 2, 3, 4) + f32(4u * c)) / 64 + f32(id.x % 256u) / 256;
  }
  var left = d.N;
  while (left > 0u) {
    for (var s = 0u; s < STEPS; s++) {
      for (var c = 0u; c < CHAINS; c++) {
        if (FUSED == 1u) { x[c] = fma(a, x[c], b); } else { x[c] = a * x[c] + b; }
      }
    }
    left -= STEPS;
  }
  var sum = vec4f(0);
  for (var c = 0u; c < CHAINS; c++) {
    sum += x[c];
  }
  if (id.x < d.n) { y[id.x] = dot(sum, vec4f(1)); }
}
