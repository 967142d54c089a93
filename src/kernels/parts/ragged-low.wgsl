// u or b whose rows are not a multiple of 4 elements: read one by one

alias Low = f32;

fn u4(row: u32, column: u32) -> vec4f {
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) {
    if (row < d.M && column + q < d.R) { four[q] = u[row * d.R + column + q]; }
  }
  return four;
}

fn b4(row: u32, column: u32) -> vec4f {
  let size = select(vec2u(d.R, d.N), vec2u(d.N, d.R), W_T == 1u);
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) {
    if (row < size.x && column + q < size.y) { four[q] = b[row * size.y + column + q]; }
  }
  return four;
}
