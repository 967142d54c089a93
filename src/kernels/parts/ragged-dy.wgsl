// lora-dy.wgsl where N or R is no multiple of 4: rows start within a vec4, so its four elements are read one by one.
alias Stored = f32;

fn dy4(row: u32, column: u32) -> vec4f {
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) {
    if (row < d.M && column + q < d.N) { four[q] = dy[row * d.N + column + q]; }
  }
  return four;
}

fn b4(row: u32, rank: u32) -> vec4f {
  let first = min(row, d.N - 1u) * d.R;
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) { four[q] = B[first + min(rank + q, d.R - 1u)]; }
  return four;
}

fn u4(row: u32, rank: u32) -> vec4f {
  let first = min(row, d.M - 1u) * d.R;
  var four = vec4f();
  for (var q = 0u; q < 4u; q++) { four[q] = u[first + min(rank + q, d.R - 1u)]; }
  return four;
}
