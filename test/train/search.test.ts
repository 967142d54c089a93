import { describe, expect, test } from "vitest";
import { cholesky, matrix } from "../../src/tensor/linalg.ts";
import { Random } from "../../src/tensor/random.ts";
import {
  expectedImprovement,
  fitGaussianProcess,
  gaussianProcess,
  matern52,
  normalCdf,
} from "../../src/train/gaussian-process.ts";
import {
  checkSpace,
  gridPoints,
  randomPoint,
  type SearchPoint,
  type SearchSpace,
  type SearchTrial,
  suggestPoint,
} from "../../src/train/search.ts";

const seed = Math.floor(Math.random() * 2 ** 32);
const median = (values: readonly number[]): number => values.toSorted((a, b) => a - b)[values.length >> 1] as number;

describe("a Gaussian process", () => {
  test("of two values is what the formulas say for a 2 × 2 covariance", () => {
    const prior = { lengths: [0.7], noise: 0.05 };
    const { predict, evidence } = gaussianProcess([[0.1], [0.9]], [3, 7], prior);
    const [c, d, e] = [matern52([0.1], [0.9], [0.7]), matern52([0.1], [0.4], [0.7]), matern52([0.9], [0.4], [0.7])];
    const [v, det] = [1.05, 1.05 ** 2 - c ** 2]; // values −1 and 1 when standardised: mean 5, spread 2
    const mean = (d * (-v - c) + e * (c + v)) / det;
    const variance = 1 - (v * d * d - 2 * c * d * e + v * e * e) / det;
    const at = predict([0.4]);
    expect(Math.abs(at.mean - (5 + 2 * mean))).toBeLessThanOrEqual(1e-12);
    expect(Math.abs(at.deviation - 2 * Math.sqrt(variance))).toBeLessThanOrEqual(1e-12);
    const wanted = -(2 * (v + c)) / det / 2 - Math.log(det) / 2 - Math.log(2 * Math.PI);
    expect(Math.abs(evidence - wanted)).toBeLessThanOrEqual(1e-12);
  });

  test("finds the prior that made its values", () => {
    const random = new Random(seed);
    const points = Array.from({ length: 60 }, () => [random.uniform(), random.uniform()]);
    const lengths = [0.2, 3];
    const K = matrix(60, 60);
    for (const [i, a] of points.entries())
      for (const [j, b] of points.entries()) K.data[i * 60 + j] = matern52(a, b, lengths) + (i === j ? 1e-3 : 0);
    const L = cholesky(K);
    const z = Array.from({ length: 60 }, () => random.normal());
    const values = z.map((_, i) => z.slice(0, i + 1).reduce((sum, x, j) => sum + x * (L.data[i * 60 + j] ?? 0), 0));
    const fitted = fitGaussianProcess(points, values, random);
    const truth = gaussianProcess(points, values, { lengths, noise: 1e-3 });
    expect(fitted.evidence).toBeGreaterThan(truth.evidence - 3);
    expect(fitted.prior.lengths[1] as number).toBeGreaterThan(2 * (fitted.prior.lengths[0] as number));
  });

  test("knows what it was told and little far away", () => {
    const { predict } = gaussianProcess([[0.2], [0.5]], [1, 2], { lengths: [0.1], noise: 1e-6 });
    expect(Math.abs(predict([0.5]).mean - 2)).toBeLessThanOrEqual(1e-4);
    expect(predict([0.5]).deviation).toBeLessThanOrEqual(1e-2);
    expect(Math.abs(predict([5]).mean - 1.5)).toBeLessThanOrEqual(1e-6);
    expect(predict([5]).deviation).toBeGreaterThan(0.49);
  });

  test("expects the improvement that integration finds", () => {
    const belief = { mean: 1.3, deviation: 0.8 };
    const step = 1e-4;
    let sum = 0;
    for (let y = belief.mean - 8; y < 1; y += step)
      sum +=
        ((1 - y) * Math.exp(-(((y - belief.mean) / belief.deviation) ** 2) / 2) * step) /
        (belief.deviation * Math.sqrt(2 * Math.PI));
    expect(Math.abs(expectedImprovement(belief, 1) - sum)).toBeLessThanOrEqual(1e-4);
    expect(expectedImprovement({ mean: 0.5, deviation: 0 }, 1)).toBe(0.5);
    expect(expectedImprovement({ mean: 2, deviation: 0 }, 1)).toBe(0);
    expect(Math.abs(normalCdf(1.959963984540054) - 0.975)).toBeLessThanOrEqual(1e-7);
    expect(Math.abs(normalCdf(-1) - 0.15865525393145707)).toBeLessThanOrEqual(1e-7);
  });
});

