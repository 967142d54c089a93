// k_pages[place(t)] = keys[t]; v_pages[place(t)] = values[t]        place(t) = page·2^bits + position mod 2^bits
//   keys, values [T,W]   pages [P,2^bits,W]   W = G·D, a multiple of 4
//   sequences [T]: the row of `tables` that token t belongs to, or −1: it is not written   positions [T]   tables [S,most]: pages in order
//
// The cache of vLLM (arXiv:2309.06180 §4.1): a sequence's keys and values lie in pages wherever there was room.

override WG: u32 = 64;

struct Dims { n: u32, W4: u32, most: u32, bits: u32 }  // n = T·W4, W4 = W/4
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> keys: array<vec4f>;
@group(0) @binding(2) var<storage, read> values: array<vec4f>;
@group(0) @binding(3) var<storage, read> sequences: array<i32>;
@group(0) @binding(4) var<storage, read> positions: array<i32>;
@group(0) @binding(5) var<storage, read> tables: array<i32>;
@group(0) @binding(6) var<storage, read_write> k_pages: array<Cached>;
@group(0) @binding(7) var<storage, read_write> v_pages: array<Cached>;

alias Cached = vec4f;

// parts/paged-f16.wgsl
fn narrow(value: vec4f) -> Cached { return value; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  let t = i / d.W4;
  let sequence = sequences[t];
  if (sequence < 0) { return; }
  let p = u32(positions[t]);
  let page = u32(tables[u32(sequence) * d.most + (p >> d.bits)]);
  let at = ((page << d.bits) + (p & ((1u << d.bits) - 1u))) * d.W4 + i % d.W4;
  k_pages[at] = narrow(keys[i]);
  v_pages[at] = narrow(values[i]);
}
