// matmul-registers.wgsl with the second half taken over from the neighbour in a quad (READS = 1)
// A one-axis workgroup is cut into quads in the order of its threads.
enable subgroups;

fn second_left(first: mat4x4f, both: mat4x4f) -> mat4x4f {
  return mat4x4f(quadSwapX(first[0]), quadSwapX(first[1]), quadSwapX(first[2]), quadSwapX(first[3]));
}

fn second_right(first: mat4x4f, both: mat4x4f) -> mat4x4f {
  return mat4x4f(quadSwapY(first[0]), quadSwapY(first[1]), quadSwapY(first[2]), quadSwapY(first[3]));
}
