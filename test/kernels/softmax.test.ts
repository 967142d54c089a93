import { expect, test } from "vitest";
import { softmax, softmaxBackward } from "../../src/kernels/softmax.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, nd, testGpu } from "../harness.ts";
import { softmaxTwin } from "../reference/reduce.ts";

test.each([[[1]], [[1, 1]], [[7]], [[3, 5]], [[2, 3, 67]], [[1, 1031]], [[129, 2]]])(
  "softmax of %j equals its f64 twin",
  async (shape) => {
    await checkOp({ inputs: [shape], op: softmax, twin: softmaxTwin, gradients: false, tolerance: 1e-6 });
  },
);

test("softmax is right for inputs of ten thousand, of either sign", async () => {
  const x = nd([4, 3], [1e4, -1e4, 0, 1e4, 1e4, 9999, -1e4, -1e4, -9999, 1e4, -1e4, -1e4]);
  await checkOp({ inputs: [x], op: softmax, twin: softmaxTwin, gradients: false, tolerance: 1e-6 });
});

test("softmax takes more rows than an axis has workgroups", async () => {
  const gpu = await testGpu();
  const M = 65_535 * 64 + 77;
  const y = softmax(tensor(gpu, new Float32Array(M).fill(3), [M, 1]));
  expect((await read(y)).findIndex((value) => value !== 1)).toBe(-1);
  gpu.release(y);
});

test("softmax names the shapes that do not fit", async () => {
  const gpu = await testGpu();
  expect(() => softmax(empty(gpu, [], "x"))).toThrow(new ShapeError("softmax: x must have at least one axis, got []"));
  expect(() => softmaxBackward(empty(gpu, [2], "dy"), empty(gpu, [3], "y"))).toThrow(
    new ShapeError("softmaxBackward: dy must have the shape of y = [3], got [2]"),
  );
});
