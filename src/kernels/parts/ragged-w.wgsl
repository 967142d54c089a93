// f32 w whose rows are not a multiple of 4 elements: read one by one

alias Stored = f32;

fn w4(row: u32, column: u32) -> vec4f {
  let size = select(vec2u(d.K, d.N), vec2u(d.N, d.K), W_T == 1u);
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) {
    if (row < size.x && column + q < size.y) { four[q] = w[w0 + row * size.y + column + q]; }
  }
  return four;
}

fn widen(at: u32) -> vec4f { return vec4f(w[4u * at], w[4u * at + 1u], w[4u * at + 2u], w[4u * at + 3u]); }
