// y[t,j] = z[t,j]·g[j] + b[j], b only if BIAS        each column by its own factor
//   z, y [M,N]   g, b [N]     f32, N counted in lanes; a thread owns one lane of `rows` rows

override WG: u32 = 64;
override BIAS: u32 = 0;

struct Dims { M: u32, N: u32, rows: u32, n: u32 }  // n = N·(chunks of rows)
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> z: array<Lane>;
@group(0) @binding(2) var<storage, read> g: array<Lane>;
@group(0) @binding(3) var<storage, read> b: array<Lane>;
@group(0) @binding(4) var<storage, read_write> y: array<Lane>;

alias Lane = f32;

fn times(p: Lane, q: Lane) -> Lane { return p * q; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let j = at % d.N;
  let first = at / d.N * d.rows;
  let factor = g[j];
  var bias = Lane();
  if (BIAS == 1u) { bias = b[j]; }
  for (var t = first; t < min(first + d.rows, d.M); t++) { y[t * d.N + j] = times(z[t * d.N + j], factor) + bias; }
}
