// One element of a packed w, for kernels that read singly

fn w1(at: u32) -> f32 { return widen(at / 4u)[at % 4u]; }
