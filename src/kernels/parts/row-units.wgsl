// Rows of one adapter are computed together: row-units.wgsl

@group(0) @binding(6) var<storage, read> units: array<vec4i>;

fn unit_count(M: u32) -> u32 { return u32(select(units[0][1], units[0][0], TM == 1u)); }

fn unit(n: u32, M: u32) -> vec4i { return units[select(M - n, 1u + n, TM == 1u)]; }
