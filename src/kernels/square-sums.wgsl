// partials[first + c] = Σ g[k]² over the k ≡ c (mod C)        the first stage of a norm over many tensors
//   g [n]   partials: C of them are this tensor's   f32; 1 ≤ C ≤ n, a thread makes one partial in a fixed order

override WG: u32 = 64;

struct Dims { n: u32, C: u32, first: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> g: array<f32>;
@group(0) @binding(2) var<storage, read_write> partials: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let c = id.x + id.y * groups.x * WG;
  if (c >= d.C) { return; }
  var sum = 0.0;
  for (var k = c; k < d.n; k += d.C) { sum += g[k] * g[k]; }
  partials[d.first + c] = sum;
}
