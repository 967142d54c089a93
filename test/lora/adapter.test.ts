import { expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loraLinear } from "../../src/lora/lora-linear.ts";
import type { HasLinears } from "../../src/lora/parts.ts";
import { matchModules } from "../../src/lora/target-modules.ts";
import { type Linear, linear } from "../../src/nn/linear.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, type Nd, randomNd, testGpu, upload } from "../harness.ts";
import { matmulTwin } from "../reference/matmul.ts";

/** y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ in f64. */
function loraTwin(x: Nd, W: Nd, A: Nd, B: Nd, s: number): Nd {
  const low = matmulTwin(matmulTwin(x, A, "nt"), B, "nt", s);
  const y = matmulTwin(x, W, "nt");
  return { shape: y.shape, data: y.data.map((value, i) => value + (low.data[i] ?? 0)) };
}

const four = (ts: readonly Tensor[]): [Tensor, Tensor, Tensor, Tensor] => ts as never;
const fourNd = (ts: readonly Nd[]): [Nd, Nd, Nd, Nd] => ts as never;

test.each([
  [5, 8, 12, 4],
  [9, 16, 8, 3],
  [3, 5, 7, 2],
  [1, 4, 4, 1],
])("loraLinear of %i rows, %i×%i and rank %i equals its f64 twin, gradients too", async (M, N, K, R) => {
  await checkOp({
    inputs: [
      [M, K],
      [N, K],
      [R, K],
      [N, R],
    ],
    op: (...ts) => loraLinear(...four(ts), 0.5),
    twin: (...ts) => loraTwin(...fourNd(ts), 0.5),
  });
});

test("loraLinear adds its bias in the same product, and its gradients equal the f64 twin", async () => {
  const plus = (y: Nd, bias: Nd): Nd => ({
    shape: y.shape,
    data: y.data.map((value, i) => value + (bias.data[i % bias.data.length] ?? Number.NaN)),
  });
  await checkOp({
    inputs: [[5, 8], [12, 8], [4, 8], [12, 4], [12]],
    op: (...ts) => loraLinear(...four(ts.slice(0, 4)), 0.5, ts[4]),
    twin: (...ts) => plus(loraTwin(...fourNd(ts.slice(0, 4)), 0.5), ts[4] as Nd),
    frozen: [1],
  });
});

test.each(["f16", "bf16", "int8", "nf4"] as const)(
  "loraLinear on a base packed as %s equals its f64 twin on the widened base, gradients too",
  async (format) => {
    const gpu = await testGpu();
    const packed = packMatrix(gpu, Float32Array.from(randomNd([12, 64], new Random(3)).data), [12, 64], format);
    const W: Nd = { shape: [12, 64], data: Float64Array.from(await read(unpackMatrix(packed))) };
    await checkOp({
      inputs: [
        [5, 64],
        [4, 64],
        [12, 4],
      ],
      op: (...[x, A, B]) => loraLinear(x as Tensor, packed, A as Tensor, B as Tensor, 0.5),
      twin: (...[x, A, B]) => loraTwin(x as Nd, W, A as Nd, B as Nd, 0.5),
    });
  },
);

test("loraLinear with a frozen W gives W no gradient", async () => {
  await checkOp({
    inputs: [
      [6, 8],
      [4, 8],
      [2, 8],
      [4, 2],
    ],
    op: (...ts) => loraLinear(...four(ts), 2),
    twin: (...ts) => loraTwin(...fourNd(ts), 2),
    frozen: [1],
  });
});

async function twoLayers(): Promise<{ model: HasLinears & { linears: Map<string, Linear> }; x: Tensor }> {
  const gpu = await testGpu();
  const random = new Random(1);
  const layer = (): Linear => ({ weight: upload(gpu, randomNd([8, 8], random)) });
  const model = {
    linears: new Map([
      ["layers.0.q_proj", layer()],
      ["layers.0.k_proj", layer()],
      ["layers.1.q_proj", layer()],
    ]),
  };
  return { model, x: upload(gpu, randomNd([3, 8], random)) };
}

const run = async (model: { linears: Map<string, Linear> }, x: Tensor): Promise<Float32Array> => {
  const y = x.gpu.scope(() => [...model.linears.values()].reduce((h, layer) => linear(layer, h), x));
  const values = await read(y);
  x.gpu.release(y);
  return values;
};

test("a fresh adapter changes nothing", async () => {
  const { model, x } = await twoLayers();
  const before = await run(model, x);
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  expect([...adapter.pairs.keys()]).toEqual(["layers.0.q_proj", "layers.1.q_proj"]);
  expectClose(await run(model, x), before, 1e-6);
  expect(adapter.scale).toBe(2);
  adapter.detach();
});

test("disable, enable and setScale switch between the base and the adapter", async () => {
  const { model, x } = await twoLayers();
  const base = await run(model, x);
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" });
  const random = new Random(3);
  for (const { B } of adapter.pairs.values()) B.gpu.write(B, Float32Array.from(randomNd(B.shape, random).data));
  const tuned = await run(model, x);
  expect(Math.max(...tuned.map((v, i) => Math.abs(v - (base[i] ?? 0))))).toBeGreaterThan(0.1);
  adapter.disable();
  expect(await run(model, x)).toEqual(base);
  adapter.enable();
  expect(await run(model, x)).toEqual(tuned);
  adapter.setScale(0);
  expectClose(await run(model, x), base, 1e-6);
  adapter.detach();
  expect(await run(model, x)).toEqual(base);
});

