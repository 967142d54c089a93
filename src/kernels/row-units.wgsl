// Rows with one slot, up to 4 of 32 neighbours, are a unit: it is computed together
//   slots [M]     units [M+1]: how many units of one row there are, and of several; from the front the former, from the back the others
// For CPU adapters, in one thread: little work, in the order of the rows.

const SPAN: u32 = 32u;

struct Dims { M: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> slots: array<i32>;
@group(0) @binding(2) var<storage, read_write> units: array<vec4i>;

@compute @workgroup_size(1)
fn main() {
  var counts = vec2u();
  for (var row = 0u; row < d.M; row += 1u) {
    var before = 0u;
    var size = 0u;
    var rows = vec4i(-1);
    for (var other = row / SPAN * SPAN; other < min((row / SPAN + 1u) * SPAN, d.M); other += 1u) {
      if (slots[other] == slots[row]) {
        if (other < row) {
          before += 1u;
        } else if (size < 4u) {
          rows[size] = i32(other);
          size += 1u;
        }
      }
    }
    if (before % 4u == 0u) {
      if (size == 1u) {
        counts[0] += 1u;
        units[counts[0]] = rows;
      } else {
        units[d.M - counts[1]] = rows;
        counts[1] += 1u;
      }
    }
  }
  units[0] = vec4i(vec2i(counts), 0, 0);
}
