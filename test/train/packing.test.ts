import fc from "fast-check";
import { expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, readAll, type Tensor } from "../../src/tensor/tensor.ts";
import { type Batch, collate, collateRounded, longest } from "../../src/train/batches.ts";
import { IGNORED, type Row } from "../../src/train/data.ts";
import { batchInputs, batchLoss, evaluate, shapeKey } from "../../src/train/loss.ts";
import { packRows, paddingShare } from "../../src/train/packing.ts";
import { train } from "../../src/train/trainer.ts";
import { expectClose, freshSeed, testGpu } from "../harness.ts";

/** Rows of random ids and lengths; in half of them only the later part is learned. */
function randomRows(count: number, longestRow: number, random: Random): Row[] {
  return Array.from({ length: count }, (_, i) => {
    const length = 2 + Math.floor(random.uniform() * (longestRow - 1));
    const inputIds = Array.from({ length }, () => Math.floor(random.uniform() * 64));
    return { inputIds, labels: inputIds.map((id, t) => (i % 2 === 0 && t < length / 2 ? IGNORED : id)) };
  });
}

test("longest rows come first, each to where it leaves the least room", () => {
  const row = (length: number): Row => ({
    inputIds: new Array(length).fill(length),
    labels: new Array(length).fill(length),
  });
  const packed = packRows([row(2), row(7), row(5), row(3), row(4)], 10);
  expect(packed).toEqual([
    { inputIds: [2, 2], labels: [IGNORED, 2], starts: [0] },
    {
      inputIds: [7, 7, 7, 7, 7, 7, 7, 3, 3, 3],
      labels: [IGNORED, 7, 7, 7, 7, 7, 7, IGNORED, 3, 3],
      starts: [0, 7],
    },
    { inputIds: [5, 5, 5, 5, 5, 4, 4, 4, 4], labels: [IGNORED, 5, 5, 5, 5, IGNORED, 4, 4, 4], starts: [0, 5] },
  ]);
});

test("every row is in one packed row, whole, and none is too long", () => {
  fc.assert(
    fc.property(
      fc.array(fc.integer({ min: 1, max: 20 }), { maxLength: 60 }),
      fc.integer({ min: 20, max: 40 }),
      (lengths, most) => {
        const rows = lengths.map((length, i) => ({
          inputIds: new Array(length).fill(i),
          labels: new Array(length).fill(i),
        }));
        const packed = packRows(rows, most);
        const segments = packed.flatMap(({ inputIds, starts = [] }) =>
          starts.map((start, s) => inputIds.slice(start, starts[s + 1] ?? inputIds.length)),
        );
        expect(segments.toSorted((a, b) => (a[0] ?? 0) - (b[0] ?? 0))).toEqual(rows.map(({ inputIds }) => inputIds));
        expect(longest(packed)).toBeLessThanOrEqual(most);
        const fewest = Math.ceil(lengths.reduce((a, b) => a + b, 0) / most);
        expect(packed.length).toBeLessThanOrEqual(Math.max(2 * fewest, 1)); // two bins that are less than half full would be one
      },
    ),
  );
});

test("a row too long, or packed already, is refused", () => {
  const ids = [1, 2, 3];
  expect(() => packRows([{ inputIds: ids, labels: ids }], 2)).toThrow(
    new ShapeError("packRows: a row must have at most maxLength (2) tokens, got 3"),
  );
  expect(() => packRows([{ inputIds: ids, labels: ids, starts: [0] }], 9)).toThrow(
    new ShapeError("packRows: a row must be a segment, got a packed one"),
  );
});

