import type { Layout } from "../../src/kernels/matmul.ts";
import { type Nd, zeros } from "../harness.ts";

const at = ({ data }: Nd, i: number): number => data[i] ?? Number.NaN;

/** y = scale·op(x)·op(w) + c·u·b in f64; x and w of two axes, or of three with equal first axes. */
export function matmulTwin(x: Nd, w: Nd, layout: Layout, scale = 1, low?: { u: Nd; b: Nd; c: number }): Nd {
  const [xa = 0, xb = 0] = x.shape.slice(-2);
  const [wa = 0, wb = 0] = w.shape.slice(-2);
  const [M, K] = layout === "tn" ? [xb, xa] : [xa, xb];
  const N = layout === "nt" ? wa : wb;
  const lead = x.shape.slice(0, -2);
  const y = zeros([...lead, M, N]);
  const R = low?.u.shape.at(-1) ?? 0;
  for (let n = 0; n < lead.reduce((a, b) => a * b, 1); n++)
    for (let i = 0; i < M; i++)
      for (let j = 0; j < N; j++) {
        let sum = 0;
        for (let k = 0; k < K; k++)
          sum +=
            at(x, n * M * K + (layout === "tn" ? k * M + i : i * K + k)) *
            at(w, (w.shape.length > 2 ? n * K * N : 0) + (layout === "nt" ? j * K + k : k * N + j));
        let extra = 0;
        if (low)
          for (let k = 0; k < R; k++)
            extra += at(low.u, i * R + k) * at(low.b, layout === "nt" ? j * R + k : k * N + j);
        y.data[(n * M + i) * N + j] = scale * sum + (low?.c ?? 0) * extra;
      }
  return y;
}
