import { expect, test } from "vitest";
import { type Layout, matmul } from "../../src/kernels/matmul.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { empty } from "../../src/tensor/tensor.ts";
import { checkOp, testGpu } from "../harness.ts";
import { matmulTwin } from "../reference/matmul.ts";

const shapes = (layout: Layout, M: number, N: number, K: number): [number[], number[]] => [
  layout === "tn" ? [K, M] : [M, K],
  layout === "nt" ? [N, K] : [K, N],
];

const SIZES: [M: number, N: number, K: number][] = [
  [1, 1, 1],
  [8, 8, 8],
  [7, 9, 7],
  [9, 7, 9],
  [17, 17, 17],
  [1, 64, 32],
  [4, 12, 20],
  [8, 64, 17],
  [37, 53, 29],
  [64, 60, 68],
  [20, 28, 31],
];

for (const layout of ["nn", "nt", "tn"] as const)
  test.each(SIZES)(`matmul ${layout} of %i×%i over %i equals its f64 twin`, async (M, N, K) => {
    await checkOp({
      inputs: shapes(layout, M, N, K),
      op: (x, w) => matmul(x, w, layout, { scale: 0.5 }),
      twin: (x, w) => matmulTwin(x, w, layout, 0.5),
      gradients: false,
    });
  });

for (const layout of ["nn", "nt"] as const)
  test.each([
    [5, 8, 12, 1],
    [9, 16, 8, 3],
    [17, 20, 24, 8],
    [3, 5, 7, 2],
  ])(`matmul ${layout} with LoRA columns, %i×%i over %i and rank %i, equals its f64 twin`, async (M, N, K, R) => {
    const [x, w] = shapes(layout, M, N, K);
    await checkOp({
      inputs: [x, w, [M, R], layout === "nt" ? [N, R] : [R, N]],
      op: (...[X, W, u, b]) => {
        if (!X || !W || !u || !b) throw new Error("four inputs");
        return matmul(X, W, layout, { lowRank: { u, b, scale: 2 } });
      },
      twin: (...[X, W, u, b]) => {
        if (!X || !W || !u || !b) throw new Error("four inputs");
        return matmulTwin(X, W, layout, 1, { u, b, c: 2 });
      },
      gradients: false,
    });
  });

test.each(["nn", "nt", "tn"] as const)("matmul %s multiplies batches pairwise", async (layout) => {
  const [x, w] = shapes(layout, 12, 8, 16);
  await checkOp({
    inputs: [
      [3, ...x],
      [3, ...w],
    ],
    op: (X, W) => matmul(X as never, W as never, layout),
    twin: (X, W) => matmulTwin(X as never, W as never, layout),
    gradients: false,
  });
});

test("matmul folds the leading axes of x into rows when w is one matrix", async () => {
  const gpu = await testGpu();
  const y = matmul(empty(gpu, [2, 3, 8], "x"), empty(gpu, [5, 8], "w"), "nt");
  expect(y.shape).toEqual([2, 3, 5]);
});

test("matmul names the shapes that do not fit", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3], "x");
  const w = empty(gpu, [4, 5], "w");
  expect(() => matmul(x, w)).toThrow(
    new ShapeError('matmul: the inner sizes of "nn" must be equal, got x [2,3] with 3 and w [4,5] with 4'),
  );
  expect(() => matmul(empty(gpu, [3], "x"), w)).toThrow(
    new ShapeError("matmul: x and w must have at least two axes, got [3] and [4,5]"),
  );
  expect(() => matmul(empty(gpu, [2, 2, 4], "x"), empty(gpu, [3, 4, 5], "w"))).toThrow(
    new ShapeError("matmul: the leading axes of x and w must be equal, got x [2,2,4] and w [3,4,5]"),
  );
  expect(() => matmul(x, empty(gpu, [3, 5], "w"), "nn", { lowRank: { u: w, b: w, scale: 1 } })).toThrow(
    new ShapeError("matmul: u must be [M,R] = [2,5], got [4,5]"),
  );
});