const SPACE: SearchSpace = {
  rate: { min: 1e-4, max: 1e-1, log: true },
  rank: { values: [2, 4, 8, 16, 32] },
  targets: { values: ["all-linear", "q_proj,v_proj"] },
};

/** Least, 0.1, at a rate of 3e-3, rank 8 and all layers. */
const loss = ({ rate, rank, targets }: SearchPoint): number =>
  0.1 +
  Math.log10(Number(rate) / 3e-3) ** 2 +
  0.2 * Math.log2(Number(rank) / 8) ** 2 +
  (targets === "all-linear" ? 0 : 0.5);

describe("search", () => {
  test("by Bayesian optimisation comes nearer than at random, with as many trials", () => {
    const run = (next: (trials: readonly SearchTrial[], random: Random) => SearchPoint, i: number): number => {
      const random = new Random(1, i);
      const trials: SearchTrial[] = [];
      while (trials.length < 20) {
        const point = next(trials, random);
        trials.push({ point, value: loss(point) });
      }
      return Math.min(...trials.map(({ value }) => value));
    };
    const runs = Array.from({ length: 7 }, (_, i) => i);
    const bayes = median(runs.map((i) => run((trials, random) => suggestPoint(SPACE, trials, random), i)));
    const blind = median(runs.map((i) => run((_, random) => randomPoint(SPACE, random), 100 + i)));
    expect(bayes).toBeLessThan(0.16);
    expect(bayes).toBeLessThan(blind);
  });

  test("never proposes a point twice while there are others, and counts failures as the worst", () => {
    const space: SearchSpace = { a: { values: [1, 2, 3] }, b: { values: ["x", "y"] } };
    const random = new Random(seed);
    const trials: SearchTrial[] = [];
    for (let i = 0; i < 6; i++) {
      const point = suggestPoint(space, trials, random);
      trials.push({ point, value: i === 2 ? Number.NaN : i });
    }
    expect(new Set(trials.map(({ point }) => JSON.stringify(point))).size).toBe(6);
  });

  test("on a grid takes every combination, ranges by their levels", () => {
    expect(gridPoints({ rate: { min: 1e-3, max: 1e-1, log: true }, rank: { min: 4, max: 5, whole: true } })).toEqual(
      [1e-3, expect.closeTo(1e-2, 10), expect.closeTo(1e-1, 10)].flatMap((rate) =>
        [4, 5].map((rank) => ({ rate, rank })),
      ),
    );
    expect(gridPoints({ on: { values: [true, false] } })).toEqual([{ on: true }, { on: false }]);
  });

  test("refuses a space that is none", () => {
    for (const [space, message] of [
      [{}, "search: a space must have a setting, got none"],
      [{ a: { values: [] } }, 'search: "a" must have a value, got none'],
      [{ a: { min: 2, max: 1 } }, 'search: "a" must have numbers min < max, got 2 and 1'],
      [{ a: { min: 0, max: 1, log: true } }, 'search: "a" must have a min above 0 for its logarithm, got 0'],
      [{ a: { min: 0.5, max: 2, whole: true } }, 'search: "a" must have whole numbers as min and max, got 0.5 and 2'],
    ] as const)
      expect(() => checkSpace(space)).toThrow(message);
  });
});
