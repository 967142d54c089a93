import { expect, test } from "vitest";
import { binary, expand } from "../../src/kernels/binary.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, testGpu } from "../harness.ts";
import { binaryTwin } from "../reference/elementwise.ts";

const SHAPES: [a: number[], b: number[]][] = [
  [[], []],
  [[1], [1]],
  [[7], [7]],
  [
    [3, 5],
    [3, 5],
  ],
  [[7], []],
  [[], [2, 3]],
  [[2, 3, 5], [5]],
  [[5], [2, 3, 5]],
  [
    [2, 3, 5],
    [3, 1],
  ],
  [
    [2, 1, 5],
    [3, 1],
  ],
  [
    [4, 1, 3, 1],
    [1, 5, 1, 7],
  ],
  [
    [2, 3, 1, 1, 5, 7],
    [1, 1, 11, 2, 5, 7],
  ],
  [
    [1, 65, 1],
    [1, 1],
  ],
];

for (const op of ["add", "sub", "mul"] as const)
  test.each(SHAPES)(`${op} of [%j] and [%j] equals its f64 twin`, async (a, b) => {
    await checkOp({
      inputs: [a, b],
      op: (p, q) => binary(op, p, q),
      twin: (p, q) => binaryTwin(op, p, q),
      gradients: false,
    });
  });

test("a sum of 5 million elements passes WebGPU's limit of workgroups on an axis", async () => {
  const gpu = await testGpu();
  const n = 5_000_011;
  const values = Float32Array.from({ length: n }, (_, i) => i % 1013);
  const [a, b] = [tensor(gpu, values, [n]), tensor(gpu, values, [n])];
  const y = binary("add", a, b);
  const sums = await read(y);
  gpu.release(a, b, y);
  expect(sums.findIndex((sum, i) => sum !== 2 * (i % 1013))).toBe(-1);
});

test("expand repeats along new axes and axes of size 1", async () => {
  const gpu = await testGpu();
  const y = expand(tensor(gpu, [1, 2, 3], [3, 1]), [2, 3, 2]);
  expect(y.shape).toEqual([2, 3, 2]);
  expect([...(await read(y))]).toEqual([1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3]);
});

test("binary and expand name the shapes that do not broadcast", async () => {
  const gpu = await testGpu();
  const of = (...shape: number[]) => empty(gpu, shape, "test");
  expect(() => binary("mul", of(2, 3), of(2))).toThrow(
    new ShapeError("mul: sizes must be equal or 1, aligned at the last axis, got [2,3] and [2]"),
  );
  expect(() => expand(of(3), [3, 1])).toThrow(new ShapeError("expand: [3] cannot be repeated to the shape [3,1]"));
  expect(() => binary("add", of(2, 1, 2, 1, 2), of(1, 2, 1, 2, 1))).toThrow(
    new ShapeError("add: operands may alternate over at most 4 groups of axes, got [2,1,2,1,2] and [1,2,1,2,1]"),
  );
});
