// dz[t,j] = dy[t,j]·g[j],  partial[c,j] = h[j]·Σ over the rows t of chunk c of dy[t,j]·z[t,j]        reduce.wgsl sums them over c
//   dy, z, dz [M,N]   g, h [N]   partial [C,N], chunks of `rows` rows     f32, N counted in lanes; a thread owns one lane of partial

override WG: u32 = 64;

struct Dims { M: u32, N: u32, rows: u32, n: u32 }  // n = C·N
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> dy: array<Lane>;
@group(0) @binding(2) var<storage, read> z: array<Lane>;
@group(0) @binding(3) var<storage, read> g: array<Lane>;
@group(0) @binding(4) var<storage, read> h: array<Lane>;
@group(0) @binding(5) var<storage, read_write> dz: array<Lane>;
@group(0) @binding(6) var<storage, read_write> partial: array<Lane>;

alias Lane = f32;

fn times(p: Lane, q: Lane) -> Lane { return p * q; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let j = at % d.N;
  let first = at / d.N * d.rows;
  let factor = g[j];
  var sum = Lane();
  for (var t = first; t < min(first + d.rows, d.M); t++) {
    let dyt = dy[t * d.N + j];
    dz[t * d.N + j] = times(dyt, factor);
    sum += times(dyt, z[t * d.N + j]);
  }
  partial[at] = times(h[j], sum);
}
