// u or b whose rows are not a multiple of 4 elements: read one by one, as matmul-tiled.wgsl does

alias Low = f32;
