// o = Σ e^(m_s − m)·o_s / Σ e^(m_s − m)·z_s over splits s of the keys        arXiv:2311.01282, eq. 2
//   parts [splits,rows,D+4]: o_s, its largest score m_s and its sum z_s, as paged-attention.wgsl leaves them   m = max m_s   o [rows,D]
//
// A split without keys has m_s = −1e38 and z_s = 0; a row of which all are so is 0.

override WG: u32 = 64;

struct Dims { n: u32, D4: u32, splits: u32 }  // n = rows·D4
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> parts: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> o: array<vec4f>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  let step = d.n + d.n / d.D4;
  let row = i / d.D4 * (d.D4 + 1u);
  var largest = -1e38;
  for (var s = 0u; s < d.splits; s += 1u) { largest = max(largest, parts[s * step + row + d.D4].x); }
  var sum = 0.0;
  var mixed = vec4f();
  for (var s = 0u; s < d.splits; s += 1u) {
    let stats = parts[s * step + row + d.D4];
    let weight = exp(stats.x - largest);
    sum += weight * stats.y;
    mixed += weight * parts[s * step + row + i % d.D4];
  }
  o[i] = mixed / max(sum, 0.5);
}
