// Adapters of layers that read the same input, and dropout: values and gradients in f64, and what they dispatch.
import { describe, expect, test } from "vitest";
import { add, mul, sum } from "../../src/autograd/basic-ops.ts";
import { backward, type Gradients } from "../../src/autograd/engine.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loraLinear, loraLinears } from "../../src/lora/lora-linear.ts";
import type { HasLinears } from "../../src/lora/parts.ts";
import { loadModel } from "../../src/models/load.ts";
import { type Linear, linear, linears } from "../../src/nn/linear.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { blockRows, empty, read, readAll, type Tensor } from "../../src/tensor/tensor.ts";
import { evaluate } from "../../src/train/loss.ts";
import { train } from "../../src/train/trainer.ts";
import { expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { dropoutTwin } from "../reference/dropout.ts";
import { matmulTwin } from "../reference/matmul.ts";

const plus = (a: Nd, b: Nd): Nd =>
  nd(
    a.shape,
    a.data.map((value, i) => value + (b.data[i] ?? Number.NaN)),
  );

/** y, and the gradients of x, A and B for dy, of one layer in f64; `drop` is the layer's mask over 1 − p. */
function layerTwin(x: Nd, W: Nd, A: Nd, B: Nd, dy: Nd, s: number, drop: (t: Nd) => Nd = (t) => t) {
  const dropped = drop(x);
  const u = matmulTwin(dropped, A, "nt");
  const v = matmulTwin(dy, B, "nn", s);
  return {
    y: plus(matmulTwin(x, W, "nt"), matmulTwin(u, B, "nt", s)),
    dx: plus(matmulTwin(dy, W, "nn"), drop(matmulTwin(v, A, "nn"))),
    dA: matmulTwin(v, dropped, "tn"),
    dB: matmulTwin(dy, u, "tn", s),
  };
}

interface Model extends HasLinears {
  readonly linears: Map<string, Linear>;
}

/** Layers of these widths on an input of K, all in one group, by the names a, b, c, … */
function modelOf(gpu: Gpu, widths: readonly number[], K: number, random: Random): Model {
  const names = widths.map((_, i) => String.fromCharCode(97 + i));
  const layer = (N: number): Linear => ({ weight: upload(gpu, randomNd([N, K], random)) });
  return { linears: new Map(widths.map((N, i) => [names[i] as string, layer(N)])), groups: [names] };
}

/** Σᵢ Σ yᵢ∘dyᵢ, whose gradients are those for dyᵢ. */
const weighted = (ys: readonly Tensor[], dys: readonly Tensor[]): Tensor =>
  ys.map((y, i) => sum(mul(y, dys[i] as Tensor))).reduce((a, b) => add(a, b));

function randomizeB(adapter: LoraAdapter, random: Random): void {
  for (const { B } of adapter.pairs.values()) B.gpu.write(B, Float32Array.from(randomNd(B.shape, random).data));
}

const ndOf = async (t: Tensor): Promise<Nd> => nd(t.shape, await read(t));

const counted = (gpu: Gpu, run: () => void): { products: number; dispatches: ReadonlyMap<string, number> } => {
  gpu.resetCounters();
  run();
  const { dispatches } = gpu.counters();
  return {
    products: [...dispatches].reduce((all, [name, n]) => all + (/^matmul-(?!splits)/.test(name) ? n : 0), 0),
    dispatches,
  };
};

interface Case {
  readonly widths: readonly number[];
  readonly lead: readonly number[];
  readonly K: number;
  readonly r: number;
  readonly dropout?: number;
}

/** Runs all layers of a model with an adapter on one x and compares y and every gradient with the f64 twin. */
async function check({ widths, lead, K, r, dropout = 0 }: Case): Promise<void> {
  const seed = freshSeed();
  const what = `${widths}, ${lead}, ${K}, rank ${r} (seed ${seed})`;
  const random = new Random(seed);
  const gpu = await testGpu();
  const model = modelOf(gpu, widths, K, random);
  const adapter = attachLora(model, { r, alpha: 2 * r, targetModules: "all-linear", dropout }, seed);
  randomizeB(adapter, random);
  adapter.training = { seed: 77, step: () => 5 };
  const M = lead.reduce((a, b) => a * b, 1);
  const x = randomNd([M, K], random);
  const dys = widths.map((N) => randomNd([M, N], random));
  const layers = [...model.linears.values()];
  const input = upload(gpu, nd([...lead, K], x.data));
  input.requiresGrad = true;
  const { ys, grads } = gpu.scope(() => {
    const made = linears(layers, input);
    const weights = dys.map(({ data }, i) => upload(gpu, nd([...lead, widths[i] ?? 0], data)));
    return { ys: made, grads: backward(weighted(made, weights)) };
  });
  let dx: Nd | undefined;
  for (const [i, { layer, A, B }] of [...adapter.pairs.values()].entries()) {
    const key = { seed: 77, step: 5, stream: i };
    const of = [await ndOf(layer.weight as Tensor), await ndOf(A), await ndOf(B)] as const;
    const twin = layerTwin(x, ...of, dys[i] as Nd, 2, (t) => (dropout > 0 ? dropoutTwin(t, dropout, key) : t));
    expect(ys[i]?.shape).toEqual([...lead, widths[i]]);
    expectClose(await read(ys[i] as Tensor), twin.y.data, 2e-5, `y${i} of ${what}`);
    expectClose(await read(grads.get(A) as Tensor), twin.dA.data, 1e-4, `dA${i} of ${what}`);
    expectClose(await read(grads.get(B) as Tensor), twin.dB.data, 1e-4, `dB${i} of ${what}`);
    dx = dx ? plus(dx, twin.dx) : twin.dx;
  }
  expectClose(await read(grads.get(input) as Tensor), dx?.data ?? [], 1e-4, `dx of ${what}`);
  expect(grads.size).toBe(1 + 2 * widths.length);
  adapter.detach();
}

describe("layers on one input", () => {
  test.each([
    { widths: [24, 8, 8], lead: [2, 16], K: 32, r: 4 },
    { widths: [12, 20], lead: [37], K: 64, r: 8 },
    { widths: [12, 7, 9], lead: [5], K: 64, r: 3 },
    { widths: [16, 16, 16], lead: [1, 1], K: 16, r: 16 },
    { widths: [8, 8], lead: [9], K: 12, r: 2 }, // each A ends between two multiples of 256 bytes
    { widths: [8], lead: [9], K: 32, r: 4 },
  ])("equal their f64 twins, gradients too: %j", check);

  test.each([
    { widths: [24, 8, 8], lead: [2, 16], K: 32, r: 4, dropout: 0.4 },
    { widths: [5, 9], lead: [7], K: 12, r: 3, dropout: 0.1 },
    { widths: [8], lead: [9], K: 32, r: 4, dropout: 0.75 },
  ])("with dropout equal their f64 twins on the same masks, gradients too: %j", check);

  test("three of them take one shrink forward, one dA and no sums backward", async () => {
    const gpu = await testGpu();
    const random = new Random(1);
    const model = modelOf(gpu, [24, 8, 8], 32, random);
    const adapter = attachLora(model, { r: 4, alpha: 4, targetModules: "all-linear" });
    const x = upload(gpu, randomNd([16, 32], random));
    x.requiresGrad = true;
    const layers = [...model.linears.values()];
    gpu.scope(() => {
      let ys: readonly Tensor[] = [];
      const forward = counted(gpu, () => {
        ys = linears(layers, x);
      });
      expect(forward.products).toBe(1 + 3);
      expect([...forward.dispatches.values()].reduce((a, b) => a + b)).toBe(1 + 3);
      const dys = ys.map((y) => upload(gpu, randomNd(y.shape, random)));
      const loss = weighted(ys, dys);
      const back = counted(gpu, () => void backward(loss));
      // v, dB and dx of each, and dA of all.
      expect(back.products).toBe(3 * 3 + 1);
      for (const sums of ["axpy", "add-into", "copy-rows"]) expect(back.dispatches.has(sums)).toBe(false);
    });
    adapter.detach();
  });

  test("without a gradient for x none is made", async () => {
    const gpu = await testGpu();
    const random = new Random(1);
    const model = modelOf(gpu, [8, 8], 32, random);
    const adapter = attachLora(model, { r: 4, alpha: 4, targetModules: "all-linear" });
    const x = upload(gpu, randomNd([16, 32], random));
    gpu.scope(() => {
      const ys = linears([...model.linears.values()], x);
      const loss = weighted(
        ys,
        ys.map((y) => upload(gpu, randomNd(y.shape, random))),
      );
      expect(counted(gpu, () => void backward(loss)).products).toBe(2 * 2 + 1);
    });
    adapter.detach();
  });

  test("one that nothing came of has gradients of zero for its A, and does not touch the others'", async () => {
    const gpu = await testGpu();
    const random = new Random(freshSeed());
    const model = modelOf(gpu, [8, 8, 8], 32, random);
    const adapter = attachLora(model, { r: 4, alpha: 4, targetModules: "all-linear" });
    randomizeB(adapter, random);
    const x = upload(gpu, randomNd([5, 32], random));
    const dy = upload(gpu, randomNd([5, 8], random));
    const [a, b, c] = [...adapter.pairs.values()];
    const run = (f: () => readonly (Tensor | undefined)[]): Gradients =>
      gpu.scope(() => backward(weighted(f().filter((y) => y !== undefined) as Tensor[], [dy, dy])));
    const layers = [...model.linears.values()] as [Linear, Linear, Linear];
    const together = run(() => {
      const [first, , third] = linears(layers, x);
      return [first, third];
    });
    const apart = run(() => [linear(layers[0], x), linear(layers[2], x)]);
    for (const t of [a?.A, c?.A, a?.B, c?.B])
      expectClose(await read(together.get(t as Tensor) as Tensor), await read(apart.get(t as Tensor) as Tensor), 1e-5);
    expect((await read(together.get(b?.A as Tensor) as Tensor)).every((value) => value === 0)).toBe(true);
    adapter.detach();
  });

  test("of which some are adapted, those read it together", async () => {
    const gpu = await testGpu();
    const random = new Random(freshSeed());
    const model = modelOf(gpu, [8, 8, 8], 32, random);
    const adapter = attachLora(model, { r: 4, alpha: 4, targetModules: ["a", "c"] });
    randomizeB(adapter, random);
    const x = upload(gpu, randomNd([5, 32], random));
    const layers = [...model.linears.values()];
    let ys: readonly Tensor[] = [];
    expect(
      counted(gpu, () => {
        ys = linears(layers, x);
      }).products,
    ).toBe(1 + 3);
    const apart = layers.map((layer) => linear(layer, x));
    for (const [i, y] of ys.entries()) expectClose(await read(y), await read(apart[i] as Tensor));
    // Two of the three do not make the group of the other two.
    expect(counted(gpu, () => void linears(layers.slice(0, 2), x)).products).toBe(2 + 1);
    adapter.detach();
    expect(counted(gpu, () => void linears(layers, x)).products).toBe(3);
  });

  test("an adapter with groups merges, unmerges and gives back one buffer", async () => {
    const gpu = await testGpu();
    const random = new Random(freshSeed());
    const model = modelOf(gpu, [8, 8, 8], 32, random);
    const layers = [...model.linears.values()];
    const x = upload(gpu, randomNd([5, 32], random));
    const { buffersLive } = gpu.counters();
    const adapter = attachLora(model, { r: 4, alpha: 4, targetModules: "all-linear" });
    expect(gpu.counters().buffersLive).toBe(buffersLive + 1);
    randomizeB(adapter, random);
    const run = async (): Promise<Float32Array[]> => readAll(linears(layers, x));
    const tuned = await run();
    adapter.merge();
    for (const [i, y] of (await run()).entries()) expectClose(y, tuned[i] ?? [], 1e-5);
    adapter.unmerge();
    expect(await run()).toEqual(tuned);
    const live = gpu.counters().buffersLive;
    adapter.detach();
    expect(gpu.counters().buffersLive).toBe(live - 1);
  });

  test("blocks begin where views may", () => {
    for (const r of [1, 3, 4, 6, 8, 16, 32, 64, 96])
      for (const rows of [1, 2, 5, 16, 37]) {
        const held = blockRows(rows, r);
        expect((held * r * 4) % 256).toBe(0);
        expect(held).toBeGreaterThanOrEqual(rows);
        expect(held).toBeLessThan(rows + 64);
      }
    expect(blockRows(16, 4)).toBe(16);
    expect(blockRows(1, 16)).toBe(4);
    expect(blockRows(5, 64)).toBe(5);
  });
});

describe("dropout", () => {
  test("is off unless the adapter is in training", async () => {
    const gpu = await testGpu();
    const random = new Random(freshSeed());
    const model = modelOf(gpu, [8, 8], 32, random);
    const adapter = attachLora(model, { r: 4, alpha: 4, targetModules: "all-linear", dropout: 0.5 });
    randomizeB(adapter, random);
    const layers = [...model.linears.values()];
    const x = upload(gpu, randomNd([5, 32], random));
    const run = async (): Promise<Float32Array[]> => readAll(linears(layers, x));
    const [ready] = [await run()];
    adapter.training = { seed: 1, step: 1 };
    const trained = await run();
    expect(trained).not.toEqual(ready);
    expect(await run()).toEqual(trained);
    adapter.training = { seed: 1, step: 2 };
    expect(await run()).not.toEqual(trained);
    adapter.training = undefined;
    expect(await run()).toEqual(ready);
    adapter.detach();
  });

  test("keeps neither mask nor dropped input", async () => {
    const gpu = await testGpu();
    const random = new Random(1);
    const [x, W, A, B] = [
      [64, 32],
      [8, 32],
      [4, 32],
      [8, 4],
    ].map((shape) => upload(gpu, randomNd(shape, random)));
    const drop = { p: 0.5, key: { seed: 1, step: 1, stream: 0 } };
    const { buffersLive } = gpu.counters();
    gpu.scope(() => {
      for (const t of [A, B]) (t as Tensor).requiresGrad = true;
      loraLinear(x as Tensor, W as Tensor, A as Tensor, B as Tensor, 1, undefined, drop);
      expect(gpu.counters().buffersLive).toBe(buffersLive + 2); // u and y
    });
  });

  test("of a probability out of range, and of several layers at once, is refused", async () => {
    const gpu = await testGpu();
    const model = modelOf(gpu, [8, 8], 32, new Random(1));
    for (const dropout of [-0.1, 1, Number.NaN])
      expect(() => attachLora(model, { r: 4, alpha: 4, targetModules: "all-linear", dropout })).toThrow(
        new ShapeError(`lora: dropout must be at least 0 and below 1, got ${dropout}`),
      );
    const t = (...shape: number[]): Tensor => empty(gpu, shape, "t");
    const layer = { W: t(8, 32), A: t(4, 32), B: t(8, 4) };
    const drop = { p: 0.5, key: { seed: 1, step: 1, stream: 0 } };
    expect(() => loraLinears(t(5, 32), [layer, layer], t(8, 32), 1, drop)).toThrow(
      new ShapeError("loraLinears: dropout takes one layer, got 2"),
    );
  });

  test("between the steps of a training there is none", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
    const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", dropout: 0.5 }, 5);
    const rows = [{ inputIds: [1, 2, 3, 4], labels: [1, 2, 3, 4] }];
    const { parameters } = adapter;
    const between: number[] = [];
    const base = { model, parameters, adapter, rows, steps: 2, batchSize: 1, readEvery: 1 };
    for await (const _ of train({ ...base, learningRate: 1e-1 })) between.push((await evaluate(model, rows, 1)).loss);
    expect((await evaluate(model, rows, 1)).loss).toBe(between.at(-1));
    // Nothing is learned: each loss in training is that of the same adapter under another mask.
    const losses: number[] = [];
    for await (const { loss } of train({ ...base, steps: 3, learningRate: 0 })) losses.push(loss);
    expect(new Set([...losses, between.at(-1)]).size).toBe(4);
    adapter.detach();
    model.destroy();
  });

  test("in training: replayed, eager and checkpointed give the same bits, another seed others", async () => {
    const gpu = await testGpu();
    const row = (...inputIds: number[]) => ({ inputIds, labels: inputIds });
    const rows = [row(1, 2, 3, 4), row(5, 6, 7, 8, 9, 10), row(11, 12), row(13, 14, 15), row(16, 17, 18, 19, 20)];
    const run = async (options: { eager?: boolean; seed?: number; checkpointing?: boolean }) => {
      const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
      model.checkpointing = options.checkpointing ?? false;
      const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", dropout: 0.2 }, 5);
      const { parameters } = adapter;
      const base = { model, parameters, adapter, rows, steps: 4, batchSize: 2, gradAccumulation: 2 };
      const losses: number[] = [];
      for await (const { loss } of train({ ...base, learningRate: 1e-2, ...options })) losses.push(loss);
      expect(adapter.training).toBeUndefined();
      const values = await readAll(parameters);
      adapter.detach();
      model.destroy();
      return { losses, values };
    };
    const first = await run({});
    for (const other of [{ eager: true }, { checkpointing: true }]) expect(await run(other)).toEqual(first);
    expect((await run({ seed: 9 })).losses).not.toEqual(first.losses);
  });
});
