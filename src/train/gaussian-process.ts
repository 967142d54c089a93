/** Gaussian-process regression on the unit cube, for few points: C. E. Rasmussen, C. K. I. Williams, "Gaussian Processes for Machine Learning", ch. 2 and 5. */
import { cholesky, choleskySolve, type Matrix, matrix } from "../tensor/linalg.ts";
import type { Random } from "../tensor/random.ts";

/** What the prior says of the function: its values are standardised, so its variance is 1. */
export interface GpPrior {
  /** Length over which it changes, one per dimension. */
  readonly lengths: readonly number[];
  /** Variance of the noise of a value. */
  readonly noise: number;
}

/** Mean and standard deviation of the function at a point, in the units of the values. */
export interface Belief {
  readonly mean: number;
  readonly deviation: number;
}

export interface GaussianProcess {
  readonly prior: GpPrior;
  /** log p(values | prior) of the standardised values. */
  readonly evidence: number;
  predict(point: readonly number[]): Belief;
}

/** Matérn 5/2: (1 + √5·d + 5d²/3)·exp(−√5·d), d the distance in lengths. */
export function matern52(a: readonly number[], b: readonly number[], lengths: readonly number[]): number {
  const squared = a.reduce((sum, x, i) => sum + ((x - (b[i] ?? 0)) / (lengths[i] ?? 1)) ** 2, 0);
  const d = Math.sqrt(5 * squared);
  return (1 + d + (d * d) / 3) * Math.exp(-d);
}

/** The process of these values at these points, under a prior. Throws ShapeError where the covariance is not positive definite. */
export function gaussianProcess(
  points: readonly (readonly number[])[],
  values: readonly number[],
  prior: GpPrior,
): GaussianProcess {
  const n = points.length;
  const mean = values.reduce((a, b) => a + b, 0) / n;
  const spread = Math.sqrt(values.reduce((sum, y) => sum + (y - mean) ** 2, 0) / n) || 1;
  const standard = column(values.map((value) => (value - mean) / spread));
  const kernel = (a: readonly number[], b: readonly number[]): number => matern52(a, b, prior.lengths);
  const K = matrix(n, n);
  points.forEach((a, i) => {
    points.forEach((b, j) => {
      K.data[i * n + j] = kernel(a, b) + (i === j ? prior.noise : 0);
    });
  });
  const L = cholesky(K);
  const weights = choleskySolve(L, standard); // K⁻¹·y
  const logDiagonal = Array.from({ length: n }, (_, i) => Math.log(L.data[i * n + i] ?? 1)).reduce((a, b) => a + b, 0);
  return {
    prior,
    evidence: -dot(standard, weights) / 2 - logDiagonal - (n / 2) * Math.log(2 * Math.PI),
    predict(point) {
      const k = column(points.map((a) => kernel(a, point)));
      const variance = Math.max(0, 1 - dot(k, choleskySolve(L, k)));
      return { mean: mean + spread * dot(k, weights), deviation: spread * Math.sqrt(variance) };
    },
  };
}

/** Priors that are tried before the best one is refined, and rounds of refining. */
const TRIES = 40;
const ROUNDS = 6;

/** The process whose prior makes the values likeliest, of random ones and then of steps from the best along each of its numbers. */
export function fitGaussianProcess(
  points: readonly (readonly number[])[],
  values: readonly number[],
  random: Random,
): GaussianProcess {
  const dimensions = points[0]?.length ?? 0;
  const logUniform = (low: number, high: number): number => Math.exp(random.uniform(Math.log(low), Math.log(high)));
  const made = (prior: GpPrior): GaussianProcess => gaussianProcess(points, values, prior);
  const better = (a: GaussianProcess, b: GaussianProcess): GaussianProcess => (b.evidence > a.evidence ? b : a);
  let best = made({ lengths: new Array(dimensions).fill(0.5), noise: 1e-2 });
  for (let i = 0; i < TRIES; i++) {
    const lengths = Array.from({ length: dimensions }, () => logUniform(0.05, 5));
    best = better(best, made({ lengths, noise: logUniform(1e-5, 0.3) }));
  }
  for (let round = 0; round < ROUNDS; round++)
    for (let at = 0; at <= dimensions; at++)
      for (const factor of [0.5, 0.8, 1.25, 2]) {
        const { lengths, noise } = best.prior;
        const moved = lengths.map((length, i) => (i === at ? clamp(length * factor, 0.05, 5) : length));
        best = better(
          best,
          made({ lengths: moved, noise: at === dimensions ? clamp(noise * factor, 1e-5, 0.3) : noise }),
        );
      }
  return best;
}

/** How much below `best` the function is expected to be, a point where it is not counting 0: (best − μ)·Φ(z) + σ·φ(z), z = (best − μ) / σ. */
export function expectedImprovement({ mean, deviation }: Belief, best: number): number {
  if (deviation === 0) return Math.max(0, best - mean);
  const z = (best - mean) / deviation;
  return (best - mean) * normalCdf(z) + (deviation * Math.exp((-z * z) / 2)) / Math.sqrt(2 * Math.PI);
}

/** Φ(z), by Abramowitz and Stegun 26.2.17: within 7.5·10⁻⁸. */
export function normalCdf(z: number): number {
  const t = 1 / (1 + 0.2316419 * Math.abs(z));
  const series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
  const tail = (Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI)) * series;
  return z > 0 ? 1 - tail : tail;
}

const column = (values: readonly number[]): Matrix => matrix(values.length, 1, values);
const dot = (a: Matrix, b: Matrix): number => a.data.reduce((sum, x, i) => sum + x * (b.data[i] ?? 0), 0);
const clamp = (x: number, low: number, high: number): number => Math.min(high, Math.max(low, x));