test("a batch of packed rows has positions from the start of each segment; padding is one of its own", () => {
  const packed: Row = { inputIds: [1, 2, 3, 4, 5], labels: [IGNORED, 2, IGNORED, 4, 5], starts: [0, 2] };
  const plain: Row = { inputIds: [6, 7], labels: [6, 7] };
  const { packing, labels, tokens } = collate([packed, plain], 0, 6);
  expect([...(packing?.positions ?? [])]).toEqual([0, 1, 0, 1, 2, 0, 0, 1, 0, 1, 2, 3]);
  expect([...(packing?.starts ?? [])]).toEqual([0, 0, 2, 2, 2, 5, 0, 0, 2, 2, 2, 2]);
  expect([...labels]).toEqual([2, -100, 4, 5, -100, -100, 7, -100, -100, -100, -100, -100]);
  expect(tokens).toBe(4);
});

test("padding is the share of positions without a token", () => {
  const row = (length: number): Row => ({ inputIds: new Array(length).fill(1), labels: new Array(length).fill(1) });
  const rows = [row(16), row(32), row(8)];
  expect(paddingShare(rows, 2)).toBeCloseTo(1 - 56 / (64 + 16), 12); // lengths go in steps of 16
  expect(paddingShare(packRows(rows, 32), 2)).toBeCloseTo(1 - 56 / 64, 12);
});

test("packed rows have the loss and the gradients of the rows alone", async () => {
  const seed = freshSeed();
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj", "down_proj"] }, seed);
  const random = new Random(seed);
  for (const { B } of adapter.pairs.values())
    gpu.write(
      B,
      Float32Array.from({ length: B.size }, () => random.normal(0, 0.1)),
    );
  const rows = randomRows(9, 12, random);
  const run = (batch: Batch) =>
    gpu.scope(() => {
      const loss = batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens);
      return { loss, grads: backward(loss) };
    });
  const packedRows = packRows(rows, 24);
  expect(packedRows.length).toBeLessThan(rows.length);
  const [alone, packed] = [run(collate(rows, 0)), run(collateRounded(packedRows, 0, 24))];
  const [[a = Number.NaN], [b = Number.NaN]] = (await readAll([alone.loss, packed.loss])) as [
    Float32Array,
    Float32Array,
  ];
  expect(Math.abs(a - b) / a, `loss (seed ${seed})`).toBeLessThanOrEqual(1e-5);
  for (const [i, parameter] of adapter.parameters.entries())
    expectClose(
      await read(packed.grads.get(parameter) as Tensor),
      await read(alone.grads.get(parameter) as Tensor),
      1e-5,
      `gradient ${i} (seed ${seed})`,
    );
  const [whole, parts] = [await evaluate(model, rows, 4), await evaluate(model, packedRows, 2)];
  expect(parts.tokens).toBe(whole.tokens);
  expect(Math.abs(parts.loss - whole.loss) / whole.loss).toBeLessThanOrEqual(1e-5);
  gpu.release(alone.loss, packed.loss, ...alone.grads.values(), ...packed.grads.values());
  adapter.detach();
  model.destroy();
});

test("training on packed rows sees as many tokens, in few shapes of batches", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj", "down_proj"] }, 1);
  const rows = randomRows(24, 20, new Random(freshSeed()));
  const packed = packRows(rows, 32);
  const shapes = new Set(
    Array.from({ length: Math.ceil(packed.length / 2) }, (_, i) =>
      shapeKey(collateRounded(packed.slice(2 * i, 2 * i + 2), 0, longest(packed))),
    ),
  );
  expect(shapes.size).toBeLessThanOrEqual(6);
  const losses: number[] = [];
  let tokens = 0;
  const steps = Math.ceil(packed.length / 2);
  const options = { model, parameters: adapter.parameters, rows: packed, steps, batchSize: 2, learningRate: 1e-2 };
  for await (const metrics of train(options)) {
    losses.push(metrics.loss);
    tokens += metrics.tokens;
  }
  expect(tokens).toBe(rows.reduce((sum, { inputIds }) => sum + inputIds.length, 0));
  expect(losses.every(Number.isFinite)).toBe(true);
  adapter.detach();
  model.destroy();
});
