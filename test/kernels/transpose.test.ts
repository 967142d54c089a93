import { expect, test } from "vitest";
import { softCap } from "../../src/kernels/soft-cap.ts";
import { transpose } from "../../src/kernels/transpose.ts";
import { Random } from "../../src/tensor/random.ts";
import { read } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, randomNd, testGpu, upload } from "../harness.ts";

test.each([
  [1, 1],
  [3, 7],
  [64, 65],
  [1, 130],
])("a %i×%i matrix turned around has its elements where they belong", async (M, N) => {
  const gpu = await testGpu();
  const x = randomNd([M, N], new Random(freshSeed()));
  const y = transpose(upload(gpu, x));
  expect(y.shape).toEqual([N, M]);
  expect(await read(y)).toEqual(Float32Array.from(x.data, (_, i) => x.data[(i % M) * N + Math.floor(i / M)] ?? 0));
});

test("soft-capped values equal c·tanh(x/c), however large they are", async () => {
  const gpu = await testGpu();
  const values = [0, -0.1, 1, -2.5, 30, -1e4, 3e38, -3e38];
  const x = upload(gpu, { shape: [values.length], data: Float64Array.from(values) });
  softCap(x, 2.5);
  expectClose(
    await read(x),
    values.map((v) => 2.5 * Math.tanh(v / 2.5)),
    1e-6,
    "capped",
  );
});
