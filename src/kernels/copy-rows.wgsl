// dst[b, dst_first + i] = src[b, src_first + i] for i < block        stretches of rows from one matrix into another, in place
//   src [B,src_row]   dst [B,dst_row]   any 4-byte type
//
// How a KV cache grows, and columns are taken out of a matrix or put into one. Everything but what is copied keeps its content.

override WG: u32 = 64;

struct Dims { n: u32, block: u32, src_row: u32, src_first: u32, dst_row: u32, dst_first: u32 }  // n = B·block, all in elements
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> src: array<u32>;
@group(0) @binding(2) var<storage, read_write> dst: array<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  let row = i / d.block;
  let at = i % d.block;
  dst[row * d.dst_row + d.dst_first + at] = src[row * d.src_row + d.src_first + at];
}
