// AdamW and clipping against PyTorch's own numbers (f64), five steps, plain and clipped; and against an f64 twin.
import { expect, test } from "vitest";
import { type AdamwOptions, adamwStep } from "../../src/kernels/adamw.ts";
import { globalNorm } from "../../src/kernels/global-norm.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import golden from "../golden/adamw.json" with { type: "json" };
import { expectClose, freshSeed, nd, randomNd, testGpu, upload, zeros } from "../harness.ts";
import { adamwTwin } from "../reference/adamw.ts";

const { lr, betas, eps, weight_decay } = golden.options;
const [beta1 = Number.NaN, beta2 = Number.NaN] = betas;
const base = { learningRate: lr, beta1, beta2, eps, weightDecay: weight_decay };

test.each([
  ["adamw", 0],
  ["adamw_clipped", golden.max_norm],
] as const)("five steps of %s equal PyTorch's", async (which, maxNorm) => {
  const gpu = await testGpu();
  const params = golden.params.map((p) => upload(gpu, nd(p.shape, p.data)));
  const ms = golden.params.map((p) => upload(gpu, zeros(p.shape)));
  const vs = golden.params.map((p) => upload(gpu, zeros(p.shape)));
  for (const [i, name] of (["step0", "step1", "step2", "step3", "step4"] as const).entries()) {
    const grads = golden.grads[name].map((g) => upload(gpu, nd(g.shape, g.data)));
    const clip = globalNorm(grads, maxNorm);
    params.forEach((p, at) => {
      adamwStep(p, grads[at] as Tensor, ms[at] as Tensor, vs[at] as Tensor, { ...base, step: i + 1, clip });
    });
    const expected = golden[which][name];
    if ("norm" in expected) expectClose([(await read(clip))[0] ?? Number.NaN], [expected.norm], 1e-6, `${name} norm`);
    for (const [kind, tensors] of [
      ["params", params],
      ["exp_avg", ms],
      ["exp_avg_sq", vs],
    ] as const)
      for (const [at, t] of tensors.entries())
        expectClose(await read(t), expected[kind][at]?.data ?? [], 1e-6, `${name} ${kind} ${at}`);
  }
});

test.each([[[1]], [[67]], [[13, 31]]])("a late step on %j with clipping equals its f64 twin", async (shape) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [p, g, m] = [randomNd(shape, random), randomNd(shape, random), randomNd(shape, random, 0.1)];
  const v = nd(
    shape,
    randomNd(shape, random, 0.1).data.map((value) => Math.fround(value * value)),
  );
  const [P, G, M, V] = [upload(gpu, p), upload(gpu, g), upload(gpu, m), upload(gpu, v)];
  adamwStep(P, G, M, V, { ...base, step: 1000, clip: tensor(gpu, [4, 0.25], [2]) });
  const expected = adamwTwin(p, g, m, v, { ...base, step: 1000, factor: 0.25 });
  expectClose(await read(P), expected.p.data, 3e-6, "p");
  expectClose(await read(M), expected.m.data, 1e-6, "m");
  expectClose(await read(V), expected.v.data, 1e-6, "v");
  expectClose(await read(G), g.data, 0, "g is left alone");
});

test("adamwStep names what does not fit", async () => {
  const gpu = await testGpu();
  const of = (...shape: number[]) => empty(gpu, shape, "test");
  const p = of(2, 3);
  const options: AdamwOptions = { ...base, step: 1, clip: of(2) };
  expect(() => adamwStep(p, of(3, 2), p, p, options)).toThrow(
    new ShapeError("adamwStep: g must have the shape of p = [2,3], got [3,2]"),
  );
  expect(() => adamwStep(p, p, p, of(6), options)).toThrow(
    new ShapeError("adamwStep: v must have the shape of p = [2,3], got [6]"),
  );
  expect(() => adamwStep(p, p, p, p, { ...options, clip: of(1) })).toThrow(
    new ShapeError("adamwStep: clip must be [norm, factor] = [2], got [1]"),
  );
  expect(() => adamwStep(p, p, p, p, { ...options, step: 0 })).toThrow(
    new ShapeError("adamwStep: step must be a whole number from 1, got 0"),
  );
});
