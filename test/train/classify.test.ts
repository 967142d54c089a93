import { expect, test } from "vitest";
import { add, mul, scale, sum } from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadClassifier } from "../../src/models/load-classifier.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { read, readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import {
  type ClassificationRow,
  type ClassifierOutputs,
  classificationLoss,
  classificationTask,
  collateClassification,
  evaluateClassifier,
  type WeightedLoss,
} from "../../src/train/classify.ts";
import { classificationMetrics } from "../../src/train/metrics.ts";
import type { StepMetrics } from "../../src/train/step-metrics.ts";
import { trainTask } from "../../src/train/trainer.ts";
import { expectClose, testGpu } from "../harness.ts";

const LIMITS = { vocabSize: 64, tokenTypes: 2, padId: 0, labels: ["no", "yes", "maybe"] };

/** Rows of 3 to 6 tokens that begin with their class's token. */
const ROWS: readonly ClassificationRow[] = Array.from({ length: 8 }, (_, i) => ({
  inputIds: [4, 10 + (i % 3), ...Array.from({ length: 1 + (i % 4) }, (_unused, t) => 20 + ((5 * i + 3 * t) % 30))],
  label: i % 3,
}));

const openModel = async (name = "bert") => {
  const model = await loadClassifier(await testGpu(), diskDirectory(`test/golden/models/${name}`));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" }, 1);
  return { model, adapter, end: () => [adapter.detach(), model.destroy()] };
};

/** Σ logits² over the rows. */
const squares = ({ logits, scale: s }: ClassifierOutputs): Tensor => scale(sum(mul(logits, logits)), s);

async function metricsOf(run: AsyncGenerator<StepMetrics>): Promise<StepMetrics[]> {
  const all: StepMetrics[] = [];
  for await (const metrics of run) all.push(metrics);
  return all;
}

test("the loss is the mean over the rows", async () => {
  const gpu = await testGpu();
  const [logits, labels] = [tensor(gpu, [1, 2, 0, 0], [2, 2]), tensor(gpu, Int32Array.of(0, 1), [2])];
  const loss = gpu.scope(() => classificationLoss({ logits, labels, scale: 1 / 2 }));
  expectClose(await read(loss), [(Math.log(1 + Math.E) + Math.log(2)) / 2], 1e-6);
  gpu.release(logits, labels, loss);
});

test("two classes: loss, accuracy, F1 and AUC are those worked out by hand", () => {
  // Scores of class 1 against class 0: −1, 2, −1, ½, ½. Predicted: 0, 1, 0, 1, 1. Of class 1 two hits, one false alarm, one miss.
  const scores = [-1, 2, -1, 0.5, 0.5];
  const found = classificationMetrics(
    scores.flatMap((score, i) => [i, i + score]),
    [0, 1, 1, 0, 1],
    2,
  );
  const loss = [-1, -2, 1, 0.5, -0.5].reduce((total, x) => total + Math.log(1 + Math.exp(x)), 0) / 5;
  expect(found.loss).toBeCloseTo(loss, 12);
  expect(found.accuracy).toBeCloseTo(3 / 5, 12);
  expect(found.f1).toBeCloseTo(2 / 3, 12);
  expect(found.macroF1).toBeCloseTo((2 / 3 + 1 / 2) / 2, 12);
  // Of the six pairs of a positive and a negative, three are won, two tied and one lost.
  expect(found.auc).toBeCloseTo(4 / 6, 12);
});

test("three classes have no binary F1 and no AUC; a class that is only predicted counts, one that is nowhere does not", () => {
  const of = (predicted: number[], labels: number[]) =>
    classificationMetrics(
      predicted.flatMap((p) => [0, 1, 2].map((c) => Number(c === p))),
      labels,
      3,
    );
  const found = of([0, 1, 1], [0, 0, 1]);
  expect(found).not.toHaveProperty("f1");
  expect(found).not.toHaveProperty("auc");
  expect(found.macroF1).toBeCloseTo(2 / 3, 12); // 2/3 each, and class 2 is nowhere
  expect(of([0, 2], [0, 1]).macroF1).toBeCloseTo(1 / 3, 12);
});

