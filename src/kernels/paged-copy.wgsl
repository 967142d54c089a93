// pages[to] = pages[from], of keys and of values, for each pair; no page is in two pairs
//   pairs [n,2] as (from, to)   k, v [P,W], any 4-byte type

override WG: u32 = 64;

struct Dims { n: u32, W: u32 }  // n = pairs·W
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> pairs: array<vec2i>;
@group(0) @binding(2) var<storage, read_write> k: array<u32>;
@group(0) @binding(3) var<storage, read_write> v: array<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  let pair = vec2u(pairs[i / d.W]) * d.W + i % d.W;
  k[pair.y] = k[pair.x];
  v[pair.y] = v[pair.x];
}
