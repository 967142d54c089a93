// dst[b, position + t, w] = src[b, t, w]        rows into a longer buffer, in place: how a KV cache grows
//   src [B,T,W]   dst [B,S,W]   any 4-byte type
//
// Everything but the copied rows keeps its content.

override WG: u32 = 64;

// n = B·T·W, block = T·W, dst_block = S·W, offset = position·W: all in elements
struct Dims { n: u32, block: u32, dst_block: u32, offset: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> src: array<u32>;
@group(0) @binding(2) var<storage, read_write> dst: array<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.n) { dst[i / d.block * d.dst_block + d.offset + i % d.block] = src[i]; }
}
