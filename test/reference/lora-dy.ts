import { type Nd, zeros } from "../harness.ts";

/** v = s·dy·B [M,R] and dB = s·dyᵀ·u [N,R] in f64; dy [M,N], B [N,R], u [M,R]. */
export function loraDyTwin(dy: Nd, B: Nd, u: Nd, s: number): { readonly v: Nd; readonly dB: Nd } {
  const [M = 0, N = 0] = dy.shape;
  const R = B.shape[1] ?? 0;
  const v = zeros([M, R]);
  const dB = zeros([N, R]);
  for (let i = 0; i < M; i++)
    for (let j = 0; j < N; j++) {
      const g = s * (dy.data[i * N + j] ?? Number.NaN);
      for (let r = 0; r < R; r++) {
        v.data[i * R + r] = (v.data[i * R + r] ?? 0) + g * (B.data[j * R + r] ?? Number.NaN);
        dB.data[j * R + r] = (dB.data[j * R + r] ?? 0) + g * (u.data[i * R + r] ?? Number.NaN);
      }
    }
  return { v, dB };
}
