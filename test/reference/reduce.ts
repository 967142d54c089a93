import { type Nd, nd, zeros } from "../harness.ts";

const product = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** One axis, or everything, of x in f64. */
export function reduceTwin(op: "sum" | "mean" | "max", x: Nd, axis?: number, keepDims = false): Nd {
  const all = axis === undefined;
  const which = all ? 0 : axis < 0 ? axis + x.shape.length : axis;
  const length = all ? x.data.length : (x.shape[which] ?? 0);
  const inner = all ? 1 : product(x.shape.slice(which + 1));
  const y = zeros(x.shape.flatMap((n, i) => (!all && i !== which ? [n] : keepDims ? [1] : [])));
  y.data.forEach((_, at) => {
    const first = Math.floor(at / inner) * length * inner + (at % inner);
    const values = Array.from({ length }, (__, k) => x.data[first + k * inner] ?? Number.NaN);
    const sum = values.reduce((a, b) => a + b, 0);
    y.data[at] = op === "max" ? values.reduce((a, b) => Math.max(a, b)) : op === "mean" ? sum / length : sum;
  });
  return y;
}

/** exp(x − max) / Σ exp(x − max) over the last axis. */
export function softmaxTwin(x: Nd): Nd {
  const N = x.shape.at(-1) ?? 1;
  const y = nd(x.shape, x.data);
  for (let first = 0; first < x.data.length; first += N) {
    const row = y.data.subarray(first, first + N);
    const largest = row.reduce((a, b) => Math.max(a, b));
    const exps = row.map((value) => Math.exp(value - largest));
    row.set(exps.map((e) => e / exps.reduce((a, b) => a + b)));
  }
  return y;
}
