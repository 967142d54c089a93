// y → finish((y + Σ_j u_j·b[page_j])·(1 + b[gain]))        in place: what parts/lora-rows.wgsl adds to a product, in a pass of its own
//   u [M,1+R] of pairs: lora-shrink-rows.wgsl     b [pages,N/4] and y [M,N/4] of fours
//
// For CPU adapters: in a product's tile each lane has rows and columns of its own, and gathers a page's number and value for every four
// elements. Here a workgroup has TN × WG fours of one row, and reads them once.

const TN: u32 = 8u;
const WG: u32 = 4u;
const FOUR: u32 = 4u;

struct Dims { N: u32, low: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> u: array<vec2f>;
@group(0) @binding(4) var<storage, read> b: array<Page>;
@group(0) @binding(5) var<storage, read_write> y: array<vec4f>;

alias Page = vec4f;  // parts/pages-f16.wgsl

fn lift(page: Page) -> vec4f { return page; }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let row = group.y;
  let fours = d.N / 4u;
  let first = row * d.low;
  let head = u[first];
  let end = first + u32(head.x);
  let start = group.x * TN * WG + thread;
  var acc: array<vec4f, TN>;
  // Where in a page; past its end the last four again, which are not written.
  var place: array<u32, TN>;
  for (var j = 0u; j < TN; j++) {
    place[j] = min(start + j * WG, fours - 1u);
    if (start + j * WG < fours) { acc[j] = y[row * fours + start + j * WG]; }
  }
  for (var at = first + 1u; at <= end; at += 1u) {
    let one = u[at];
    let page = u32(one.x) * fours;
    for (var j = 0u; j < TN; j++) { acc[j] += one.y * lift(b[page + place[j]]); }
  }
  if (head.y >= 0.0) {
    for (var j = 0u; j < TN; j++) { acc[j] += acc[j] * lift(b[u32(head.y) * fours + place[j]]); }
  }
  for (var j = 0u; j < TN; j++) {
    if (start + j * WG < fours) {
      for (var q = 0u; q < FOUR; q++) { acc[j][q] = finish(acc[j][q], row, 4u * (start + j * WG) + q); }
      y[row * fours + start + j * WG] = acc[j];
    }
  }
}
