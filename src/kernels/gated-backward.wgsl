// dgate = dy∘up∘f′(gate),  dup = dy∘f(gate)        gradients of gated.wgsl, f(gate) worked out again
//   gate, up, dy, dgate, dup [n]   f32, in lanes of one element, or four by parts/gated-four.wgsl

override WG: u32 = 64;

struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> gate: array<Lane>;
@group(0) @binding(2) var<storage, read> up: array<Lane>;
@group(0) @binding(3) var<storage, read> dy: array<Lane>;
@group(0) @binding(4) var<storage, read_write> dgate: array<Lane>;
@group(0) @binding(5) var<storage, read_write> dup: array<Lane>;

alias Lane = f32;

fn activate(x: f32) -> f32 { return x; }  // those of unary.wgsl stand in

fn derivative(x: f32) -> f32 { return 1.0; }

fn each(v: Lane) -> Lane { return activate(v); }

fn slope(v: Lane) -> Lane { return derivative(v); }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i >= d.n) { return; }
  dgate[i] = dy[i] * up[i] * slope(gate[i]);
  dup[i] = dy[i] * each(gate[i]);
}
