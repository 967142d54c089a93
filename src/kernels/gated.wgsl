// y = f(gate)∘up        SwiGLU and GEGLU: arXiv:2002.05202; f of unary.wgsl
//   gate, up, y [n]   f32, in lanes of one element, or four by parts/gated-four.wgsl

override WG: u32 = 64;

struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> gate: array<Lane>;
@group(0) @binding(2) var<storage, read> up: array<Lane>;
@group(0) @binding(3) var<storage, read_write> y: array<Lane>;

alias Lane = f32;

fn activate(x: f32) -> f32 { return x; }  // that of unary.wgsl stands in

fn each(v: Lane) -> Lane { return activate(v); }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.n) { y[i] = each(gate[i]) * up[i]; }
}
