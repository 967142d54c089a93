// y → finish((y + Σ_j u_j·b[page_j])·(1 + b[gain]))        in place: what parts/lora-rows.wgsl adds to a product, in a pass of its own
//   u [M,1+R] of pairs: lora-shrink-rows.wgsl     b [pages,N/4] and y [M,N/4] of fours
//
// For CPU adapters: in a product's tile each lane has rows and columns of its own, and gathers a page's number and value for every four
// elements. Here a workgroup has TN × WG fours of a unit of rows, and reads them once.

const TM: u32 = 1u;
const TN: u32 = 8u;
const WG: u32 = 4u;
const FOUR: u32 = 4u;

struct Dims { M: u32, N: u32, low: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> u: array<vec2f>;
@group(0) @binding(4) var<storage, read> b: array<Page>;
@group(0) @binding(5) var<storage, read_write> y: array<vec4f>;

alias Page = vec4f;  // parts/pages-f16.wgsl

fn lift(page: Page) -> vec4f { return page; }

// Up to TM rows of one adapter, and how many such units there are: parts/row-units.wgsl.
fn unit_count(M: u32) -> u32 { return M; }

fn unit(n: u32, M: u32) -> vec4i { return vec4i(i32(n), -1, -1, -1); }

// What becomes of a finished element: parts/epilogue.wgsl.
fn finish(value: f32, row: u32, column: u32) -> f32 { return value; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  // A loop, not a workgroup for each: one with nothing to do takes long on these devices, which go through the text with all lanes off.
  for (var n = group.y; n < unit_count(d.M); n += groups.y) {
    let rows = unit(n, d.M);
    let fours = d.N / 4u;
    let start = group.x * TN * WG + thread;
    let first = u32(rows[0]) * d.low;
    let head = u[first];
    let rank = u32(head.x);
    var row: array<u32, TM>;
    var left: array<f32, TM>;
    var acc: array<array<vec4f, TN>, TM>;
    // Where in a page; past its end the last four again. Those, and rows that repeat the first, are not written.
    var place: array<u32, TN>;
    for (var j = 0u; j < TN; j++) { place[j] = min(start + j * WG, fours - 1u); }
    for (var i = 0u; i < TM; i++) {
      row[i] = u32(max(rows[i], rows[0]));
      for (var j = 0u; j < TN; j++) {
        if (start + j * WG < fours) { acc[i][j] = y[row[i] * fours + place[j]]; }
      }
    }
    for (var r = 1u; r <= rank; r += 1u) {
      let page = u32(u[first + r].x) * fours;
      for (var i = 0u; i < TM; i++) { left[i] = u[row[i] * d.low + r].y; }
      for (var j = 0u; j < TN; j++) {
        let right = lift(b[page + place[j]]);
        for (var i = 0u; i < TM; i++) { acc[i][j] += left[i] * right; }
      }
    }
    if (head.y >= 0.0) {
      for (var j = 0u; j < TN; j++) {
        let gain = lift(b[u32(head.y) * fours + place[j]]);
        for (var i = 0u; i < TM; i++) { acc[i][j] += acc[i][j] * gain; }
      }
    }
    for (var i = 0u; i < TM; i++) {
      for (var j = 0u; j < TN; j++) {
        if (rows[i] >= 0 && start + j * WG < fours) {
          for (var q = 0u; q < FOUR; q++) { acc[i][j][q] = finish(acc[i][j][q], row[i], 4u * place[j] + q); }
          y[row[i] * fours + place[j]] = acc[i][j];
        }
      }
    }
  }
}
