// ring[slot] = (loss, norm, updated), and the word on whether the step is taken        loss [1]   clip [2] = norm, factor
//   ring: how many steps in a row were not finite, three unused words, then slots of (loss, norm, 1 or 0, unused) as bits
//
// A step counts if loss and norm are finite and there were not yet `most_bad` steps in a row that were not; else the norm becomes NaN,
// by which adamw.wgsl leaves everything as it is. Told by bits: WGSL lets a compiler assume that there is no NaN.

struct Dims { slot: u32, most_bad: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> loss: array<u32>;
@group(0) @binding(2) var<storage, read_write> clip: array<u32>;
@group(0) @binding(3) var<storage, read_write> ring: array<u32>;

fn is_finite(bits: u32) -> bool { return (bits & 0x7f800000u) != 0x7f800000u; }

@compute @workgroup_size(1)
fn main() {
  let bad = ring[0];
  let finite = is_finite(loss[0]) && is_finite(clip[0]);
  let updated = finite && bad < d.most_bad;
  let at = 4u * (1u + d.slot);
  ring[at] = loss[0];
  ring[at + 1u] = clip[0];
  ring[at + 2u] = select(0u, 1u, updated);
  if (updated) { ring[0] = 0u; }
  if (!finite) { ring[0] = bad + 1u; }
  if (!updated) { clip[0] = 0x7fc00000u; }
}
