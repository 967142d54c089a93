import { expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { BertClassifier } from "../../src/models/bert.ts";
import { loadClassifier } from "../../src/models/load-classifier.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import {
  cholesky,
  choleskySolve,
  type Matrix,
  matrix,
  multiply,
  symmetricEigen,
  transpose,
} from "../../src/tensor/linalg.ts";
import { Random } from "../../src/tensor/random.ts";
import { readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { batchLogits, type ClassificationRow, classificationTask, classifierLogits } from "../../src/train/classify.ts";
import { bestPrecision, curvatureOf, drawOffset, logEvidence, outputCovariance } from "../../src/train/laplace.ts";
import { classifierCurvature, meanSoftmax, predictClasses, softmax } from "../../src/train/laplace-classify.ts";
import { calibrationMetrics, predictionOf } from "../../src/train/metrics.ts";
import { trainTask } from "../../src/train/trainer.ts";
import { expectClose, freshSeed, testGpu } from "../harness.ts";

/** Of two parameters, [7] and [5,1]. */
const P = 12;

/** Parameters, and gradients on them that are the rows of X [·,12]; the values are `Math.fround`ed. */
async function linearModel(theta: readonly number[]) {
  const gpu = await testGpu();
  const split = (row: ArrayLike<number>): Tensor[] => [
    tensor(gpu, Float32Array.from(row).slice(0, 7), [7]),
    tensor(gpu, Float32Array.from(row).slice(7), [5, 1]),
  ];
  const parameters = split(theta);
  const gradients = (X: Matrix) =>
    Array.from({ length: X.rows }, (_, n) => () => {
      const parts = split(X.data.slice(n * P, (n + 1) * P));
      return new Map(parameters.map((p, i) => [p, parts[i] as Tensor]));
    });
  return { parameters, gradients, end: () => gpu.release(...parameters) };
}

const gaussian = (rows: number, columns: number, random: Random, std = 1): Matrix =>
  matrix(
    rows,
    columns,
    Float64Array.from({ length: rows * columns }, () => Math.fround(random.normal(0, std))),
  );

const identity = (n: number, scale = 1): Matrix =>
  matrix(
    n,
    n,
    Float64Array.from({ length: n * n }, (_, p) => (p % (n + 1) === 0 ? scale : 0)),
  );

const plus = (A: Matrix, B: Matrix, factor = 1): Matrix =>
  matrix(
    A.rows,
    A.columns,
    A.data.map((x, p) => x + factor * (B.data[p] ?? Number.NaN)),
  );

/** XᵀX + τ·I */
const precisionOf = (X: Matrix, tau: number): Matrix => plus(multiply(transpose(X), X), identity(X.columns, tau));

/** J·(XᵀX + τ·I)⁻¹·Jᵀ */
const closedForm = (X: Matrix, tau: number, J: Matrix): Matrix =>
  multiply(J, choleskySolve(cholesky(precisionOf(X, tau)), transpose(J)));

const logDeterminant = (A: Matrix): number =>
  2 *
  Array.from({ length: A.rows }, (_, i) => Math.log(cholesky(A).data[i * (A.rows + 1)] ?? 0)).reduce((a, b) => a + b);

test.each([
  [1, 16, "one observation"],
  [6, 16, "fewer observations than parameters"],
  [40, 16, "more, in two blocks"],
  [300, 12, "many blocks of the smallest rank that is exact"],
])(
  "%i observations of a linear model with Gaussian noise: the posterior is the closed form (rank %i: %s)",
  async (N, rank) => {
    const seed = freshSeed();
    const random = new Random(seed);
    const { parameters, gradients, end } = await linearModel(new Array(P).fill(0.5));
    const [X, J] = [gaussian(N, P, random), gaussian(3, P, random)];
    const curvature = await curvatureOf(parameters, gradients(X), rank);
    expect(curvature.values.length).toBe(Math.min(N, P));
    expect(curvature.squaredNorm).toBe(P / 4);
    for (const tau of [0.05, 1, 20]) {
      const found = await outputCovariance(curvature, tau, gradients(J));
      expectClose(found.data, closedForm(X, tau, J).data, 2e-4, `seed ${seed}, τ ${tau}`);
    }
    curvature.destroy();
    end();
  },
);

test("what is beyond the rank is spread over the other directions: the posterior of that matrix, of the same trace", async () => {
  const random = new Random(freshSeed());
  const { parameters, gradients, end } = await linearModel(new Array(P).fill(1));
  const [X, J, tau] = [gaussian(6, P, random), gaussian(4, P, random), 0.7];
  const curvature = await curvatureOf(parameters, gradients(X), 3);
  const { values, vectors } = symmetricEigen(multiply(transpose(X), X));
  expectClose(curvature.values, values.slice(0, 3), 1e-4);
  const rest = values.slice(3).reduce((a, b) => a + b) / (P - 3);
  expectClose([curvature.rest], [rest], 1e-4);
  const spread = values.map((value, i) => Math.sqrt(i < 3 ? value : rest));
  const Y = matrix(
    P,
    P,
    transpose(vectors).data.map((x, p) => x * (spread[Math.floor(p / P)] ?? 0)),
  );
  expectClose((await outputCovariance(curvature, tau, gradients(J))).data, closedForm(Y, tau, J).data, 2e-4);
  const whole = (P * Math.log(tau) - logDeterminant(precisionOf(Y, tau)) - tau * P) / 2;
  expectClose([logEvidence(curvature, tau)], [whole], 1e-4);
  const best = bestPrecision(curvature);
  for (const factor of [0.9, 1.1])
    expect(logEvidence(curvature, best)).toBeGreaterThan(logEvidence(curvature, best * factor));
  curvature.destroy();
  end();
});

test.each([8, 3])(
  "draws have the covariance of the posterior: the root of it is applied to the noise (rank %i)",
  async (rank) => {
    const random = new Random(freshSeed());
    const { parameters, gradients, end } = await linearModel(new Array(P).fill(1));
    const [X, tau] = [gaussian(8, P, random), 0.5];
    const curvature = await curvatureOf(parameters, gradients(X), rank);
    /** Gives the j-th unit vector for noise. */
    class Unit extends Random {
      #left: number;
      constructor(j: number) {
        super(0);
        this.#left = j;
      }
      override normal(_mean = 0, std = 1): number {
        return this.#left-- === 0 ? std : 0;
      }
    }
    const columns: number[] = [];
    for (let j = 0; j < P; j++) {
      const offset = await drawOffset(curvature, tau, new Unit(j));
      expect(offset.map(({ shape }) => shape)).toEqual([[7], [5, 1]]);
      columns.push(...(await readAll(offset)).flatMap((part) => [...part]));
    }
    const root = matrix(P, P, columns);
    const units = gradients(identity(P));
    expectClose(multiply(transpose(root), root).data, (await outputCovariance(curvature, tau, units)).data, 1e-4);
    curvature.destroy();
    end();
  },
);

test("the evidence is that of the whole posterior, and the best precision is where its slope is 0", async () => {
  const random = new Random(freshSeed());
  const theta = gaussian(1, P, random);
  const { parameters, gradients, end } = await linearModel([...theta.data]);
  const X = gaussian(9, P, random);
  const curvature = await curvatureOf(parameters, gradients(X));
  const squaredNorm = theta.data.reduce((sum, x) => sum + x * x, 0);
  const whole = (tau: number): number =>
    (P * Math.log(tau) - logDeterminant(precisionOf(X, tau)) - tau * squaredNorm) / 2;
  for (const tau of [0.01, 1, 100]) expectClose([logEvidence(curvature, tau)], [whole(tau)], 1e-4, `τ ${tau}`);
  const best = bestPrecision(curvature);
  const slope = (whole(best * 1.0001) - whole(best / 1.0001)) / Math.log(1.0001 ** 2);
  expect(Math.abs(slope)).toBeLessThan(1e-3);
  for (const factor of [0.5, 0.9, 1.1, 2])
    expect(logEvidence(curvature, best)).toBeGreaterThan(logEvidence(curvature, best * factor));
  curvature.destroy();
  end();
});

test("what no posterior can be made of is refused", async () => {
  const { parameters, gradients, end } = await linearModel(new Array(P).fill(0));
  await expect(curvatureOf(parameters, gradients(identity(P)), 0)).rejects.toThrow(
    new ShapeError("curvatureOf: rank must be a whole number of at least 1, got 0"),
  );
  const nothing = "curvatureOf: gradients must be finite and one of them above 0, got a sum of squares of";
  await expect(curvatureOf(parameters, [])).rejects.toThrow(new ShapeError(`${nothing} 0`));
  await expect(curvatureOf(parameters, gradients(matrix(2, P)))).rejects.toThrow(new ShapeError(`${nothing} 0`));
  const bad = matrix(1, P, new Float64Array(P).fill(Number.NaN));
  await expect(curvatureOf(parameters, gradients(bad))).rejects.toThrow(new ShapeError(`${nothing} NaN`));
  expect(() => bestPrecision({ values: Float64Array.of(1), rest: 0, size: 1, squaredNorm: 0 })).toThrow(
    new ShapeError("bestPrecision: parameters must not all be 0, got a norm of 0. Give the precision"),
  );
  end();
});

test("the mean of a softmax over Gaussian logits: without variance the softmax, with much of it undecided", () => {
  const random = new Random(1);
  expectClose(meanSoftmax([1, 2, 0.5], matrix(3, 3), 5, random), softmax([1, 2, 0.5]), 1e-12);
  // Of two classes, E σ(z) of z ~ N(m, v): by a sum over a fine grid.
  const [m, v] = [1.5, 4];
  let [sum, total] = [0, 0];
  for (let t = -8; t <= 8; t += 1e-3) {
    const weight = Math.exp((-t * t) / 2);
    sum += weight / (1 + Math.exp(-(m + Math.sqrt(v) * t)));
    total += weight;
  }
  const [, found = 0] = meanSoftmax([0, m], matrix(2, 2, [v / 2, 0, 0, v / 2]), 40_000, random);
  expect(Math.abs(found - sum / total)).toBeLessThan(0.01); // about six standard errors
});

/** Rows of two classes: six tokens tell the class, three tell nothing, and one label in five is wrong. */
function noisyRows(count: number, random: Random): ClassificationRow[] {
  return Array.from({ length: count }, () => {
    const told = random.below(2);
    const others = Array.from({ length: 3 }, () => 20 + random.below(30));
    const inputIds = [4, ...new Array<number>(6).fill(10 + told), ...others];
    return { inputIds, label: random.uniform() < 0.2 ? 1 - told : told };
  });
}

/** A classifier that has learned the noise in its rows. One for all tests. */
let trained: Promise<{ model: BertClassifier; parameters: Tensor[]; rows: ClassificationRow[] }> | undefined;
async function overTrain() {
  const gpu = await testGpu();
  const model = await loadClassifier(gpu, diskDirectory("test/golden/models/bert"), { newClasses: 2, seed: 3 });
  const adapter = attachLora(model, { r: 2, alpha: 8, targetModules: "all-linear" }, 1);
  const rows = noisyRows(40, new Random(11));
  const { parameters } = adapter;
  const run = { parameters, rows, steps: 150, batchSize: 10, learningRate: 3e-3, shuffleSeed: 1, adapter };
  for await (const _ of trainTask({ ...run, task: classificationTask(model) }));
  return { model, parameters, rows };
}
const overTrained = () => {
  trained ??= overTrain();
  return trained;
};

test("a classifier's covariance is that of its generalised Gauss-Newton matrix, in f64", async () => {
  const { model, parameters, rows } = await overTrained();
  const seen = rows.slice(0, 8);
  const gradient = async (row: ClassificationRow, weights: readonly number[]): Promise<number[]> => {
    const grads = model.gpu.scope(() => {
      const found = backward(batchLogits(model, [row]), tensor(model.gpu, weights, [1, 2]));
      return parameters.map((p) => found.get(p) ?? expect.fail("a gradient"));
    });
    const values = await readAll(grads);
    return values.flatMap((part) => [...part]);
  };
  const S: number[] = []; // p·(1 − p)·∇(z₁ − z₀)·∇(z₁ − z₀)ᵀ is the whole curvature of a row with two classes
  for (const row of seen) {
    const [p = 0, q = 0] = softmax(await classifierLogits(model, [row], 1));
    S.push(...(await gradient(row, [-Math.sqrt(p * q), Math.sqrt(p * q)])));
  }
  const size = S.length / seen.length;
  const [other = expect.fail("a row")] = noisyRows(1, new Random(5));
  const J = matrix(2, size, [...(await gradient(other, [1, 0])), ...(await gradient(other, [0, 1]))]);
  const seenS = matrix(seen.length, size, S);
  const tau = 0.3;
  // (SᵀS + τ·I)⁻¹ = (I − Sᵀ·(S·Sᵀ + τ·I)⁻¹·S)/τ
  const across = multiply(seenS, transpose(J));
  const small = cholesky(plus(multiply(seenS, transpose(seenS)), identity(seen.length, tau)));
  const seenPart = multiply(transpose(across), choleskySolve(small, across));
  const expected = plus(multiply(J, transpose(J)), seenPart, -1).data.map((x) => x / tau);
  const curvature = await classifierCurvature(model, parameters, seen);
  expect(curvature.values.length).toBeLessThanOrEqual(seen.length);
  const jacobian = [0, 1].map((c) => () => {
    const unit = tensor(model.gpu, [Number(c === 0), Number(c === 1)], [1, 2]);
    return backward(batchLogits(model, [other]), unit);
  });
  expectClose((await outputCovariance(curvature, tau, jacobian)).data, expected, 2e-3);
  curvature.destroy();
});

test("an over-trained classifier is less sure and closer to the truth on rows it has not seen", async () => {
  const { model, parameters, rows } = await overTrained();
  const held = noisyRows(150, new Random(12));
  const logits = await classifierLogits(model, held, 50);
  const of = (probabilities: readonly (readonly number[])[]) =>
    calibrationMetrics(probabilities.map((p, n) => predictionOf(p, held[n]?.label ?? -1)));
  const before = of(held.map((_, n) => softmax(logits.slice(2 * n, 2 * n + 2))));
  const curvature = await classifierCurvature(model, parameters, rows);
  const tau = bestPrecision(curvature);
  const found = await predictClasses(model, curvature, tau, held);
  const after = of(found);
  expect(before.nll).toBeGreaterThan(1.2); // it is over-trained: as sure as it is wrong
  expect(after.nll).toBeLessThan(before.nll - 0.4);
  expect(after.ece).toBeLessThan(before.ece - 0.1);
  expect(after.brier).toBeLessThan(before.brier - 0.1);
  expect(after.accuracy).toBeGreaterThan(before.accuracy - 0.05);
  const again = await predictClasses(model, curvature, tau, held.slice(0, 3));
  expectClose(again.flat(), found.slice(0, 3).flat(), 1e-5);
  curvature.destroy();
});
