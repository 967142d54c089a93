// value → (value + Σ_j u_j·b[page_j, column])·(1 + b[gain, column])        each row by its own adapter, from pages: lora-shrink-rows.wgsl
//   u [M,1+R] of pairs: rank and the page of DoRA's gain (−1: none), then page and value for each of the rank     b [pages,⌈N/4⌉] of fours
// It stands in for what reads u and b as columns of the product: R is 0 there.

@group(0) @binding(3) var<storage, read> u: array<vec2f>;
@group(0) @binding(4) var<storage, read> b: array<Page>;

alias Page = vec4f;  // parts/pages-f16.wgsl

fn lift(page: Page) -> vec4f { return page; }

fn u1(row: u32, rank: u32) -> f32 { return 0.0; }

fn b1(row: u32, rank: u32) -> f32 { return 0.0; }

fn u4(row: u32, column: u32) -> vec4f { return vec4f(); }

fn b4(row: u32, column: u32) -> vec4f { return vec4f(); }

fn page4(page: f32, column: u32) -> vec4f { return lift(b[u32(page) * ((d.N + 3u) / 4u) + column / 4u]); }

fn adapt4(value: vec4f, row: u32, column: u32) -> vec4f {
  let first = row * d.low;
  let head = u[first];
  let end = first + u32(head.x);
  var sum = value;
  for (var at = first + 1u; at <= end; at += 1u) {
    let one = u[at];
    sum += one.y * page4(one.x, column);
  }
  if (head.y >= 0.0) { sum += sum * page4(head.y, column); }
  return sum;
}

fn adapt(value: f32, row: u32, column: u32) -> f32 {
  let first = row * d.low;
  let head = u[first];
  let end = first + u32(head.x);
  let q = column % 4u;
  var sum = value;
  for (var at = first + 1u; at <= end; at += 1u) {
    let one = u[at];
    sum += one.y * page4(one.x, column)[q];
  }
  if (head.y >= 0.0) { sum += sum * page4(head.y, column)[q]; }
  return sum;
}