test("merge gives the adapter's output, unmerge the original weights bit for bit", async () => {
  const { model, x } = await twoLayers();
  const originals = await Promise.all([...model.linears.values()].map(({ weight }) => read(weight as Tensor)));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" });
  const random = new Random(3);
  for (const { B } of adapter.pairs.values()) B.gpu.write(B, Float32Array.from(randomNd(B.shape, random, 0.1).data));
  const tuned = await run(model, x);
  adapter.merge();
  expectClose(await run(model, x), tuned, 1e-5);
  expect(await read([...model.linears.values()][0]?.weight as Tensor)).not.toEqual(originals[0]);
  adapter.unmerge();
  expect(await Promise.all([...model.linears.values()].map(({ weight }) => read(weight as Tensor)))).toEqual(originals);
  expect(await run(model, x)).toEqual(tuned);
  adapter.detach();
});

test("what does not fit an adapter's state is refused", async () => {
  const { model } = await twoLayers();
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  expect(() => adapter.unmerge()).toThrow(new ShapeError("unmerge: the adapter must be merged, got enabled"));
  adapter.merge();
  expect(() => adapter.setScale(2)).toThrow(
    new ShapeError("setScale: the adapter must be enabled or disabled, got merged"),
  );
  adapter.unmerge();
  adapter.detach();
  expect(() => adapter.enable()).toThrow(new ShapeError("enable: the adapter must be disabled, got detached"));
});

test("an adapter that cannot be attached, for another one is there, leaves nothing behind", async () => {
  const { model } = await twoLayers();
  const gpu = await testGpu();
  const config = { r: 2, alpha: 4, targetModules: "all-linear", useDora: true };
  const first = attachLora(model, config);
  const before = gpu.counters().bytesLive;
  expect(() => attachLora(model, config)).toThrow(
    new ShapeError(
      "enable: adapters share a layer where each only adds B·A to it, got two on layers.0.q_proj of which one does more: DoRA, a start from the base, a trained copy or bias, a pool. Disable or unmerge the other first",
    ),
  );
  expect(gpu.counters().bytesLive).toBe(before);
  first.detach();
});

test("settings out of range name the rule and the value", async () => {
  const { model } = await twoLayers();
  const attach =
    (r: number, alpha: number): (() => unknown) =>
    () =>
      attachLora(model, { r, alpha, targetModules: ["q_proj"] });
  expect(attach(0, 1)).toThrow(new ShapeError("lora: r must be a whole number of at least 1, got 0"));
  expect(attach(1.5, 1)).toThrow(new ShapeError("lora: r must be a whole number of at least 1, got 1.5"));
  expect(attach(2, 0)).toThrow(new ShapeError("lora: alpha must be a positive number, got 0"));
  const all = { r: 2, alpha: 4, targetModules: ["q_proj"] };
  expect(() => attachLora(model, { ...all, rankPattern: { q_proj: 0.5 } })).toThrow(
    new ShapeError('lora: rank_pattern of "q_proj" must be a whole number of at least 1, got 0.5'),
  );
  expect(() => attachLora(model, { ...all, alphaPattern: { "(": 2 } })).toThrow(
    new ShapeError('lora: alpha_pattern must have regular expressions, got "("'),
  );
  expect(() => attachLora(model, { ...all, layersPattern: ["h"] })).toThrow(
    new ShapeError("lora: layers_pattern needs layers_to_transform, got h alone. Give both or neither"),
  );
  expect(() => attachLora(model, { ...all, layersToTransform: [-1] })).toThrow(
    new ShapeError("lora: layers_to_transform must have whole numbers from 0 on, got -1"),
  );
});

test("LoRA+ lets B learn faster than A", async () => {
  const { model } = await twoLayers();
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", useDora: true });
  const rates = adapter.rates(16);
  for (const { A, B, magnitude } of adapter.pairs.values())
    expect([A, B, magnitude].map((p) => rates.get(p as Tensor))).toEqual([undefined, 16, 16]);
  expect(() => adapter.rates(0)).toThrow(new ShapeError("rates: the ratio must be a number above 0, got 0"));
  adapter.detach();
});

test("target modules match by suffix, whole name, regular expression or all", () => {
  const modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"];
  expect(matchModules(["q_proj"], modules)).toEqual([modules[0], modules[2]]);
  expect(matchModules(["model.layers.1.self_attn.q_proj"], modules)).toEqual([modules[2]]);
  expect(matchModules(".*layers\\.0.*", modules)).toEqual([modules[0], modules[1]]);
  expect(matchModules("all-linear", modules)).toEqual(modules);
  const choices = "The model has q_proj, up_proj";
  expect(() => matchModules(["proj"], modules)).toThrow(
    new ShapeError(`target modules: "proj" must match a module, got none. ${choices}`),
  );
  expect(() => matchModules("q_proj", modules)).toThrow(
    new ShapeError(`target modules: "q_proj" must match a module, got none. ${choices}`),
  );
  expect(() => matchModules("(", modules)).toThrow(
    new ShapeError('target modules: "(" is not a regular expression. Give names, or all-linear'),
  );
  expect(() => matchModules([], modules)).toThrow(
    new ShapeError(`target modules: at least one is needed, got an empty list. ${choices}`),
  );
});

test("every adapter parameter gets a gradient of its own shape", async () => {
  const { model, x } = await twoLayers();
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" });
  const grads = x.gpu.scope(() => {
    const y = [...model.linears.values()].reduce((h, layer) => linear(layer, h), x);
    return backward(y, tensor(x.gpu, new Float32Array(y.size).fill(1), y.shape));
  });
  expect([...grads.keys()].every((t) => adapter.parameters.includes(t))).toBe(true);
  expect(grads.size).toBe(6);
  for (const [p, g] of grads) expect(g.shape).toEqual(p.shape);
  const last = adapter.pairs.get("layers.1.q_proj");
  expect((await read(grads.get(last?.B as Tensor) as Tensor)).some((g) => g !== 0)).toBe(true);
  x.gpu.release(...grads.values());
  adapter.detach();
});