test("one class alone has no AUC; F1 of a class that is neither there nor predicted is 0", () => {
  const found = classificationMetrics([1, 0, 2, 0], [0, 0], 2);
  expect(found).not.toHaveProperty("auc");
  expect(found.f1).toBe(0);
  expect(found.macroF1).toBe(1);
});

test("AUC is ½ of equal scores, 1 and 0 of perfect ones", () => {
  const of = (scores: number[]) =>
    classificationMetrics(
      scores.flatMap((score) => [0, score]),
      [0, 1, 0, 1],
      2,
    ).auc;
  expect(of([7, 7, 7, 7])).toBe(0.5);
  expect(of([1, 3, 2, 4])).toBe(1);
  expect(of([4, 2, 3, 1])).toBe(0);
});

test("metrics need rows, and logits for each", () => {
  expect(() => classificationMetrics([], [], 2)).toThrow(
    new ShapeError("classificationMetrics: at least one row is needed, got none"),
  );
  expect(() => classificationMetrics([1, 2, 3], [0, 1], 2)).toThrow(
    new ShapeError("classificationMetrics: 2 rows of 2 classes need 4 logits, got 3"),
  );
});

test("rows lie side by side, padded to the longest, with their masks' padding taken off", () => {
  const batch = collateClassification(
    [
      { inputIds: [4, 5, 6], tokenTypeIds: [0, 0, 1], label: 2 },
      { inputIds: [7, 0, 0], attentionMask: [1, 0, 0], label: 0 },
    ],
    LIMITS,
  );
  expect(batch).toEqual({
    ids: Int32Array.of(4, 5, 6, 7, 0, 0),
    tokenTypes: Int32Array.of(0, 0, 1, 0, 0, 0),
    lengths: Int32Array.of(3, 1),
    labels: Int32Array.of(2, 0),
    ...{ B: 2, T: 3 },
  });
});

test("padding that rows bring along makes no batch longer, and lengths are few", () => {
  const row = (tokens: number): ClassificationRow => ({
    inputIds: Array.from({ length: 40 }, (_, t) => (t < tokens ? 5 : 0)),
    attentionMask: Array.from({ length: 40 }, (_, t) => Number(t < tokens)),
    label: 0,
  });
  const lengths = [3, 16, 17, 35].map((tokens) => collateClassification([row(tokens), row(1)], LIMITS, 40).T);
  expect(lengths).toEqual([16, 16, 32, 40]);
});

test.each<[ClassificationRow, string]>([
  [{ inputIds: [], label: 0 }, "a row must have at least one token, got none"],
  [{ inputIds: [4], attentionMask: [0], label: 0 }, "a row must have at least one token, got none"],
  [
    { inputIds: [4, 0, 5], attentionMask: [1, 0, 1], label: 0 },
    "attentionMask must be ones and then zeros, got [1,0,1]. Only padding on the right is supported",
  ],
  [
    { inputIds: [0, 4], attentionMask: [0, 1], label: 0 },
    "attentionMask must be ones and then zeros, got [0,1]. Only padding on the right is supported",
  ],
  [
    { inputIds: [4, 5], attentionMask: [1, 2], label: 0 },
    "attentionMask must be ones and then zeros, got [1,2]. Only padding on the right is supported",
  ],
  [{ inputIds: [4, 5], attentionMask: [1], label: 0 }, "attentionMask must be as many as inputIds, 2, got 1"],
  [{ inputIds: [4, 5], tokenTypeIds: [0], label: 0 }, "tokenTypeIds must be as many as inputIds, 2, got 1"],
  [{ inputIds: [4, 64], label: 0 }, "inputIds must be whole numbers from 0 to 63, got 64"],
  [{ inputIds: [4], tokenTypeIds: [2], label: 0 }, "tokenTypeIds must be whole numbers from 0 to 1, got 2"],
  [{ inputIds: [4], label: 3 }, "label must be whole numbers from 0 to 2, got 3"],
  [{ inputIds: [4], label: 0.5 }, "label must be whole numbers from 0 to 2, got 0.5"],
  [
    { inputIds: [4, 0], label: 0 },
    "padding must be left out, or be 0 in attentionMask, got its id 0 among the tokens of a row",
  ],
])("%j is refused", (row, message) => {
  expect(() => collateClassification([row], LIMITS)).toThrow(new ShapeError(`collateClassification: ${message}`));
});

