// v = dY·B,  dB = dYᵀ·u      both from one reading of dY, as partial sums: lora-dy-sums.wgsl adds them up and scales
//   dY [M,N]   B [N,R]   u [M,R]   parts = v [strips,M,R] | dB [⌈M/BM⌉,N,R], rows rounded up to whole vec4
//   row-major, f32; N and R multiples of 4 (parts/ragged-dy.wgsl takes all others), R at most 4·R4
//
// A LoRA layer's backward pass. 4MNR operations on MN elements: at low rank both products are bound by the bytes of dY. Apart they
// read 8MN bytes, here 4MN; the partial sums cost 8R·(strips·M + ⌈M/BM⌉·N) bytes, written and read once. It wins where that is
// less than 4MN, hence R well below BM/2 and strips much wider than 2R, or where sizes are so small that dispatches count.
//
// A workgroup walks a strip of BM rows in tiles of 4·BN4 columns. A tile lies in workgroup memory, one vec4 more to a row, so that
// threads below each other read different banks; the next one is fetched meanwhile. Every thread first adds the tile's columns to
// its TM rows × 4 ranks of v, kept in registers along the strip, RG rows apart. Then it adds up 4 columns × 4 ranks of dB over every
// SEG-th row; what SEG threads have of the same block is added through the tile's memory, in a fixed order. B and u come
// straight from global memory: all threads of a tile read the same few rows of them.

const BM: u32 = 128u;
const BN4: u32 = 4u;
const R4: u32 = 4u;   // a power of two
const WG: u32 = 128u;

const RG: u32 = WG / R4;
const TM: u32 = BM / RG;
const PITCH: u32 = BN4 + 1u;
const SHARE: u32 = BM * BN4 / WG;  // of a tile, for a thread to fetch
const BLOCKS: u32 = BN4 * R4;      // of dB in a tile, 4×4
const SEG: u32 = WG / BLOCKS;
const FOUR: u32 = 4u;

struct Dims {
  M: u32, N: u32, R: u32,
  strips: u32,
  tiles: u32,  // in a strip
}
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> dy: array<Stored>;
@group(0) @binding(2) var<storage, read> B: array<Stored>;
@group(0) @binding(3) var<storage, read> u: array<Stored>;
@group(0) @binding(4) var<storage, read_write> parts: array<vec4f>;

alias Stored = vec4f;

var<workgroup> tile: array<vec4f, BM * PITCH>;

// Four columns of dY; zeros outside, so that no row or column past the end counts.
fn dy4(row: u32, column: u32) -> vec4f {
  if (row >= d.M || column >= d.N) { return vec4f(); }
  return dy[(row * d.N + column) / 4u];
}

// Four ranks of a row. Past the end the last one is repeated: it meets zeros of dY, or is not written.
fn b4(row: u32, rank: u32) -> vec4f { return B[(min(row, d.N - 1u) * d.R + min(rank, d.R - 4u)) / 4u]; }

fn u4(row: u32, rank: u32) -> vec4f { return u[(min(row, d.M - 1u) * d.R + min(rank, d.R - 4u)) / 4u]; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let first = group.x * d.tiles;
  let end = min(first + d.tiles, (d.N + 4u * BN4 - 1u) / (4u * BN4));
  let row0 = group.y * BM;
  let rank4 = thread % R4;
  let pitch = (d.R + 3u) / 4u;
  let dB0 = d.strips * d.M * pitch;
  var next: array<vec4f, SHARE>;
  var v: array<vec4f, TM>;
  var four: array<vec4f, FOUR>;

  // Each round fetches a tile and computes the one before it.
  for (var at = first; at <= end; at++) {
    for (var n = 0u; n < SHARE; n++) {
      let place = thread + n * WG;
      if (at < end) { next[n] = dy4(row0 + place / BN4, 4u * (at * BN4 + place % BN4)); }
    }
    if (at > first) {
      let left4 = (at - 1u) * BN4;
      for (var c = 0u; c < BN4; c += 1u) {
        let j = 4u * (left4 + c);
        let b = mat4x4f(b4(j, 4u * rank4), b4(j + 1u, 4u * rank4), b4(j + 2u, 4u * rank4), b4(j + 3u, 4u * rank4));
        for (var i = 0u; i < TM; i++) { v[i] += b * tile[(thread / R4 + i * RG) * PITCH + c]; }
      }
      for (var q = 0u; q < FOUR; q++) { four[q] = vec4f(); }
      for (var i = thread / BLOCKS; i < BM; i += SEG) {
        let right = u4(row0 + i, 4u * rank4);
        let left = tile[i * PITCH + thread / R4 % BN4];
        for (var q = 0u; q < FOUR; q++) { four[q] += left[q] * right; }
      }
      workgroupBarrier();
      for (var q = 0u; q < FOUR; q++) { tile[q * WG + thread] = four[q]; }
      workgroupBarrier();
      for (var e = thread; e < 4u * BLOCKS; e += WG) {
        var sum = vec4f();
        for (var i = 0u; i < SEG; i += 1u) { sum += tile[e / BLOCKS * WG + i * BLOCKS + e % BLOCKS]; }
        let j = 4u * (left4 + e % BLOCKS / R4) + e / BLOCKS;
        if (j < d.N && e % R4 < pitch) { parts[dB0 + (group.y * d.N + j) * pitch + e % R4] = sum; }
      }
    }
    workgroupBarrier();
    for (var n = 0u; n < SHARE; n++) {
      let place = thread + n * WG;
      tile[place / BN4 * PITCH + place % BN4] = next[n];
    }
    workgroupBarrier();
  }

  for (var i = 0u; i < TM; i++) {
    let row = row0 + thread / R4 + i * RG;
    if (row < d.M && rank4 < pitch) { parts[(group.x * d.M + row) * pitch + rank4] = v[i]; }
  }
}
