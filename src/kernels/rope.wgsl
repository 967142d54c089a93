// (y₁, y₂) = (x₁·cos − x₂·sin, x₂·cos + x₁·sin)        RoPE: arXiv:2104.09864; pairs (i, i + D/2), as Hugging Face pairs them
//   x, y [B,T,H,D]   cos, sin [P,D/2]   sign −1 turns back: the gradient     f32; a thread owns one pair

override WG: u32 = 64;

struct Dims { n: u32, T: u32, H: u32, D: u32, offset: u32, sign: f32 }  // n pairs; position of row t is offset + t
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> cosines: array<f32>;
@group(0) @binding(3) var<storage, read> sines: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let pair = id.x + id.y * groups.x * WG;
  if (pair >= d.n) { return; }
  let half = d.D / 2u;
  let i = pair % half;
  let row = pair / half;
  let position = d.offset + row / d.H % d.T;
  let c = cosines[position * half + i];
  let s = d.sign * sines[position * half + i];
  let first = row * d.D + i;
  let x1 = x[first];
  let x2 = x[first + half];
  y[first] = x1 * c - x2 * s;
  y[first + half] = x2 * c + x1 * s;
}
