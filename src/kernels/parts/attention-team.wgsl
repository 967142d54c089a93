// The attention kernels with a workgroup of WX·WY threads to a tile: each works out scores of its own R × 4·Q pairs, then its own D/WX columns.

var<workgroup> tile: array<vec4f, TILE>;
var<workgroup> rows: array<f32, WX * WY * R>;

fn unit_of(group: u32, thread: u32) -> u32 { return group; }

fn meet() { workgroupBarrier(); }

fn share(at: u32, value: vec4f) { tile[at] = value; }

fn shared_at(at: u32, own: vec4f) -> vec4f { return tile[at]; }

// Of four others' keys (queries), where they are: the last is repeated where there are no more.
fn four_of(own: vec4u, base: u32, step: u32, index: u32, last: u32) -> vec4u {
  return base + step * min(vec4u(0u, 1u, 2u, 3u) + index, vec4u(last));
}

fn share_row(at: u32, value: f32) { rows[at] = value; }

fn row_at(at: u32, own: f32) -> f32 { return rows[at]; }
