import { expect, test } from "vitest";
import { globalNorm } from "../../src/kernels/global-norm.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, randomNd, testGpu, upload } from "../harness.ts";
import { normTwin } from "../reference/adamw.ts";

test.each([
  ["one number", [[1]]],
  ["three tensors", [[7, 3], [67], [1]]],
  ["300 tensors", Array.from({ length: 300 }, (_, i) => [1 + (i % 41), 1 + (i % 7)])],
  ["a million elements", [[1009, 997]]],
])("the norm of %s and its clip factor equal their f64 twin", async (_, shapes) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const grads = shapes.map((shape) => randomNd(shape, random));
  const tensors = grads.map((g) => upload(gpu, g));
  const norm = normTwin(grads);
  const before = gpu.counters().buffersLive;
  const results = [norm / 3, norm * 3, 0].map((maxNorm) => globalNorm(tensors, maxNorm));
  expect(gpu.counters().buffersLive, "only the results are kept").toBe(before + 3);
  const [tight = [], loose = [], off = []] = await Promise.all(results.map((clip) => read(clip)));
  expectClose(tight, [norm, norm / 3 / (norm + 1e-6)], 1e-6);
  expectClose(loose, [norm, 1], 1e-6);
  expectClose(off, [norm, 1], 1e-6);
  expect([loose[1], off[1]]).toEqual([1, 1]);
  expect(await read(globalNorm(tensors, norm / 3)), "repeats bit for bit").toEqual(tight);
  gpu.release(...tensors, ...results);
});

test("gradients that lack a factor have the norm and the clip factor of their products with it", async () => {
  const gpu = await testGpu();
  const g = randomNd([67], new Random(freshSeed()));
  const t = upload(gpu, g);
  const norm = 0.25 * normTwin([g]);
  for (const s of [0.25, () => 0.25]) {
    const results = [norm / 3, norm * 3, 0].map((maxNorm) => globalNorm([t], maxNorm, s));
    const [tight = [], loose = [], off = []] = await Promise.all(results.map((clip) => read(clip)));
    expectClose(tight, [norm, (0.25 * (norm / 3)) / (norm + 1e-6)], 1e-6);
    for (const clip of [loose, off]) expectClose(clip, [norm, 0.25], 1e-6);
    gpu.release(...results);
  }
  const infinite = tensor(gpu, [Number.POSITIVE_INFINITY], [1]);
  expect([...(await read(globalNorm([infinite], 0, 0.25)))]).toEqual([Number.POSITIVE_INFINITY, 0.25]);
  gpu.release(t, infinite);
});

test.each([
  ["NaN", Number.NaN, 1, [Number.NaN, Number.NaN]],
  ["NaN without clipping", Number.NaN, 0, [Number.NaN, 1]],
  ["infinity", Number.POSITIVE_INFINITY, 1, [Number.POSITIVE_INFINITY, 0]],
  ["a square past f32", 1e30, 1, [Number.POSITIVE_INFINITY, 0]],
  ["minus infinity without clipping", Number.NEGATIVE_INFINITY, 0, [Number.POSITIVE_INFINITY, 1]],
])("a gradient with %s shows in the norm", async (_, value, maxNorm, expected) => {
  const gpu = await testGpu();
  const grads = [tensor(gpu, [1, 2, 3], [3]), tensor(gpu, [1, value, 3, 4, 5], [5])];
  expect([...(await read(globalNorm(grads, maxNorm)))]).toEqual(expected);
});

test("gradients of zero are not clipped", async () => {
  const gpu = await testGpu();
  expect([...(await read(globalNorm([tensor(gpu, [0, 0], [2])], 1)))]).toEqual([0, 1]);
});

test("globalNorm names a missing gradient and a negative limit", async () => {
  const gpu = await testGpu();
  expect(() => globalNorm([], 1)).toThrow(new ShapeError("globalNorm: there must be at least one gradient, got none"));
  expect(() => globalNorm([empty(gpu, [1], "g")], -1)).toThrow(
    new ShapeError("globalNorm: maxNorm must be 0 (no clipping) or more, got -1"),
  );
});
