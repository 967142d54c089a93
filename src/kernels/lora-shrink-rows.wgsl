// u[g,t,j] = Σ_k a[page_j,g,k]·x[t,k]        each row by its own adapter, whose A lies in pages, one for each of its rank
//   x [M,K]   a [pages,G,⌈K/4⌉] of fours, zeros from K on   slots [M]: the row's place in the table, −1 for none
//   table [slots,R+2]: rank, the page of DoRA's gain (−1: none), pages      →      u [G,P,1+R] of pairs, M of P rows written: rank and
//   the gain's page, then page and value for each of the rank, pages as f32 (exact below 2^24): all that parts/lora-rows.wgsl has to know
//
// A workgroup owns TJ values of one row, or of a unit of rows. Its threads stride along k, so that x is read once for all of them, and their
// sums are added up once at the end, in a fixed order. Workgroups past the rank have nothing to do.

const TM: u32 = 1u;
const TJ: u32 = 4u;
const WG: u32 = 64u;
const TILE: u32 = TM * TJ;
override X_T: u32 = 0;

struct Dims { M: u32, K: u32, G: u32, R: u32, P: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Left>;
@group(0) @binding(2) var<storage, read> a: array<Page>;
@group(0) @binding(3) var<storage, read> table: array<i32>;
@group(0) @binding(4) var<storage, read> slots: array<i32>;
@group(0) @binding(5) var<storage, read_write> u: array<vec2f>;

alias Left = vec4f;
alias Page = vec4f;  // parts/pages-f16.wgsl

var<workgroup> sums: array<f32, TILE * WG>;

fn lift(page: Page) -> vec4f { return page; }

fn x_at(row: u32, column: u32) -> u32 { return row * d.K + column; }

// Four elements from (row, column) on: parts/ragged-x.wgsl.
fn x4(row: u32, column: u32) -> vec4f { return x[x_at(row, column) / 4u]; }

// Up to TM rows of one adapter, and how many such units there are: parts/row-units.wgsl.
fn unit_count(M: u32) -> u32 { return M; }

fn unit(n: u32, M: u32) -> vec4i { return vec4i(i32(n), -1, -1, -1); }

fn u_at(g: u32, row: i32) -> u32 { return (g * d.P + u32(row)) * (d.R + 1u); }

fn add_up(thread: u32) {
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if (thread < half) {
      for (var e = 0u; e < TILE; e += 1u) { sums[e * WG + thread] += sums[e * WG + thread + half]; }
    }
  }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  if (group.x >= unit_count(d.M)) { return; }
  let rows = unit(group.x, d.M);
  let j0 = group.y * TJ;
  let slot = slots[rows[0]];
  let entry = u32(max(slot, 0)) * (d.R + 2u);
  let rank = select(0u, u32(table[entry]), slot >= 0);
  // Rows that repeat the first are not written.
  var row: array<i32, TM>;
  for (var i = 0u; i < TM; i++) {
    row[i] = max(rows[i], rows[0]);
    if (j0 == 0u && thread == 0u) {
      u[u_at(group.z, row[i])] = vec2f(f32(rank), select(-1.0, f32(table[entry + 1u]), slot >= 0));
    }
  }
  if (j0 >= rank) { return; }
  let fours = (d.K + 3u) / 4u;
  var acc: array<array<f32, TJ>, TM>;
  var left: array<vec4f, TM>;
  var page: array<u32, TJ>;
  // Where each starts; past the rank the last one again.
  for (var j = 0u; j < TJ; j++) { page[j] = (u32(table[entry + 2u + min(j0 + j, rank - 1u)]) * d.G + group.z) * fours; }
  for (var k = thread; k < fours; k += WG) {
    for (var i = 0u; i < TM; i++) { left[i] = x4(u32(row[i]), 4u * k); }
    for (var j = 0u; j < TJ; j++) {
      let right = lift(a[page[j] + k]);
      for (var i = 0u; i < TM; i++) { acc[i][j] += dot(left[i], right); }
    }
  }
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TJ; j++) { sums[(i * TJ + j) * WG + thread] = acc[i][j]; }
  }
  add_up(thread);
  workgroupBarrier();
  for (var e = thread; e < TILE; e += WG) {
    let j = j0 + e % TJ;
    let to = rows[e / TJ];
    if (to >= 0 && j < rank) { u[u_at(group.z, to) + 1u + j] = vec2f(f32(table[entry + 2u + j]), sums[e * WG]); }
  }
}
