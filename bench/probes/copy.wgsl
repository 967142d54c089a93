// y = x        what the memory carries: 16 bytes read and 16 written per element, each once
//   x, y [n]   vec4f
//
// A workgroup copies WG · PER_THREAD neighbours. Its threads stand side by side at every step, so that each step is one run of
// whole cache lines. The operands must be larger than every cache for this to be a measure of memory.

override WG: u32 = 256;
const PER_THREAD: u32 = 4;

struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4f>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let first = (group.x + group.y * groups.x) * WG * PER_THREAD + local;
  for (var j = 0u; j < PER_THREAD; j++) {
    let i = first + j * WG;
    if (i < d.n) { y[i] = x[i]; }
  }
}
