// x or y whose columns lie in blocks: each `block` of them are a matrix of their own, `block_size` elements after the one before

fn x_at(row: u32, column: u32) -> u32 { return column / d.block * d.block_size + row * d.block + column % d.block; }

fn y_at(row: u32, column: u32) -> u32 { return column / d.block * d.block_size + row * d.block + column % d.block; }
