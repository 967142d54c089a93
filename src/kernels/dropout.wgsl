// y = x/(1 − p) where the element's 32 random bits are at least `threshold` = p·2³², else 0        arXiv:1207.0580
//   x, y [n]   f32, in lanes of one element, or four by parts/dropout-four.wgsl
//
// The bits are Philox4x32-10 (Salmon et al., SC'11: counter in, four words out; nothing is kept between calls), counter = (index / 4, stream,
// step, 0), key = the seed, word index % 4: whoever knows these makes the same mask again, so none is stored.

override WG: u32 = 64;
const ROUNDS: u32 = 10u;

struct Dims { n: u32, threshold: u32, s: f32, seed_low: u32, seed_high: u32, step: u32, stream: u32 }  // s = 1/(1 − p)
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Lane>;
@group(0) @binding(2) var<storage, read_write> y: array<Lane>;

alias Lane = f32;

// (low, high) of the 64 bits of a·b, which WGSL has no product for: by halves of 16 bits.
fn wide(a: u32, b: u32) -> vec2u {
  let p = vec2u(a & 0xffffu, a >> 16u);
  let q = vec2u(b & 0xffffu, b >> 16u);
  let middle = p.y * q.x + ((p.x * q.x) >> 16u);
  let other = p.x * q.y + (middle & 0xffffu);
  return vec2u(a * b, p.y * q.y + (middle >> 16u) + (other >> 16u));
}

fn philox(counter: vec4u, seed: vec2u) -> vec4u {
  var words = counter;
  var key = seed;
  for (var round = 0u; round < ROUNDS; round += 1u) {
    let left = wide(0xD2511F53u, words.x);
    let right = wide(0xCD9E8D57u, words.z);
    words = vec4u(right.y ^ words.y ^ key.x, right.x, left.y ^ words.w ^ key.y, left.x);
    key += vec2u(0x9E3779B9u, 0xBB67AE85u);
  }
  return words;
}

fn bits(four: u32) -> vec4u { return philox(vec4u(four, d.stream, d.step, 0u), vec2u(d.seed_low, d.seed_high)); }

fn dropped(at: u32, value: Lane) -> Lane { return select(0.0, d.s * value, bits(at / 4u)[at % 4u] >= d.threshold); }

fn finish(at: u32, value: Lane) -> Lane { return value; }  // parts/add-gradient.wgsl

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  let i = id.x + id.y * groups.x * WG;
  if (i < d.n) { y[i] = finish(i, dropped(i, x[i])); }
}
