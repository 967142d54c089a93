/** Several adapters on one model: which may be together, and what comes of it. */
import { expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { encodePeft, readAdapter } from "../../src/lora/adapter-file.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { combineAdapters } from "../../src/lora/combine.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { initLora } from "../../src/lora/init.ts";
import type { HasLinears } from "../../src/lora/parts.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import { loadModel } from "../../src/models/load.ts";
import { type Linear, linears } from "../../src/nn/linear.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { collect } from "../collect.ts";
import { expectClose, freshSeed, randomNd, testGpu, upload } from "../harness.ts";

const PLAIN: LoraConfig = { r: 2, alpha: 4, targetModules: "all-linear" };

/** q [8,12] and k [6,12] on one input, in one group, with biases. */
async function layers() {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const layer = (N: number): Linear => ({
    weight: upload(gpu, randomNd([N, 12], random)),
    bias: upload(gpu, randomNd([N], random)),
  });
  const model: HasLinears = {
    linears: new Map([
      ["q", layer(8)],
      ["k", layer(6)],
    ]),
    groups: [["q", "k"]],
  };
  const x = upload(gpu, randomNd([5, 12], random));
  const run = async (): Promise<number[]> => {
    const outputs = gpu.scope(() => linears([...model.linears.values()], x));
    const values = await readAll(outputs);
    gpu.release(...outputs);
    return values.flatMap((y) => [...y]);
  };
  const attach = (config: Partial<LoraConfig> = {}): LoraAdapter => {
    const adapter = attachLora(model, { ...PLAIN, ...config }, random.below(1000));
    for (const p of adapter.parameters) gpu.write(p, Float32Array.from(randomNd(p.shape, random, 0.5).data));
    return adapter;
  };
  return { model, run, attach };
}

const minus = (a: readonly number[], b: readonly number[]): number[] => a.map((v, i) => v - (b[i] ?? Number.NaN));
const plus = (a: readonly number[], b: readonly number[]): number[] => a.map((v, i) => v + (b[i] ?? Number.NaN));

test("what two adapters add is added up, each at its own scale, in whatever order they come and go", async () => {
  const { run, attach } = await layers();
  const base = await run();
  const a = attach({ loraBias: true });
  const ofA = minus(await run(), base);
  a.disable();
  const b = attach({ r: 3, useRslora: true });
  const ofB = minus(await run(), base);
  a.enable();
  expectClose(await run(), plus(plus(base, ofA), ofB), 1e-5, "both");
  b.setScale(-2);
  const twice = ofB.map((v) => -2 * v);
  expectClose(await run(), plus(plus(base, ofA), twice), 1e-5, "b at −2");
  a.detach();
  expectClose(await run(), plus(base, twice), 1e-5, "b alone");
  b.detach();
  expect(await run()).toEqual(base);
});

test("merged and enabled ones may be together, and the last merged is the first to be unmerged", async () => {
  const { run, attach } = await layers();
  const base = await run();
  const [a, b] = [attach(), attach()];
  const both = await run();
  a.merge();
  expectClose(await run(), both, 1e-5, "a merged");
  b.merge();
  expectClose(await run(), both, 1e-5, "both merged");
  expect(() => a.unmerge()).toThrow(
    new ShapeError(
      "unmerge: the adapter that was merged last must be the first to go, got one with another over it on q",
    ),
  );
  b.unmerge();
  a.unmerge();
  expectClose(await run(), both, 1e-5, "both enabled");
  a.merge();
  b.disable();
  a.unmerge();
  a.disable();
  expect(await run()).toEqual(base);
  a.detach();
  b.detach();
});

test("one that is detached while it is merged stays in the weights, under another too", async () => {
  const { run, attach } = await layers();
  const a = attach();
  const ofA = await run();
  const b = attach();
  const both = await run();
  a.merge();
  b.merge();
  a.detach();
  expectClose(await run(), both, 1e-5, "both");
  b.unmerge();
  b.disable();
  expectClose(await run(), ofA, 1e-5, "a");
  b.detach();
});

test.each([
  ["DoRA", { useDora: true }],
  ["a trained bias", { bias: "lora_only" }],
  ["a trained copy", { targetModules: ["q"], modulesToSave: ["k"] }],
] as const)("%s is alone on a layer, enabled or merged", async (_, config) => {
  const { run, attach } = await layers();
  const a = attach();
  const alone = await run();
  const where = "modulesToSave" in config ? "k" : "q";
  const refusal = (call: string): ShapeError =>
    new ShapeError(
      `${call}: adapters share a layer where each only adds B·A to it, got two on ${call === "merge" ? "q" : where} of which one does more: DoRA, a start from the base, a trained copy or bias, a pool. Disable or unmerge the other first`,
    );
  const strange = config as Partial<LoraConfig>;
  if (where === "q") expect(() => attach(strange)).toThrow(refusal("enable"));
  expect(await run()).toEqual(alone);
  a.disable();
  const c = attach(strange);
  if (where === "q") expect(() => a.merge()).toThrow(refusal("merge"));
  expect(() => a.enable()).toThrow(/^enable: adapters share a layer/);
  c.detach();
  a.enable();
  expect(await run()).toEqual(alone);
  a.detach();
});

test("a start from the base needs a layer of its own", async () => {
  const { attach } = await layers();
  const [a, b] = [attach(), attach()];
  await expect(initLora(b, "olora")).rejects.toThrow(
    new ShapeError(
      "start: adapters share a layer where each only adds B·A to it, got two on q of which one does more: DoRA, a start from the base, a trained copy or bias, a pool. Disable or unmerge the other first",
    ),
  );
  a.detach();
  await initLora(b, "olora");
  b.detach();
});

/** Merged for good, which puts other weights into the layers. */
function mergeForGood(adapter: LoraAdapter): void {
  adapter.merge();
  adapter.detach();
}

test.each([
  ["a start from the base", "olora", {}],
  ["a start from the base with DoRA", "olora", { useDora: true }],
  ["DoRA", undefined, { useDora: true }],
] as const)(
  "what is merged for good under a disabled adapter with %s is what that then works on",
  async (_, init, more) => {
    const { run, attach } = await layers();
    const { buffersLive } = (await testGpu()).counters();
    const first = await run();
    const a = attach(more);
    if (init) await initLora(a, init);
    for (const p of a.parameters)
      p.gpu.write(
        p,
        (await read(p)).map((v) => 1.25 * v),
      );
    const learned = minus(await run(), first);
    a.disable();
    mergeForGood(attach());
    const base = await run();
    a.merge();
    const merged = await run();
    if (!("useDora" in more)) expectClose(merged, plus(base, learned), 1e-5, "merged");
    for (const { layer, magnitude } of a.pairs.values()) {
      if (!magnitude) continue;
      const [W = [], m = []] = await readAll([layer.weight as Tensor, magnitude]);
      const norms = Array.from(m, (_m, j) => Math.hypot(...[...W].slice(12 * j, 12 * (j + 1))));
      expectClose(norms, Array.from(m, Math.abs), 1e-5, "norms of the rows");
    }
    a.unmerge();
    expectClose(await run(), merged, 1e-5, "enabled");
    a.disable();
    expect(await run()).toEqual(base);
    a.detach();
    expect(await run()).toEqual(base);
    expect((await testGpu()).counters().buffersLive).toBe(buffersLive);
  },
);

test("two adapters of embedding, head and layers equal their combination by cat", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/models/qwen2"));
  const random = new Random(freshSeed());
  const ids = tensor(
    gpu,
    Int32Array.from({ length: 12 }, () => random.below(64)),
    [2, 6],
  );
  const run = (): Promise<ArrayLike<number>> => read(gpu.scope(() => model.logits(ids)));
  const make = async (config: Partial<LoraConfig>) => {
    const adapter = attachLora(model, { ...PLAIN, ...config });
    for (const p of adapter.parameters) gpu.write(p, Float32Array.from(randomNd(p.shape, random, 0.2).data));
    const files = savePeft(adapter, "qwen2");
    const bytes = await collect(files["adapter_model.safetensors"]);
    return { adapter, directory: memoryDirectory("a", { ...files, "adapter_model.safetensors": bytes }) };
  };
  const [a, b] = [await make({}), await make({ r: 3, targetModules: ["q_proj", "down_proj"] })];
  b.adapter.setScale(0.5);
  const both = await run();
  a.adapter.detach();
  b.adapter.detach();
  const parts = [
    { adapter: await readAdapter(a.directory), weight: 1 },
    { adapter: await readAdapter(b.directory), weight: 0.5 },
  ];
  const { files } = encodePeft(combineAdapters(parts, { method: "cat" }));
  const content = await collect(files["adapter_model.safetensors"] as AsyncIterable<Uint8Array>);
  const one = await loadPeft(
    model,
    memoryDirectory("cat", { ...(files as object), "adapter_model.safetensors": content }),
  );
  expectClose(await run(), both, 1e-5, "logits");
  one.detach();
  model.destroy();
});

