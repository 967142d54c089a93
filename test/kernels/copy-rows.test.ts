import { expect, test } from "vitest";
import { copyRows, putColumns, takeColumns } from "../../src/kernels/copy-rows.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";
import { freshSeed, randomNd, testGpu, upload } from "../harness.ts";

test.each([
  [1, 1, 1, [], 0],
  [2, 1, 7, [3, 5], 6],
  [3, 4, 9, [2], 2],
  [2, 5, 5, [67], 0],
])("copyRows puts %i×%i rows among %i of shape %j at %i and touches no other", async (B, T, S, W, position) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [source, target] = [randomNd([B, T, ...W], random), randomNd([B, S, ...W], random)];
  const y = upload(gpu, target);
  copyRows(upload(gpu, source), y, position);
  const row = W.reduce((a, b) => a * b, 1);
  const expected = Float32Array.from(target.data, (old, i) => {
    const [b, s, w] = [Math.floor(i / (S * row)), Math.floor(i / row) % S, i % row];
    const t = s - position;
    return t >= 0 && t < T ? (source.data[(b * T + t) * row + w] ?? Number.NaN) : old;
  });
  expect(await read(y)).toEqual(expected);
});

test("copyRows copies i32 too", async () => {
  const gpu = await testGpu();
  const y = tensor(gpu, Int32Array.of(1, 2, 3), [1, 3]);
  copyRows(tensor(gpu, Int32Array.of(-7), [1, 1]), y, 1);
  expect([...(await read(y))]).toEqual([1, -7, 3]);
});

test("copyRows refuses rows past the end, other shapes and other types", async () => {
  const gpu = await testGpu();
  const target = empty(gpu, [2, 4, 3], "target");
  const source = empty(gpu, [2, 2, 3], "source");
  expect(() => copyRows(source, target, 3)).toThrow(
    new ShapeError("copyRows: rows must stay within the 4 of target, got 2 at position 3"),
  );
  expect(() => copyRows(source, target, -1)).toThrow(
    new ShapeError("copyRows: rows must stay within the 4 of target, got 2 at position -1"),
  );
  expect(() => copyRows(empty(gpu, [1, 2, 3], "source"), target, 0)).toThrow(
    new ShapeError("copyRows: source must be [B,T,W…] = [2,2,3], got [1,2,3]"),
  );
  expect(() => copyRows(empty(gpu, [2, 2, 3], "source", "i32"), target, 0)).toThrow(
    new ShapeError("copyRows: source must be f32, got i32"),
  );
});

test("columns outside the matrix, or of other rows, are refused", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3, 4], "x");
  expect(() => takeColumns(x, 2, 3)).toThrow(
    new ShapeError("takeColumns: columns must stay within the 4 of x, got 3 from 2 on"),
  );
  expect(() => putColumns(empty(gpu, [2, 3, 2], "part"), x, 3)).toThrow(
    new ShapeError("putColumns: columns must stay within the 4 of target, got 2 from 3 on"),
  );
  expect(() => putColumns(empty(gpu, [3, 2], "part"), x, 0)).toThrow(
    new ShapeError("putColumns: source must have the rows of target = [2,3,2], got [3,2]"),
  );
});
