// y = a + b, a − b, a · b, or a alone        elementwise; an operand's stride is 0 along the axes it is repeated on
//   y [n0,n1,n2,n3], row-major     a, b: element (i0,i1,i2,i3) lies at Σ iₖ·strideₖ     f32

override WG: u32 = 64;
override OP: u32 = 0;    // 0 a + b, 1 a − b, 2 a · b, 3 a
override FLAT: u32 = 0;  // 1: both operands have y's shape, so no index arithmetic

struct Dims {
  n: u32, n1: u32, n2: u32, n3: u32,
  a0: u32, a1: u32, a2: u32, a3: u32,
  b0: u32, b1: u32, b2: u32, b3: u32,
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> a: array<Lane>;
@group(0) @binding(2) var<storage, read> b: array<Lane>;
@group(0) @binding(3) var<storage, read_write> y: array<Lane>;

alias Lane = f32;  // parts/four-lanes.wgsl, parts/sixteen-lanes.wgsl

fn times(p: Lane, q: Lane) -> Lane { return p * q; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.n) { y[i] = result(i); }
}

fn result(i: u32) -> Lane {
  var at_a = i;
  var at_b = i;
  if (FLAT == 0u) {
    let row = i / d.n3;
    let plane = row / d.n2;
    let index = vec4u(plane / d.n1, plane % d.n1, row % d.n2, i % d.n3);
    at_a = index.x * d.a0 + index.y * d.a1 + index.z * d.a2 + index.w * d.a3;
    at_b = index.x * d.b0 + index.y * d.b1 + index.z * d.b2 + index.w * d.b3;
  }
  switch OP {
    case 0u: { return a[at_a] + b[at_b]; }
    case 1u: { return a[at_a] - b[at_b]; }
    case 2u: { return times(a[at_a], b[at_b]); }
    default: { return a[at_a]; }
  }
}
