// v = s·Σ parts of v,  dB = s·Σ parts of dB        the second pass of lora-dy.wgsl, in a fixed order
//   parts = v [strips,M,R] | dB [blocks,N,R], rows rounded up to multiples of 4   v [M,R]   dB [N,R]   f32

override WG: u32 = 64;

struct Dims { M: u32, N: u32, R: u32, strips: u32, blocks: u32, s: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> parts: array<f32>;
@group(0) @binding(2) var<storage, read_write> v: array<f32>;
@group(0) @binding(3) var<storage, read_write> dB: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;  // of v, then of dB
  let row = at / d.R;
  if (row >= d.M + d.N) { return; }
  let pitch = (d.R + 3u) / 4u * 4u;
  let is_v = row < d.M;
  let step = select(d.N, d.M, is_v) * pitch;
  let count = select(d.blocks, d.strips, is_v);
  var place = select(d.strips * d.M * pitch + (row - d.M) * pitch, row * pitch, is_v) + at % d.R;
  var sum = 0.0;
  for (var p = 0u; p < count; p++) {
    sum += parts[place];
    place += step;
  }
  if (is_v) { v[at] = d.s * sum; } else { dB[at - d.M * d.R] = d.s * sum; }
}
