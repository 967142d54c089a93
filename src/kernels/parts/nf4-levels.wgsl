// NF4's levels in workgroup memory: there 16 threads read 16 levels at once, where an indexed constant goes through each thread's stack

var<workgroup> levels: array<f32, 16>;

fn prepare(thread: u32) {
  if (thread == 0u) {
    for (var n = 0u; n < 16u; n++) { levels[n] = NF4[n]; }
  }
  workgroupBarrier();
}

fn level(code: u32) -> f32 { return levels[code]; }
