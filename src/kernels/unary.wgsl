// y = f(x), or y = dy · f′(x) if BACKWARD        elementwise
//   silu(x) = x·σ(x)                                            Elfwing et al., arXiv:1702.03118
//   gelu(x) = x·Φ(x) = x/2·(1 + erf(x/√2))                      Hendrycks and Gimpel, arXiv:1606.08415
//   gelu by tanh = x/2·(1 + tanh u) = x·σ(2u),  u = √(2/π)·(x + 0.044715·x³)
//   tanh(x) = 2·σ(2x) − 1
//   x, dy, y [n]   f32
//
// Arguments are clamped where f is flat already: WGSL does not say what comes of an exp that overflows.

override WG: u32 = 64;
override OP: u32 = 0;  // 0 silu, 1 gelu, 2 gelu by tanh, 3 tanh
override BACKWARD: u32 = 0;

struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

const ROOT: f32 = 0.7978845608028654;  // √(2/π)
const CUBIC: f32 = 0.044715;

fn sigmoid(z: f32) -> f32 { return 1.0 / (1.0 + exp(-clamp(z, -87.0, 87.0))); }

fn density(x: f32) -> f32 { return 0.3989422804014327 * exp(-0.5 * x * x); }

// Φ, the normal distribution, from erfc by Abramowitz and Stegun, 7.1.26: off by at most 0.75e-7.
fn normal(x: f32) -> f32 {
  let z = abs(x) * 0.7071067811865476;
  let t = 1.0 / (1.0 + 0.3275911 * z);
  let series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  let tail = 0.5 * series * exp(-z * z);
  return select(1.0 - tail, tail, x < 0.0);
}

fn activate(x: f32) -> f32 {
  let c = clamp(x, -30.0, 30.0);
  switch OP {
    case 0u: { return x * sigmoid(x); }
    case 1u: { return x * normal(c); }
    case 3u: { return 2.0 * sigmoid(2.0 * c) - 1.0; }
    default: { return x * sigmoid(2.0 * ROOT * (c + CUBIC * c * c * c)); }
  }
}

fn derivative(x: f32) -> f32 {
  let c = clamp(x, -30.0, 30.0);
  switch OP {
    case 0u: {
      let s = sigmoid(x);
      return s * (1.0 + x * (1.0 - s));
    }
    case 1u: { return normal(c) + c * density(c); }
    case 3u: {
      let s = sigmoid(2.0 * c);
      return 4.0 * s * (1.0 - s);
    }
    default: {
      let s = sigmoid(2.0 * ROOT * (c + CUBIC * c * c * c));
      return s + c * s * (1.0 - s) * 2.0 * ROOT * (1.0 + 3.0 * CUBIC * c * c);
    }
  }
}

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  if (BACKWARD == 1u) { y[i] = dy[i] * derivative(x[i]); } else { y[i] = activate(x[i]); }
}
