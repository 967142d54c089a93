// n_j = ‖W_j + s·(B·A)_j‖ = √(‖W_j‖² + Σ_r P_rj·B_jr),  P = 2s·A·Wᵀ + s²·(A·Aᵀ)·Bᵀ        row norms, factored: arXiv:2603.22276
//   squares [N] = ‖W_j‖²   P [R,N]   B [N,R]   m [N]   →   gain [N] = m/n, or n itself without m;  inverse [N] = 1/n     f32; a thread owns a row
//
// What rounding takes below zero is zero, and a row of nothing but zeros has a norm just above it.

override WG: u32 = 64;
override HAS_M: u32 = 1;

struct Dims { N: u32, R: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> squares: array<f32>;
@group(0) @binding(2) var<storage, read> p: array<f32>;
@group(0) @binding(3) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read> m: array<f32>;
@group(0) @binding(5) var<storage, read_write> gain: array<f32>;
@group(0) @binding(6) var<storage, read_write> inverse: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let j = id.x + id.y * groups.x * WG;
  if (j >= d.N) { return; }
  var sum = squares[j];
  for (var r = 0u; r < d.R; r++) { sum += p[r * d.N + j] * b[j * d.R + r]; }
  let norm = sqrt(max(sum, 1e-30));
  inverse[j] = 1.0 / norm;
  if (HAS_M == 1u) { gain[j] = m[j] / norm; } else { gain[j] = norm; }
}
