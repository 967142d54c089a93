// y = Σ parts[p]            the second pass of a product that was split along k, in a fixed order
//   parts [batch,P,M,N]   y [batch,M,N]   f32

override WG: u32 = 64;

struct Dims { n: u32, M: u32, N: u32, P: u32, block: u32, block_size: u32, low: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> parts: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

fn y_at(row: u32, column: u32) -> u32 { return row * d.N + column; }  // parts/blocked.wgsl

// What a row's own adapter makes of a finished element, before `finish`: parts/lora-rows.wgsl.
fn adapt(value: f32, row: u32, column: u32) -> f32 { return value; }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let size = d.M * d.N;
  let first = at / size * d.P * size + at % size;
  var sum = 0.0;
  for (var p = 0u; p < d.P; p++) { sum += parts[first + p * size]; }
  y[y_at(at / d.N, at % d.N)] = finish(adapt(sum, at / d.N, at % d.N), at / d.N, at % d.N);
}
