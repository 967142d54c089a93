/** Laplace's approximation for classifiers: probabilities of the classes that know what the rows trained on left open. */
import { backward } from "../autograd/engine.ts";
import { type Matrix, symmetricEigen } from "../tensor/linalg.ts";
import { Random } from "../tensor/random.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";
import { batchLogits, type ClassificationRow, type Classifier, classifierLogits } from "./classify.ts";
import { type Curvature, curvatureOf, type Gradient, outputCovariance } from "./laplace.ts";

/**
 * The curvature of the rows' log-likelihood: exactly their generalised Gauss-Newton matrix, unless its rank is above `rank`. Each row is one
 * forward and backward pass per class, its gradients √p_c·∇log p_c. Throws the reason of the signal.
 */
export const classifierCurvature = async (
  model: Classifier,
  parameters: readonly Tensor[],
  rows: readonly ClassificationRow[],
  { rank, signal }: { readonly rank?: number; readonly signal?: AbortSignal } = {},
): Promise<Curvature> => curvatureOf(parameters, fisherRows(model, rows, signal), rank);

async function* fisherRows(
  model: Classifier,
  rows: readonly ClassificationRow[],
  signal: AbortSignal | undefined,
): AsyncGenerator<Gradient> {
  for (const row of rows) {
    signal?.throwIfAborted();
    const p = softmax(await classifierLogits(model, [row], 1));
    for (const [c, share] of p.entries())
      yield gradientOf(
        model,
        row,
        p.map((x, i) => Math.sqrt(share) * (Number(i === c) - x)),
      );
  }
}

/** The gradient of Σ weights·logits of one row. */
const gradientOf =
  (model: Classifier, row: ClassificationRow, weights: readonly number[]): Gradient =>
  () =>
    backward(batchLogits(model, [row]), tensor(model.gpu, weights, [1, weights.length]));

export interface ClassPredictiveOptions {
  /** Rows of one forward pass for the logits; 16 unless given. */
  readonly batchSize?: number;
  /** Draws of the logits of a row; 1000 unless given. */
  readonly samples?: number;
  /** Of the draws; 0 unless given. */
  readonly seed?: number;
  /** Ends it by throwing the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/**
 * Probabilities of the classes of each row: the mean of softmax(z) over draws z ~ N(f(x), J(x)·H⁻¹·J(x)ᵀ), with the prior's precision `tau`.
 * Each row is a forward and backward pass per class.
 */
export async function predictClasses(
  model: Classifier,
  curvature: Curvature,
  tau: number,
  rows: readonly ClassificationRow[],
  { batchSize = 16, samples = 1000, seed = 0, signal }: ClassPredictiveOptions = {},
): Promise<number[][]> {
  const C = model.config.labels.length;
  const logits = await classifierLogits(model, rows, batchSize, signal);
  const found: number[][] = [];
  for (const [n, row] of rows.entries()) {
    signal?.throwIfAborted();
    const unit = (c: number): number[] => Array.from({ length: C }, (_, i) => Number(i === c));
    const jacobian = Array.from({ length: C }, (_, c) => gradientOf(model, row, unit(c)));
    const covariance = await outputCovariance(curvature, tau, jacobian);
    found.push(meanSoftmax(logits.slice(n * C, (n + 1) * C), covariance, samples, new Random(seed, n)));
  }
  return found;
}

/** The mean of softmax(z) over draws z ~ N(mean, covariance). */
export function meanSoftmax(mean: readonly number[], covariance: Matrix, samples: number, random: Random): number[] {
  const { values, vectors } = symmetricEigen(covariance);
  const C = mean.length;
  const sum = new Array<number>(C).fill(0);
  for (let s = 0; s < samples; s++) {
    const along = Array.from(values, (value) => Math.sqrt(Math.max(0, value)) * random.normal());
    const z = mean.map((m, c) => along.reduce((total, x, i) => total + x * (vectors.data[c * C + i] ?? 0), m));
    softmax(z).forEach((p, c) => {
      sum[c] = (sum[c] ?? 0) + p / samples;
    });
  }
  return sum;
}

/** exp(z) / Σ exp(z), safe for large z. */
export function softmax(z: readonly number[]): number[] {
  const most = z.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const powers = z.map((x) => Math.exp(x - most));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / total);
}
