// ring[slot] = (norm, updated, losses), and the word on whether the step is taken      losses [L]   clip [2] = norm, factor
//   ring: in the first slot how many steps in a row were not finite; then slots of (norm, 1 or 0, the losses) as bits
//
// A step counts if the first loss and the norm are finite and there were not yet `most_bad` steps in a row that were not; else the norm becomes NaN,
// by which adamw.wgsl leaves everything as it is. Told by bits: WGSL lets a compiler assume that there is no NaN.

struct Dims { slot: u32, most_bad: u32, L: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> losses: array<u32>;
@group(0) @binding(2) var<storage, read_write> clip: array<u32>;
@group(0) @binding(3) var<storage, read_write> ring: array<u32>;

fn is_finite(bits: u32) -> bool { return (bits & 0x7f800000u) != 0x7f800000u; }

@compute @workgroup_size(1)
fn main() {
  let bad = ring[0];
  let finite = is_finite(losses[0]) && is_finite(clip[0]);
  let updated = finite && bad < d.most_bad;
  let at = (2u + d.L) * (1u + d.slot);
  ring[at] = clip[0];
  ring[at + 1u] = select(0u, 1u, updated);
  for (var i = 0u; i < d.L; i++) { ring[at + 2u + i] = losses[i]; }
  if (updated) { ring[0] = 0u; }
  if (!finite) { ring[0] = bad + 1u; }
  if (!updated) { clip[0] = 0x7fc00000u; }
}
