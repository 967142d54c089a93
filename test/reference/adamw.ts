import { type Nd, nd } from "../harness.ts";

export interface AdamwTwinOptions {
  readonly learningRate: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
  readonly step: number;
  readonly factor: number;
}

/** One step of AdamW in f64, written from algorithm 2 of arXiv:1711.05101: corrected moments first, then the update. */
export function adamwTwin(p: Nd, g: Nd, m: Nd, v: Nd, o: AdamwTwinOptions): { p: Nd; m: Nd; v: Nd } {
  const clipped = g.data.map((value) => o.factor * value);
  const newM = nd(
    m.shape,
    m.data.map((value, i) => o.beta1 * value + (1 - o.beta1) * (clipped[i] ?? 0)),
  );
  const newV = nd(
    v.shape,
    v.data.map((value, i) => o.beta2 * value + (1 - o.beta2) * (clipped[i] ?? 0) ** 2),
  );
  const newP = p.data.map((value, i) => {
    const mHat = (newM.data[i] ?? 0) / (1 - o.beta1 ** o.step);
    const vHat = (newV.data[i] ?? 0) / (1 - o.beta2 ** o.step);
    return value - o.learningRate * (mHat / (Math.sqrt(vHat) + o.eps) + o.weightDecay * value);
  });
  return { p: nd(p.shape, newP), m: newM, v: newV };
}

/** √Σ x² over all tensors. */
export const normTwin = (tensors: readonly Nd[]): number =>
  Math.sqrt(tensors.reduce((sum, { data }) => sum + data.reduce((s, x) => s + x * x, 0), 0));
