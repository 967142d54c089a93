import type { Gpu } from "../gpu/gpu.ts";
import { type Matrix, matrix, randomizedSvd } from "../tensor/linalg.ts";
import { Random } from "../tensor/random.ts";
import { tensor } from "../tensor/tensor.ts";
import { deviceOperator } from "./device-operator.ts";
import { scaledRows } from "./init-factors.ts";

/** Principal components of rows that came in several batches. */
export interface Pca {
  /** Rows seen. */
  readonly count: number;
  readonly mean: Float64Array;
  /** Σ‖x − mean‖² */
  readonly squares: number;
  /** The components as rows [c,K], of length 1, the largest element of each positive. */
  readonly components: Matrix;
  /** Their singular values, descending. */
  readonly s: Float64Array;
}

/** Power iterations of each step: PEFT's count. */
const ITERATIONS = 4;

/**
 * `before` with more rows [n,K]: incremental PCA (Ross et al., 2008, "Incremental learning for robust visual tracking", §2.1). The `c` largest
 * singular triplets of
 *
 *     [ diag(s)·V ;  X − mean(X) ;  √(n₀·n/(n₀ + n))·(mean₀ − mean(X)) ]
 *
 * by a randomised SVD whose products the device makes. The same seed in each step keeps its errors alike.
 */
export async function addRows(gpu: Gpu, before: Pca | undefined, rows: Matrix, c: number, seed: number): Promise<Pca> {
  const { rows: n, columns: K } = rows;
  const own = meanOf(rows);
  const centred = rows.data.map((x, p) => x - (own[p % K] ?? 0));
  const count = n + (before?.count ?? 0);
  const shift = own.map((x, k) => (before ? (before.mean[k] ?? 0) - x : 0));
  const weight = before ? (before.count * n) / count : 0;
  const kept = before ? scaledRows(before.components, before.s).data : [];
  const parts = before ? [kept, centred, shift.map((x) => Math.sqrt(weight) * x)] : [centred];
  const values = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    values.set(part, at);
    at += part.length;
  }
  const X = tensor(gpu, values, [values.length / K, K]);
  const options = { random: new Random(seed), iterations: ITERATIONS, oversample: c };
  const { s, Vt } = await randomizedSvd(deviceOperator(X), c, options);
  gpu.release(X);
  return {
    ...{ count, s, components: signed(Vt) },
    mean: own.map((x, k) => x + ((before?.count ?? 0) / count) * (shift[k] ?? 0)),
    squares: (before?.squares ?? 0) + sumOfSquares(centred) + weight * sumOfSquares(shift),
  };
}

/** The share of all variance that each component explains. */
export const explained = ({ s, squares }: Pca): number[] => Array.from(s, (value) => value ** 2 / squares);

const sumOfSquares = (values: Float64Array): number => values.reduce((sum, x) => sum + x * x, 0);

function meanOf({ rows, columns, data }: Matrix): Float64Array {
  const mean = new Float64Array(columns);
  data.forEach((x, at) => {
    mean[at % columns] = (mean[at % columns] ?? 0) + x / rows;
  });
  return mean;
}

/** Each row with the sign for which its element of the largest magnitude is positive. */
function signed({ rows, columns, data }: Matrix): Matrix {
  const signs = Array.from({ length: rows }, (_, i) => {
    const row = data.subarray(i * columns, (i + 1) * columns);
    return Math.sign(row.reduce((most, x) => (Math.abs(x) > Math.abs(most) ? x : most), 0));
  });
  return scaledRows(matrix(rows, columns, data), signs);
}