test("a batch needs a row, and an evaluation a batch size", async () => {
  expect(() => collateClassification([], LIMITS)).toThrow(
    new ShapeError("collateClassification: a batch must have at least one row, got none"),
  );
  const { model, end } = await openModel();
  await expect(evaluateClassifier(model, ROWS, 0)).rejects.toThrow(
    new ShapeError("evaluateClassifier: batchSize must be a whole number of at least 1, got 0"),
  );
  end();
});

test("training tells the classes of the rows it trains on, and evaluation says so, whatever its batches", async () => {
  const { model, adapter, end } = await openModel();
  const before = await evaluateClassifier(model, ROWS, 8);
  const run = { parameters: adapter.parameters, rows: ROWS, batchSize: 4, shuffleSeed: 1, adapter };
  const metrics = await metricsOf(
    trainTask({ ...run, task: classificationTask(model), steps: 30, learningRate: 1e-2 }),
  );
  const after = await evaluateClassifier(model, ROWS, 8);
  expect(after.loss).toBeLessThan(before.loss / 4);
  expect(after.accuracy).toBe(1);
  expect(metrics.at(-1)).not.toHaveProperty("losses");
  const small = await evaluateClassifier(model, ROWS, 3);
  expect(small.loss).toBeCloseTo(after.loss, 5);
  const task = classificationTask(model);
  const [loss] = model.gpu.scope(() => task.load(task.collate(ROWS, 6)).losses(1 / ROWS.length));
  expectClose(await read(loss ?? expect.fail("a loss")), [after.loss], 1e-5, "on the device and on the host");
  end();
});

test("a weighted sum of losses is trained on, and each is told", async () => {
  const { model, adapter, end } = await openModel("bert");
  const { gpu } = model;
  const losses = {
    classification: { weight: 1, value: classificationLoss },
    squares: { weight: 0.25, value: squares },
  } satisfies Record<string, WeightedLoss>;
  const batch = collateClassification(ROWS, model.config);
  const found = gpu.scope(() => {
    const [main, more] = classificationTask(model, losses)
      .load(batch)
      .losses(1 / ROWS.length) as [Tensor, Tensor];
    const total = add(main, scale(more, 0.25));
    return { main, more, total, grads: backward(total) };
  });
  const [[main = 0] = [], [more = 0] = [], [total = 0] = []] = await readAll([found.main, found.more, found.total]);
  const gradients = await readAll([...found.grads.values()]);
  const norm = Math.sqrt(gradients.flatMap((values) => [...values]).reduce((sum_, v) => sum_ + v * v, 0));
  expect(more).toBeGreaterThan(0.1);
  for (const options of [{ batchSize: 8 }, { batchSize: 4, gradAccumulation: 2 }, { batchSize: 8, eager: true }]) {
    const run = { parameters: adapter.parameters, rows: ROWS, steps: 2, learningRate: 0 };
    for (const metrics of await metricsOf(trainTask({ ...run, ...options, task: classificationTask(model, losses) }))) {
      expect(Object.keys(metrics.losses ?? {})).toEqual(["classification", "squares"]);
      expectClose([metrics.loss, metrics.losses?.classification ?? 0], [total, main], 1e-5, JSON.stringify(options));
      expectClose([metrics.losses?.squares ?? 0, metrics.grad_norm], [more, norm], 1e-4, JSON.stringify(options));
    }
  }
  end();
});

test("a single loss can have a weight too", async () => {
  const { model, adapter, end } = await openModel("bert");
  const run = { parameters: adapter.parameters, rows: ROWS, steps: 1, batchSize: 8, learningRate: 0 };
  const of = async (weight: number) =>
    (
      await metricsOf(
        trainTask({ ...run, task: classificationTask(model, { main: { weight, value: classificationLoss } }) }),
      )
    )[0];
  const [one, half] = [await of(1), await of(0.5)];
  expectClose([half?.loss ?? 0, half?.grad_norm ?? 0], [(one?.loss ?? 0) / 2, (one?.grad_norm ?? 0) / 2], 1e-5);
  end();
});
