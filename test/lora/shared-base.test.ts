// Adapters whose rows go through one base: what a layer gives, and who may take part.
import { expect, test } from "vitest";
import { add, mul, sum } from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { initLora } from "../../src/lora/init.ts";
import type { HasLinears } from "../../src/lora/parts.ts";
import { SharedBase } from "../../src/lora/shared-base.ts";
import { type Linear, linears } from "../../src/nn/linear.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, type Tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { matmulTwin } from "../reference/matmul.ts";

interface Model extends HasLinears {
  readonly linears: Map<string, Linear>;
}

function modelOf(gpu: Gpu, widths: Readonly<Record<string, number>>, K: number, random: Random): Model {
  const layer = (N: number): Linear => ({
    weight: upload(gpu, randomNd([N, K], random)),
    bias: upload(gpu, randomNd([N], random)),
  });
  const names = Object.keys(widths);
  return { linears: new Map(Object.entries(widths).map(([name, N]) => [name, layer(N)])), groups: [names] };
}

function attach(model: HasLinears, config: Partial<LoraConfig>, random: Random): LoraAdapter {
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", ...config }, random.below(1000));
  for (const { B } of adapter.pairs.values()) B.gpu.write(B, Float32Array.from(randomNd(B.shape, random).data));
  return adapter;
}

const ndOf = async (t: Tensor): Promise<Nd> => nd(t.shape, await read(t));
const plus = (a: Nd, b: Nd): Nd =>
  nd(
    a.shape,
    a.data.map((value, i) => value + (b.data[i] ?? Number.NaN)),
  );
const rowsOf = ({ shape, data }: Nd, first: number, count: number): Nd => {
  const columns = shape.at(-1) ?? 0;
  return nd([count, columns], data.slice(first * columns, (first + count) * columns));
};

test.each([
  { ranks: [2, 4], rows: [1, 2] }, // the A's of each are one matrix
  { ranks: [1, 3, 7], rows: [2, 0, 1] },
])("rows go through their own adapter, and equal their f64 twins, gradients too: %j", async ({ ranks, rows }) => {
  const seed = freshSeed();
  const random = new Random(seed);
  const gpu = await testGpu();
  const [T, K, widths] = [16, 32, { q: 24, k: 8 }];
  const model = modelOf(gpu, widths, K, random);
  const adapters = ranks.map((r, i) => attach(model, { r, alpha: 3 + i }, random));
  adapters[0]?.setScale(0.5);
  const shared = new SharedBase(adapters);
  const B = rows.reduce((a, b) => a + b);
  const x = randomNd([B * T, K], random);
  const dys = Object.values(widths).map((N) => randomNd([B * T, N], random));
  const input = upload(gpu, nd([B, T, K], x.data));
  input.requiresGrad = true;
  const { ys, grads } = gpu.scope(() =>
    shared.during(rows, () => {
      const made = linears([...model.linears.values()], input);
      const weighted = made.map((y, i) => sum(mul(y, upload(gpu, nd(y.shape, dys[i]?.data ?? [])))));
      return { ys: made, grads: backward(weighted.reduce((a, b) => add(a, b))) };
    }),
  );
  let first = 0;
  for (const [l, adapter] of adapters.entries()) {
    const count = (rows[l] ?? 0) * T;
    const own = rowsOf(x, first, count);
    let dx: Nd | undefined;
    for (const [i, { layer, A, B: right, scale }] of [...adapter.pairs.values()].entries()) {
      const what = `of layer ${i}, adapter ${l} (seed ${seed})`;
      if (count === 0) {
        expect([grads.has(A), grads.has(right)], what).toEqual([false, false]);
        continue;
      }
      const s = scale * (l === 0 ? 0.5 : 1);
      const [W, a, b, bias] = await Promise.all([layer.weight as Tensor, A, right, layer.bias as Tensor].map(ndOf));
      const dy = rowsOf(dys[i] as Nd, first, count);
      const u = matmulTwin(own, a as Nd, "nt");
      const v = matmulTwin(dy, b as Nd, "nn", s);
      const y = plus(matmulTwin(own, W as Nd, "nt"), matmulTwin(u, b as Nd, "nt", s));
      const N = W?.shape[0] ?? 1;
      const expected = y.data.map((value, at) => value + (bias?.data[at % N] ?? Number.NaN));
      const got = rowsOf(nd(dys[i]?.shape ?? [], await read(ys[i] as Tensor)), first, count);
      expectClose(got.data, expected, 2e-5, `y ${what}`);
      expectClose(await read(grads.get(A) as Tensor), matmulTwin(v, own, "tn").data, 1e-4, `dA ${what}`);
      expectClose(await read(grads.get(right) as Tensor), matmulTwin(dy, u, "tn", s).data, 1e-4, `dB ${what}`);
      const part = plus(matmulTwin(dy, W as Nd, "nn"), matmulTwin(v, a as Nd, "nn"));
      dx = dx ? plus(dx, part) : part;
    }
    const got = nd(x.shape, await read(grads.get(input) as Tensor));
    expectClose(rowsOf(got, first, count).data, dx?.data ?? [], 1e-4, `dx of adapter ${l} (seed ${seed})`);
    first += count;
  }
  for (const adapter of adapters) adapter.detach();
});

