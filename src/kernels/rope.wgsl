// (y₁, y₂) = (x₁·cos − x₂·sin, x₂·cos + x₁·sin)        RoPE: arXiv:2104.09864; pairs (i, i + E/2), as Hugging Face pairs them
//   x, y [B,T,H,D]   cos, sin [P,E/2]   positions [B,T], if GIVEN   sign −1 turns back: the gradient     f32
// The first E elements of a head are turned, the others stay. A thread owns one lane of pairs, or of what stays.

override WG: u32 = 64;
override GIVEN: u32 = 0;

// n threads; a row at position offset + t has `half` lanes of pairs and is `width` lanes wide
struct Dims { n: u32, T: u32, H: u32, half: u32, width: u32, offset: u32, sign: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read> cosines: array<Lane>;
@group(0) @binding(3) var<storage, read> sines: array<Lane>;
@group(0) @binding(4) var<storage, read> positions: array<i32>;
@group(0) @binding(5) var<storage, read_write> y: array<Lane>;

alias Lane = f32;  // parts/four-lanes.wgsl

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let pair = id.x + id.y * groups.x * WG;
  if (pair >= d.n) { return; }
  let threads = d.width - d.half;
  let i = pair % threads;
  let row = pair / threads;
  let first = row * d.width + i;
  if (i >= d.half) {
    y[first + d.half] = x[first + d.half];
    return;
  }
  var position = d.offset + row / d.H % d.T;
  if (GIVEN == 1u) { position = u32(positions[row / d.H]); }
  let c = cosines[position * d.half + i];
  let s = d.sign * sines[position * d.half + i];
  let x1 = x[first];
  let x2 = x[first + d.half];
  y[first] = x1 * c - x2 * s;
  y[first + d.half] = x2 * c + x1 * s;
}
