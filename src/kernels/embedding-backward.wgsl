// dw[v] = Σ over n with ids[n] = first + v of dy[n]        gradient of embedding.wgsl; a scan instead of atomics, so the order is fixed
//   ids [N]   dy [N,H]   dw [V,H]     f32, ids i32; a thread owns COLUMNS neighbouring elements of one row of dw

const COLUMNS: u32 = 8u;
override WG: u32 = 64;

struct Dims { N: u32, H: u32, n: u32, first: u32 }  // n = V·⌈H / COLUMNS⌉ threads
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> ids: array<i32>;
@group(0) @binding(2) var<storage, read> dy: array<f32>;
@group(0) @binding(3) var<storage, read_write> dw: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let blocks = (d.H + COLUMNS - 1u) / COLUMNS;
  let v = at / blocks;
  let h = at % blocks * COLUMNS;
  var sum: array<f32, COLUMNS>;
  for (var n = 0u; n < d.N; n++) {
    if (ids[n] == i32(d.first + v)) {
      for (var c = 0u; c < COLUMNS; c++) { sum[c] += dy[n * d.H + h + c]; }
    }
  }
  for (var c = 0u; c < COLUMNS; c++) {
    if (h + c < d.H) { dw[v * d.H + h + c] = sum[c]; }
  }
}
