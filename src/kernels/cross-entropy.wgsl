// loss[i] = c·(l + m − x[i,label]),  m = max x[i],  l = log Σⱼ exp(x[i,j] − m);  0 for a label below 0
//   x [M,V]   labels, loss [M]   stats [M,2] = (m, l), kept apart: their sum would lose digits of l where m is large
//   f32, labels i32; a thread owns a row

override WG: u32 = 32;

struct Dims { M: u32, V: u32, c: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> labels: array<i32>;
@group(0) @binding(3) var<storage, read_write> loss: array<f32>;
@group(0) @binding(4) var<storage, read_write> stats: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.M) { return; }
  let label = labels[i];
  if (label < 0) {
    loss[i] = 0.0;
    stats[2u * i] = 0.0;
    stats[2u * i + 1u] = 0.0;
    return;
  }
  let first = i * d.V;
  var largest = x[first];
  for (var j = 1u; j < d.V; j++) { largest = max(largest, x[first + j]); }
  var sum = 0.0;
  for (var j = 0u; j < d.V; j++) { sum += exp(x[first + j] - largest); }
  stats[2u * i] = largest;
  stats[2u * i + 1u] = log(sum);
  loss[i] = d.c * (log(sum) + (largest - x[first + u32(label)]));
}
