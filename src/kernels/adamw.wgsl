// AdamW        Loshchilov and Hutter, arXiv:1711.05101, alg. 2, in the form and order of torch.optim.AdamW
//   g ← clip[1]·g
//   p ← (1 − lr·λ)·p
//   m ← m + (1 − β₁)·(g − m)
//   v ← β₂·v + (1 − β₂)·g²
//   p ← p − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
//   p, g, m, v [n]   clip [2] = norm, factor   f32; p, m and v are updated in place
//   where the norm is not finite nothing is: one bad step must not spoil the parameters
//
// 1 − β and the bias corrections come from the host, worked out in f64: 1 − 0.999 in f32 is off by 5e-5.

override WG: u32 = 64;

struct Dims {
  n: u32,
  decay: f32,        // 1 − lr·λ
  rest1: f32,        // 1 − β₁
  beta2: f32,
  rest2: f32,        // 1 − β₂
  step_size: f32,    // lr / (1 − β₁ᵗ)
  correction: f32,   // √(1 − β₂ᵗ)
  eps: f32,
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> g: array<f32>;
@group(0) @binding(2) var<storage, read> clip: array<f32>;
@group(0) @binding(3) var<storage, read_write> p: array<f32>;
@group(0) @binding(4) var<storage, read_write> m: array<f32>;
@group(0) @binding(5) var<storage, read_write> v: array<f32>;

// By its bits: compilers may take for granted that there is no NaN.
fn is_finite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n || !is_finite(clip[0])) { return; }
  let g_i = clip[1] * g[i];
  let m_i = m[i] + d.rest1 * (g_i - m[i]);
  let v_i = d.beta2 * v[i] + d.rest2 * g_i * g_i;
  m[i] = m_i;
  v[i] = v_i;
  p[i] = d.decay * p[i] - d.step_size * (m_i / (sqrt(v_i) / d.correction + d.eps));
}