test("what does more than add B·A, or elsewhere, is refused", async () => {
  const gpu = await testGpu();
  const random = new Random(1);
  const model = modelOf(gpu, { q: 8, k: 8 }, 32, random);
  const refusal = (...adapters: LoraAdapter[]): ShapeError => {
    try {
      new SharedBase(adapters);
    } catch (error) {
      for (const adapter of adapters) adapter.detach();
      return error as ShapeError;
    }
    throw new Error("it was taken");
  };
  const rule = "SharedBase: adapters of one batch only add B·A to linear layers, got";
  const dropped = attach(model, { dropout: 0.1 }, random);
  expect(refusal(attach(model, {}, random), dropped)).toEqual(
    new ShapeError(`${rule} dropout in number 2. Train it apart`),
  );
  for (const [config, what] of [
    [{ useDora: true }, "DoRA"],
    [{ loraBias: true }, "a trained bias"],
    [{ bias: "lora_only" }, "a trained bias"],
    [{ targetModules: ["q"], modulesToSave: ["k"] }, "a trained copy"],
  ] as const)
    expect(refusal(attach(model, config, random))).toEqual(
      new ShapeError(`${rule} ${what} in number 1. Train it apart`),
    );
  const begun = attach(model, {}, random);
  await initLora(begun, "olora");
  expect(refusal(begun)).toEqual(new ShapeError(`${rule} a start from the base in number 1. Train it apart`));
  expect(refusal(attach(model, {}, random), attach(model, { targetModules: ["q"] }, random))).toEqual(
    new ShapeError(
      "SharedBase: adapters of one batch must be on the same layers, got k in one of number 1 and number 2 alone. Train them apart",
    ),
  );
  const one = attach(model, {}, random);
  expect(refusal(one, one)).toEqual(new ShapeError("SharedBase: each adapter must come once, got one twice"));
  expect(refusal()).toEqual(new ShapeError("SharedBase: each adapter must come once, got none"));
  expect(refusal(attach(modelOf(gpu, { q: 6 }, 32, random), {}, random))).toEqual(
    new ShapeError("SharedBase: sizes of a layer must be multiples of 4, got q [6,32]. Train the adapters apart"),
  );
});

test("others on its layers, and batches of other rows, are refused, and the layers are left as they were", async () => {
  const gpu = await testGpu();
  const random = new Random(1);
  const model = modelOf(gpu, { q: 8 }, 32, random);
  const shared = new SharedBase([attach(model, {}, random), attach(model, { r: 4 }, random)]);
  const layers = [...model.linears.values()];
  const x = upload(gpu, randomNd([3, 16, 32], random));
  expect(() => shared.during([1, 1], () => linears(layers, x))).toThrow(
    new ShapeError("SharedBase: a batch must have the 2 rows of its 2 adapters, got [3,16,32] and rows of 2"),
  );
  expect(() => shared.during([3], () => linears(layers, x))).toThrow(
    new ShapeError("SharedBase: a batch must have the 3 rows of its 2 adapters, got [3,16,32] and rows of 1"),
  );
  expect(layers[0]?.adapters).toBeUndefined();
  const third = attach(model, {}, random);
  expect(() => shared.during([1, 2], () => linears(layers, x))).toThrow(
    new ShapeError("SharedBase: no adapter may be enabled meanwhile, got one on q. Disable it"),
  );
  for (const adapter of [third, ...shared.adapters]) adapter.detach();
});
