// The sums of matmul-rows.wgsl with one addition per subgroup in place of most of the tree.
// A one-axis workgroup is cut into subgroups in the order of its threads.
enable subgroups;

fn add_up(thread: u32) {
  let size = subgroupAdd(1u);
  for (var e = 0u; e < TILE; e += 1u) {
    let sum = subgroupAdd(sums[e * WG + thread]);
    workgroupBarrier();
    if (thread % size == 0u) { sums[e * WG + thread / size] = sum; }
  }
  workgroupBarrier();
  for (var e = thread; e < TILE; e += WG) {
    for (var n = 1u; n < WG / size; n++) { sums[e * WG] += sums[e * WG + n]; }
  }
}
