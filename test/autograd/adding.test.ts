// Gradients that meet: in the kernel that makes the second where it can add, else by a dispatch of their own; and what frozen weights cost.
import { expect, test } from "vitest";
import { add, matmul, scale } from "../../src/autograd/basic-ops.ts";
import { adding, backward, record } from "../../src/autograd/engine.ts";
import { addRmsNorm, gated, rmsNorm } from "../../src/autograd/model-ops.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { dropout } from "../../src/kernels/dropout.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { freshSeed, randomNd, testGpu, upload } from "../harness.ts";

const normal = (gpu: Gpu, ...shape: number[]): Tensor => upload(gpu, randomNd(shape, new Random(freshSeed())));

function trainable(gpu: Gpu, ...shape: number[]): Tensor {
  const t = normal(gpu, ...shape);
  t.requiresGrad = true;
  return t;
}

/** Dispatches of f by kernel; products whatever their plan. */
function dispatches(gpu: Gpu, f: () => void): Record<string, number> {
  gpu.resetCounters();
  f();
  const counts: Record<string, number> = {};
  for (const [name, n] of gpu.counters().dispatches)
    if (name !== "matmul-splits") {
      const id = name.replace(/^(matmul)-.*/, "$1");
      counts[id] = (counts[id] ?? 0) + n;
    }
  return counts;
}

test("gradients of two products meet in the second: no dispatch but theirs, bits that repeat", async () => {
  const gpu = await testGpu();
  const x = trainable(gpu, 5, 8);
  const [w, v, dy] = [normal(gpu, 8, 8), normal(gpu, 8, 8), normal(gpu, 5, 8)];
  const run = (): Tensor | undefined => backward(add(matmul(x, w, "nt"), matmul(x, v, "nt")), dy).get(x);
  expect(dispatches(gpu, run)).toEqual({ binary: 1, matmul: 4 });
  const [first, second] = [run() as Tensor, run() as Tensor];
  expect(await read(first)).toEqual(await read(second));
});

test("a thunk that adds is given what there is, one that does not is added to it", async () => {
  const gpu = await testGpu();
  const x = trainable(gpu, 4);
  const given: (Tensor | undefined)[] = [];
  const use = (adds: boolean): Tensor =>
    record("use", empty(gpu, [4], "use"), [x], (dy) => {
      const thunk = (sum?: Tensor): Tensor => {
        given.push(sum);
        return dy;
      };
      return [adds ? adding(thunk) : thunk];
    });
  const weights = tensor(gpu, [1, 2, 3, 4], [4]);
  backward(add(use(true), use(true)), weights);
  expect(given).toEqual([undefined, weights]);
  given.length = 0;
  const found = backward(add(use(false), use(false)), weights).get(x) as Tensor;
  expect(given).toEqual([undefined, undefined]);
  expect([...(await read(found))]).toEqual([2, 4, 6, 8]);
});

test("a residual and its norm are one dispatch forward and one back, weights frozen", async () => {
  const gpu = await testGpu();
  const [h, delta, w, v] = [trainable(gpu, 3, 16), normal(gpu, 3, 16), normal(gpu, 16), normal(gpu, 3, 16)];
  let out: Tensor | undefined;
  expect(
    dispatches(gpu, () => {
      const first = addRmsNorm(h, delta, w, 1e-5);
      out = addRmsNorm(first.sum, first.y, w, 1e-5).y;
    }),
  ).toEqual({ "rms-norm": 2 });
  expect(dispatches(gpu, () => backward(out as Tensor, v))).toEqual({ "rms-norm-backward": 2 });
});

test("a residual and its norm have the bits of add and rmsNorm, gradients too", async () => {
  const gpu = await testGpu();
  const [h, delta, w, dy] = [trainable(gpu, 7, 36), trainable(gpu, 7, 36), trainable(gpu, 36), normal(gpu, 7, 36)];
  const run = async (fused: boolean): Promise<Float32Array[]> => {
    const sum = fused ? undefined : add(h, delta);
    const both = sum ? { sum, y: rmsNorm(sum, w, 1e-5) } : addRmsNorm(h, delta, w, 1e-5);
    const found = backward(add(scale(both.sum, 3), both.y), dy);
    return Promise.all([both.y, ...[h, delta, w].map((t) => found.get(t) as Tensor)].map(read));
  };
  expect(await run(true)).toEqual(await run(false));
});

test("a gated unit is one dispatch forward and one back", async () => {
  const gpu = await testGpu();
  const [gate, up, dy] = [trainable(gpu, 3, 8), trainable(gpu, 3, 8), normal(gpu, 3, 8)];
  const counts = dispatches(gpu, () => backward(gated(gate, up, "silu"), dy));
  expect(counts).toEqual({ gated: 1, "gated-backward": 1 });
});

test("a traced step draws a new mask each time it runs, that of the same step run eagerly", async () => {
  const gpu = await testGpu();
  const [x, y] = [normal(gpu, 16, 8), empty(gpu, [16, 8], "y")];
  let step = 0;
  const key = { seed: 5, step: () => step, stream: 2 };
  const copy = (t: Tensor): void => {
    if (gpu.place(t, y) !== "placed") throw new Error("y takes the place of what was made");
  };
  const plan = gpu.trace(() => copy(dropout(x, 0.5, key)));
  const seen: Float32Array[] = [];
  for (step = 0; step < 3; step++) {
    plan.run();
    seen.push(await read(y));
    expect(seen[step]).toEqual(await read(dropout(x, 0.5, { ...key, step })));
  }
  expect(seen[1]).not.toEqual(seen[0]);
  expect(seen[2]).not.toEqual(seen[1]);
  plan.destroy();
});
