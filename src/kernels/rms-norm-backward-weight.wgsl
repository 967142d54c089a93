// partial[c,h] = Σ over the rows i of chunk c of dy[i,h]·x[i,h]·r[i]        dw is their sum over c, taken by reduce.wgsl
//   x, dy [M,H]   r [M]   partial [C,H], chunks of `rows` rows     f32, H counted in lanes; a thread owns one lane of partial

override WG: u32 = 64;

struct Dims { M: u32, H: u32, rows: u32, n: u32 }  // n = C·H
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read> r: array<f32>;
@group(0) @binding(3) var<storage, read> dy: array<Lane>;
@group(0) @binding(4) var<storage, read_write> partial: array<Lane>;

alias Lane = f32;  // parts/norm-four.wgsl

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let at = id.x + id.y * groups.x * WG;
  if (at >= d.n) { return; }
  let h = at % d.H;
  let first = at / d.H * d.rows;
  var sum = Lane();
  for (var i = first; i < min(first + d.rows, d.M); i++) { sum += dy[i * d.H + h] * x[i * d.H + h] * r[i]; }
  partial[at] = sum;
}
