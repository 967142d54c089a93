import fc from "fast-check";
import { expect, test } from "vitest";
import { ShapeError } from "../../src/tensor/errors.ts";
import { batchesPerEpoch, batchIndices, collate, type Sampling } from "../../src/train/batches.ts";
import { IGNORED } from "../../src/train/data.ts";

function take(n: number, sampling: Sampling, from = 0): number[][] {
  const batches = batchIndices(sampling, from);
  return Array.from({ length: n }, () => batches.next().value);
}

test("rows are padded on the right and labels are shifted by one", () => {
  const batch = collate(
    [
      { inputIds: [1, 5, 6, 2], labels: [1, 5, 6, 2] },
      { inputIds: [1, 7], labels: [IGNORED, 7] },
      { inputIds: [1, 8, 9], labels: [IGNORED, IGNORED, 9] },
    ],
    0,
  );
  expect({ ...batch, ids: [...batch.ids], labels: [...batch.labels], targets: [...batch.targets] }).toEqual({
    ids: [1, 5, 6, 2, 1, 7, 0, 0, 1, 8, 9, 0],
    targets: [0, 1, 2, 4, 9, -1], // of 12 positions: in steps of a quarter
    labels: [5, 6, 2, IGNORED, 7, IGNORED, IGNORED, IGNORED, IGNORED, 9, IGNORED, IGNORED],
    B: 3,
    T: 4,
    tokens: 5,
  });
});

test("where more than three quarters of the positions have a target, all are listed in order", () => {
  const ids = [1, 5, 6, 2, 3, 4, 7, 8];
  const { targets, tokens } = collate([{ inputIds: ids, labels: ids }], 0);
  expect({ targets: [...targets], tokens }).toEqual({ targets: [0, 1, 2, 3, 4, 5, 6, 7], tokens: 7 });
});

test("padding with an id that is also a label adds no target", () => {
  const rows = [
    { inputIds: [2, 2, 2], labels: [2, 2, 2] },
    { inputIds: [2], labels: [2] },
  ];
  expect(collate(rows, 2).tokens).toBe(2);
});

test("a batch of no rows is refused", () => {
  expect(() => collate([], 0)).toThrow(new ShapeError("collate: a batch must have at least one row, got none"));
});

test("without a seed rows come in the order of the file, and the last batch of an epoch is short", () => {
  expect(take(4, { rows: 5, batchSize: 2 })).toEqual([[0, 1], [2, 3], [4], [0, 1]]);
});

test("a batch larger than the data holds every row once", () => {
  expect(take(2, { rows: 3, batchSize: 8 })).toEqual([
    [0, 1, 2],
    [0, 1, 2],
  ]);
});

test("with a seed each epoch has every row once, in an order of its own that the seed repeats", () => {
  const sampling = { rows: 23, batchSize: 4, seed: 7 };
  const perEpoch = batchesPerEpoch(sampling);
  const [first, second] = [take(perEpoch, sampling).flat(), take(perEpoch, sampling, perEpoch).flat()];
  const inOrder = Array.from({ length: 23 }, (_, i) => i);
  expect(first.toSorted((a, b) => a - b)).toEqual(inOrder);
  expect(second.toSorted((a, b) => a - b)).toEqual(inOrder);
  expect(first).not.toEqual(inOrder);
  expect(first).not.toEqual(second);
  expect(take(perEpoch, sampling).flat()).toEqual(first);
  expect(take(perEpoch, { ...sampling, seed: 8 }).flat()).not.toEqual(first);
});

test("a run that resumes at any batch sees what it would have seen", () => {
  const anySampling = fc.record({
    rows: fc.integer({ min: 1, max: 20 }),
    batchSize: fc.integer({ min: 1, max: 6 }),
    seed: fc.option(fc.nat(), { nil: undefined }),
  });
  fc.assert(
    fc.property(anySampling, fc.nat(60), (sampling, from) => {
      expect(take(5, sampling, from)).toEqual(take(from + 5, sampling).slice(from));
    }),
  );
});

test.each([["rows", { rows: 0, batchSize: 1 }, 0] as const, ["batchSize", { rows: 3, batchSize: 1.5 }, 1.5] as const])(
  "%s that cannot be is refused",
  (name, sampling, value) => {
    expect(() => batchIndices(sampling).next()).toThrow(
      new ShapeError(`batchIndices: ${name} must be a whole number above 0, got ${value}`),
    );
  },
);
