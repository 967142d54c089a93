import { expect, test } from "vitest";
import { reduce, sumTo } from "../../src/kernels/reduce.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, freshSeed, nd, randomNd, testGpu, upload } from "../harness.ts";
import { reduceTwin } from "../reference/reduce.ts";

for (const op of ["sum", "mean", "max"] as const) {
  test.each([
    [[1], undefined],
    [[], undefined],
    [[7], 0],
    [[3, 5], 0],
    [[3, 5], 1],
    [[3, 5], undefined],
    [[2, 3, 5], -2],
    [[512], 0],
    [[513], 0],
    [[2, 1031, 3], 1],
    [[70_001], undefined],
  ] as [number[], number | undefined][])(`${op} of %j over axis %s equals its f64 twin`, async (shape, axis) => {
    for (const keepDims of [false, true])
      await checkOp({
        inputs: [shape],
        op: (x) => reduce(op, x, axis, keepDims),
        twin: (x) => reduceTwin(op, x, axis, keepDims),
        gradients: false,
        // A sum of n values of size 1 is of size √n on its way, whatever cancels at the end.
        tolerance: Math.max(1e-5, 1e-6 * Math.sqrt(op === "sum" ? (shape[axis ?? 0] ?? 1) : 1)),
      });
  });
}

test("max of negative numbers is negative", async () => {
  const gpu = await testGpu();
  expect([...(await read(reduce("max", tensor(gpu, [-3, -1, -2, -7, -5, -6], [2, 3]), 1)))]).toEqual([-1, -5]);
});

test("a sum over millions is accurate and repeats bit for bit", async () => {
  const gpu = await testGpu();
  const x = tensor(
    gpu,
    Float32Array.from({ length: 3_000_017 }, (_, i) => (i % 7) / 8),
    [3_000_017],
  );
  const before = gpu.counters().buffersLive;
  const sums = [await read(reduce("sum", x)), await read(reduce("sum", x))];
  expect(gpu.counters().buffersLive, "only the results are kept").toBe(before + 2);
  const exact = Array.from({ length: 7 }, (_, r) => (Math.ceil((3_000_017 - r) / 7) * r) / 8).reduce((a, b) => a + b);
  expect(Math.abs((sums[0]?.[0] ?? 0) / exact - 1)).toBeLessThanOrEqual(1e-6);
  expect(sums[1]).toEqual(sums[0]);
  gpu.release(x);
});

test.each([
  [
    [2, 3, 5],
    [5],
    [
      [0, false],
      [0, false],
    ],
  ],
  [
    [2, 3, 5],
    [3, 1],
    [
      [2, true],
      [0, false],
    ],
  ],
  [[2, 3, 5], [], [[undefined, false]]],
  [[2, 3, 5], [2, 1, 5], [[1, true]]],
  [[2, 1, 5], [1, 1, 5], [[0, true]]],
  [
    [2, 1, 5],
    [5],
    [
      [0, false],
      [0, false],
    ],
  ],
  [
    [2, 3, 5, 2],
    [1, 3, 1, 2],
    [
      [0, true],
      [2, true],
    ],
  ],
  [
    [1, 1, 4],
    [4],
    [
      [0, false],
      [0, false],
    ],
  ],
] as [number[], number[], [number | undefined, boolean][]][])("sumTo takes %j to %j", async (from, to, steps) => {
  const gpu = await testGpu();
  const x = randomNd(from, new Random(freshSeed()));
  const expected = steps.reduce((partial, [axis, keep]) => reduceTwin("sum", partial, axis, keep), nd(x.shape, x.data));
  const y = sumTo(upload(gpu, x), to);
  expect(y.shape).toEqual(to);
  expectClose(await read(y), expected.data);
});

test("a sum of nothing is 0", async () => {
  const gpu = await testGpu();
  const y = sumTo(empty(gpu, [0, 5], "x"), [5]);
  expect([...(await read(y))]).toEqual([0, 0, 0, 0, 0]);
});

test("sumTo of equal shapes does no work", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3], "x");
  expect(sumTo(x, [2, 3])).toBe(x);
});

test("reduce names the axis that is not there", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3], "x");
  expect(() => reduce("sum", x, 2)).toThrow(new ShapeError("sum: axis must be one of the 2 of [2,3], got 2"));
  expect(() => reduce("mean", x, -3)).toThrow(new ShapeError("mean: axis must be one of the 2 of [2,3], got -3"));
  expect(() => reduce("max", empty(gpu, [2, 0], "x"), 1)).toThrow(
    new ShapeError("max: there must be something to reduce, got [2,0]"),
  );
});
