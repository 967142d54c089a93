// y whose rows are not a multiple of 4 elements: written one by one

alias Result = f32;

fn store(row: u32, column: u32, value: vec4f) {
  for (var q = 0u; q < 4u; q++) {
    if (column + q < d.N) { y[y_at(row, column + q)] = value[q]; }
  }
}
