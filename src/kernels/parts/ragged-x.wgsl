// x whose rows are not a multiple of 4 elements: read one by one

alias Left = f32;

fn x4(row: u32, column: u32) -> vec4f {
  let size = select(vec2u(d.M, d.K), vec2u(d.K, d.M), X_T == 1u);
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) {
    if (row < size.x && column + q < size.y) { four[q] = x[x_at(row, column + q)]; }
  }
  return four;
}