test("two adapters of an embedding and a head add up there too", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/models/gemma2"));
  const random = new Random(freshSeed());
  const ids = tensor(
    gpu,
    Int32Array.from({ length: 6 }, () => random.below(64)),
    [1, 6],
  );
  const embedded = async (): Promise<number[]> => [...(await read(gpu.scope(() => model.logits(ids))))];
  const config = { r: 2, alpha: 4, targetModules: ["embed_tokens", "lm_head"] };
  const fill = (adapter: LoraAdapter): LoraAdapter => {
    for (const p of adapter.parameters) gpu.write(p, Float32Array.from(randomNd(p.shape, random, 0.3).data));
    return adapter;
  };
  const [a, b] = [fill(attachLora(model, config)), fill(attachLora(model, config))];
  const both = await embedded();
  // The same as one of rank 4: X = [X₁ X₂], Y = [Y₁; Y₂].
  const joined = attachLora(model, { ...config, r: 4, alpha: 8 });
  for (const [name, { X, Y }] of joined.tables) {
    const [of1, of2] = [a.tables.get(name), b.tables.get(name)];
    const [X1, Y1, X2, Y2] = await readAll([of1?.X, of1?.Y, of2?.X, of2?.Y].filter((t) => t !== undefined));
    gpu.write(X, besides(X1 ?? [], X2 ?? [], 2));
    gpu.write(Y, Float32Array.from([...(Y1 ?? []), ...(Y2 ?? [])]));
  }
  a.detach();
  b.detach();
  expectClose(await embedded(), both, 1e-5, "logits");
  joined.detach();
  model.destroy();
});

/** The columns of two matrices, beside each other. */
const besides = (a: ArrayLike<number>, b: ArrayLike<number>, columns: number): Float32Array =>
  Float32Array.from({ length: a.length + b.length }, (_, i) => {
    const [row, column] = [Math.floor(i / (2 * columns)), i % (2 * columns)];
    const [from, at] = column < columns ? [a, column] : [b, column - columns];
    return from[row * columns + at] ?? Number.NaN;
  });
