// Elementwise kernels, sixteen elements to a thread, for CPU adapters: they check the bounds of each access, however wide. n counts the
// sixteens.

alias Lane = mat4x4f;

fn times(p: Lane, q: Lane) -> Lane { return mat4x4f(p[0] * q[0], p[1] * q[1], p[2] * q[2], p[3] * q[3]); }
