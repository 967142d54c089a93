import { expect, test } from "vitest";
import { ShapeError } from "../../src/tensor/errors.ts";
import { splitRows } from "../../src/train/data/split.ts";

const rows = Array.from({ length: 40 }, (_, i) => i);

test("a share of the rows is held out, by the seed, and both parts keep their order", () => {
  const { train, valid } = splitRows(rows, 0.1, 3);
  expect(valid).toHaveLength(4);
  expect([...train, ...valid].toSorted((a, b) => a - b)).toEqual(rows);
  expect(train).toEqual(train.toSorted((a, b) => a - b));
  expect(valid).toEqual(valid.toSorted((a, b) => a - b));
  expect(splitRows(rows, 0.1, 3).valid).toEqual(valid);
  expect(splitRows(rows, 0.1, 4).valid).not.toEqual(valid);
});

test("at least one row is held out", () => {
  expect(splitRows(rows, 0.001, 0).valid).toHaveLength(1);
});

test.each([
  [1, 0.5],
  [40, 1],
  [40, 0],
  [40, 0.99],
])("of %i rows a share of %f is refused", (count, share) => {
  expect(() => splitRows(rows.slice(0, count), share, 0)).toThrow(
    new ShapeError(`splitRows: a share above 0 and below 1 must leave rows to train on, got ${share} of ${count}`),
  );
});
