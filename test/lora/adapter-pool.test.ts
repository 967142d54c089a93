/** Batches whose rows have adapters of their own, against each of them alone. */
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { type Directory, memoryDirectory } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { copyTo } from "../../src/kernels/copy-rows.ts";
import { readAdapter } from "../../src/lora/adapter-file.ts";
import { AdapterPool, poolBytes } from "../../src/lora/adapter-pool.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import type { PlainAdapter } from "../../src/lora/plain-adapter.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import type { ModelConfig } from "../../src/models/config.ts";
import { linearSizes, loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { collect } from "../collect.ts";
import { expectRelative, valuesOf } from "../golden/files.ts";
import { expectClose, freshSeed, randomNd, testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";

/** Ranks 1 to 17, scales, patterns, modules and DoRA. */
const CONFIGS: Record<string, LoraConfig> = {
  plain: { r: 4, alpha: 8, targetModules: "all-linear" },
  one: { r: 1, alpha: 1, targetModules: ["q_proj", "v_proj"] },
  rs: { r: 17, alpha: 6, targetModules: "all-linear", useRslora: true },
  patterns: {
    ...{ r: 5, alpha: 5, targetModules: "all-linear" },
    ...{ rankPattern: { k_proj: 2, "layers.1.mlp.up_proj": 7 }, alphaPattern: { down_proj: 3 } },
  },
  dora: { r: 3, alpha: 6, targetModules: "all-linear", useDora: true },
  some: { r: 8, alpha: 4, targetModules: ["k_proj", "o_proj", "gate_proj"], useDora: true, layersToTransform: [1] },
};
const NAMES = Object.keys(CONFIGS);

let folder: string;
let gpu: Gpu;
let model: CausalModel;
const files = new Map<string, Directory>();
const adapters = new Map<string, PlainAdapter>();

beforeAll(async () => {
  gpu = await testGpu();
  folder = await mkdtemp(join(tmpdir(), "lowrank-pool-"));
  // Odd widths: 27 columns are whole fours of no matrix.
  await writeTinyModel(folder, { config: { attention_bias: true, intermediate_size: 27 } });
  model = await loadModel(gpu, diskDirectory(folder));
  for (const [name, config] of Object.entries(CONFIGS)) await addAdapter(name, config);
});

afterAll(() => rm(folder, { recursive: true }));

const pools: AdapterPool[] = [];
afterEach(() => {
  for (const pool of pools.splice(0)) pool.destroy();
});

/** Makes an adapter of random values, as files and as it is in memory. */
async function addAdapter(name: string, config: LoraConfig): Promise<PlainAdapter> {
  const random = new Random(freshSeed());
  const adapter = attachLora(model, config);
  for (const pair of adapter.pairs.values()) {
    gpu.write(pair.A, Float32Array.from(randomNd(pair.A.shape, random, 0.2).data));
    gpu.write(pair.B, Float32Array.from(randomNd(pair.B.shape, random, 0.2).data));
    if (pair.magnitude)
      gpu.write(
        pair.magnitude,
        Float32Array.from(randomNd(pair.magnitude.shape, random, 0.1).data, (m) => 1.2 + m),
      );
  }
  const { "adapter_config.json": json, "adapter_model.safetensors": bytes } = savePeft(adapter, "tiny");
  const directory = memoryDirectory(name, {
    "adapter_config.json": json,
    "adapter_model.safetensors": await collect(bytes),
  });
  adapter.detach();
  files.set(name, directory);
  const plain = await readAdapter(directory);
  adapters.set(name, plain);
  return plain;
}

const plainOf = (name: string): PlainAdapter => adapters.get(name) as PlainAdapter;

function randomIds(B: number, T: number): Tensor {
  const random = new Random(freshSeed());
  return tensor(
    gpu,
    Int32Array.from({ length: B * T }, () => random.below(64)),
    [B, T],
  );
}

/** Logits of a pass, in all. */
async function logits(ids: Tensor, run: (pass: () => Tensor) => Tensor = (pass) => pass()): Promise<Float32Array> {
  const y = gpu.scope(() => run(() => model.logits(ids)));
  const values = await read(y);
  gpu.release(y);
  return values;
}

/** Logits of all rows with one adapter on the model. */
async function alone(name: string, ids: Tensor): Promise<Float32Array> {
  const adapter = await loadPeft(model, files.get(name) as Directory);
  const values = await logits(ids);
  adapter.detach();
  return values;
}

/** The pool's logits of ids, each row by the adapter of its name. */
async function mixed(pool: AdapterPool, names: readonly (string | undefined)[], ids: Tensor): Promise<Float32Array> {
  const [B = 0, T = 0] = ids.shape;
  const slots = names.map((name) => (name === undefined ? -1 : pool.acquire(name)));
  expect(slots).not.toContain(undefined);
  const ofRows = tensor(
    gpu,
    Int32Array.from({ length: B * T }, (_, i) => slots[Math.floor(i / T)] as number),
    [B, T],
  );
  const values = await logits(ids, (pass) => pool.during(ofRows, pass));
  for (const slot of slots) if (slot !== -1) pool.release(slot as number);
  gpu.release(ofRows);
  return values;
}

async function poolWith(
  names: readonly string[],
  options: Partial<ConstructorParameters<typeof AdapterPool>[1]> = {},
): Promise<AdapterPool> {
  const pool = new AdapterPool(model, { pages: 60, maxRank: 17, ...options });
  for (const name of names) await pool.register(name, plainOf(name));
  pool.enable();
  pools.push(pool);
  return pool;
}

const row = (values: Float32Array, t: number, rows: number): Float32Array =>
  values.subarray((t * values.length) / rows, ((t + 1) * values.length) / rows);

test.each([1, 5, 30])("a mixed batch equals each row alone, %s tokens long", async (T) => {
  const pool = await poolWith(NAMES);
  const rows = [undefined, ...NAMES, "dora", undefined];
  const ids = randomIds(rows.length, T);
  const together = await mixed(pool, rows, ids);
  pool.disable();
  const base = await logits(ids);
  for (const [t, name] of rows.entries()) {
    const own = row(together, t, rows.length);
    if (name === undefined) expect(own, "the bits of the base").toEqual(row(base, t, rows.length));
    else {
      const expected = row(await alone(name, ids), t, rows.length);
      expectRelative(own, expected, 1e-5, name);
      expect(
        Math.max(...expected.map((x, i) => Math.abs(x - (row(base, t, rows.length)[i] as number)))),
      ).toBeGreaterThan(0.1);
    }
  }
  gpu.release(ids);
});

test("tokens of one row may have adapters of their own, and layers that are asked one by one give the same", async () => {
  const pool = await poolWith(NAMES);
  const [q, k] = ["q_proj", "k_proj"].map((name) => model.linears.get(`model.layers.0.self_attn.${name}`));
  const slots = tensor(gpu, Int32Array.of(pool.acquire("rs") as number, -1, pool.acquire("dora") as number), [3]);
  const x = tensor(gpu, Float32Array.from(randomNd([1, 3, 32], new Random(freshSeed())).data), [1, 3, 32]);
  const weights = [q, k].map((layer) => layer?.weight as Tensor);
  const together = gpu.scope(() => pool.during(slots, () => q?.adapters?.[0]?.group?.apply(x) ?? []));
  const apart = gpu.scope(() =>
    pool.during(slots, () =>
      [q, k].map((layer, i) => layer?.adapters?.[0]?.apply(x, weights[i] as Tensor, layer.bias)),
    ),
  );
  for (const [i, one] of apart.entries()) expect(await read(one as Tensor)).toEqual(await read(together[i] as Tensor));
  gpu.release(...together, ...(apart as Tensor[]), x, slots);
});

test("outside of a pass the layers compute as without adapters, and a disabled pool leaves nothing behind", async () => {
  const ids = randomIds(2, 3);
  const base = await logits(ids);
  const pool = await poolWith(["plain"]);
  expect(await logits(ids)).toEqual(base);
  pool.disable();
  expect([...model.linears.values()].every(({ adapters: on }) => on === undefined)).toBe(true);
  const adapter = await loadPeft(model, files.get("plain") as Directory);
  expect(() => pool.enable()).toThrow(
    new ShapeError(
      "enable: adapters share a layer where each only adds B·A to it, got two on model.layers.0.self_attn.q_proj of which one does more: DoRA, a start from the base, a trained copy or bias, a pool. Disable or unmerge the other first",
    ),
  );
  adapter.detach();
  gpu.release(ids);
});

test("the longest unused go first, and come back as they were", async () => {
  // plain 4, one 1, patterns 7 and dora 3 + 1 pages: not all at once.
  const pool = await poolWith(["plain", "one", "patterns", "dora"], { pages: 12 });
  const ids = randomIds(1, 4);
  const first = new Map<string, Float32Array>();
  for (const name of ["plain", "one", "patterns"]) first.set(name, await mixed(pool, [name], ids));
  expect(pool.counts).toMatchObject({ resident: 3, used: 0, freePages: 0, loads: 3, evictions: 0 });
  await mixed(pool, ["plain"], ids); // now "one" and "patterns" are older
  first.set("dora", await mixed(pool, ["dora"], ids));
  expect(pool.counts).toMatchObject({ resident: 2, freePages: 4, loads: 4, evictions: 2 });
  expect(await mixed(pool, ["plain"], ids)).toEqual(first.get("plain"));
  expect(pool.counts.loads).toBe(4); // it had stayed
  expect(await mixed(pool, ["one"], ids)).toEqual(first.get("one"));
  for (const [name, values] of first) expect(await mixed(pool, [name], ids), name).toEqual(values);
  gpu.release(ids);
});

test("pages that lie apart serve as well as pages in a row", async () => {
  const pool = await poolWith(["one", "plain", "patterns", "dora"], { pages: 12 });
  const ids = randomIds(1, 4);
  const expected = await mixed(pool, ["patterns"], ids);
  pool.unregister("patterns");
  // plain takes 0–3, one 4, dora 5–8; without plain and dora 0–3 and 5–11 are free, so 7 in a row; with dora, none.
  for (const name of ["plain", "one", "dora"]) await mixed(pool, [name], ids);
  pool.unregister("plain");
  expect(pool.acquire("one")).toBeDefined();
  expect(pool.acquire("dora")).toBeDefined();
  await pool.register("patterns", plainOf("patterns"));
  expect(pool.counts.freePages).toBe(7);
  expect(await mixed(pool, ["patterns"], ids)).toEqual(expected);
  gpu.release(ids);
});

test("what is in use stays: there is no room, and nothing has changed, until it is released", async () => {
  const pool = await poolWith(["plain", "one", "rs"], { pages: 18 });
  const plain = pool.acquire("plain") as number;
  expect(pool.acquire("plain")).toBe(plain);
  const one = pool.acquire("one") as number;
  expect(one).not.toBe(plain);
  pool.release(one);
  const before = pool.counts;
  expect(pool.acquire("rs")).toBeUndefined(); // 17 pages, of which plain has 4 of 18
  expect(pool.counts).toEqual(before);
  expect(() => pool.unregister("plain")).toThrow(
    new ShapeError('unregister: "plain" must be released first, got it in use 2 times'),
  );
  pool.release(plain);
  expect(pool.acquire("rs")).toBeUndefined();
  pool.release(plain);
  expect(pool.acquire("rs")).toBeDefined();
  expect(pool.counts).toMatchObject({ resident: 1, evictions: 2 });
  expect(() => pool.release(plain)).toThrow(new ShapeError(`release: the slot must be in use, got ${plain}`));
  pool.unregister("plain");
  expect(pool.names).toEqual(["one", "rs"]);
  expect(pool.counts).toMatchObject({ resident: 1, freePages: 1 });
});

test("slots run out as pages do", async () => {
  const pool = await poolWith(["plain", "one", "dora"], { slots: 2 });
  expect([pool.acquire("plain"), pool.acquire("one")]).toEqual([0, 1]);
  expect(pool.acquire("dora")).toBeUndefined();
  pool.release(0);
  expect(pool.acquire("dora")).toBe(0);
});

test("loading makes no pipeline, and a traced step takes what was loaded after it was traced", async () => {
  const pool = await poolWith(NAMES, { pages: 24 });
  const ids = randomIds(3, 5);
  const slots = empty(gpu, [3, 5], "slots", "i32");
  const y = empty(gpu, [3, 5, 64], "logits");
  gpu.write(slots, new Int32Array(15).fill(-1));
  const plan = gpu.trace(() =>
    copyTo(
      pool.during(slots, () => model.logits(ids)),
      y,
    ),
  );
  const made = vi.spyOn(gpu.device, "createComputePipeline");
  for (const name of NAMES) {
    const slot = pool.acquire(name) as number;
    gpu.write(slots, new Int32Array(15).fill(slot));
    plan.run();
    const values = await read(y);
    pool.release(slot);
    expect(made).toHaveBeenCalledTimes(0);
    pool.disable();
    expectRelative(values, await alone(name, ids), 1e-5, name);
    made.mockClear(); // the adapter alone has pipelines of its own
    pool.enable();
  }
  expect(pool.counts.evictions).toBeGreaterThan(0);
  made.mockRestore();
  plan.destroy();
  gpu.release(ids, slots, y);
});

test("pages in f16 take half the bytes and give nearly the same", async () => {
  const ids = randomIds(NAMES.length, 6);
  const wide = await poolWith(NAMES);
  const expected = await mixed(wide, NAMES, ids);
  wide.disable();
  const half = await poolWith(NAMES, { dtype: "f16" });
  const actual = await mixed(half, NAMES, ids);
  expectClose(actual, expected, 2e-2, "logits");
  expect(actual).not.toEqual(expected);
  gpu.release(ids);
});

test("the pool's bytes are known before it is made, on the device and on the host", async () => {
  const names = ["plain", "some"];
  const bytes = new Map<string, number>();
  for (const dtype of ["f32", "f16"] as const) {
    const pool = await poolWith(names, { dtype, slots: 5 });
    const { gpuBytes, hostBytes } = pool.counts;
    const squares = 4 * (16 + 32 + 27); // of the rows of k, o and gate in layer 1
    expect(gpuBytes - squares).toBe(
      poolBytes(linearSizes(model.config as ModelConfig).values(), { pages: 60, maxRank: 17, slots: 5, dtype }),
    );
    bytes.set(dtype, hostBytes);
    pool.disable();
  }
  // All of "plain", and of "some" A of q, k, v, of o and of gate and up: rank 8; B of three with a row for the gain. 27 columns take 28.
  const layer = 4 * (3 * 32 + 32 + 2 * 32 + 28 + (32 + 16 + 16) + 32 + 2 * 28 + 32);
  expect(bytes.get("f32")).toBe(4 * (2 * layer + 8 * (3 * 32 + 32 + 2 * 32) + 9 * (16 + 32 + 28)));
  expect(bytes.get("f16")).toBe((bytes.get("f32") as number) / 2);
});

test("what cannot be mixed is refused, in whole sentences", async () => {
  const pool = await poolWith(["plain"], { pages: 8, maxRank: 8 });
  pool.disable();
  const refused = async (name: string, adapter: PlainAdapter, error: Error): Promise<void> => {
    const before = pool.counts;
    await expect(pool.register(name, adapter)).rejects.toThrow(error);
    expect(pool.counts).toEqual(before);
  };
  const mixable = (what: string): FormatError =>
    new FormatError(
      `register: "x" must be LoRA or DoRA of linear layers alone to be mixed with others, got ${what}. Use it alone, or merge it into a model of its own`,
    );
  const q = "model.layers.0.self_attn.q_proj";
  const targets = { r: 2, alpha: 2, targetModules: ["layers.0.self_attn.q_proj"] };
  await refused("x", await addAdapter("x", { ...targets, loraBias: true }), mixable(`a bias of B of ${q}`));
  await refused("x", await addAdapter("x", { ...targets, bias: "lora_only" }), mixable(`a bias of ${q}`));
  await refused(
    "x",
    await addAdapter("x", { ...targets, modulesToSave: ["model.norm"] }),
    mixable("a trained model.norm.weight"),
  );
  await refused(
    "x",
    await addAdapter("x", { ...targets, trainableTokenIndices: [3] }),
    mixable("a trained model.embed_tokens.token_adapter.trainable_tokens_delta"),
  );
  for (const table of ["embed_tokens", "lm_head"])
    await refused(
      "x",
      await addAdapter("x", { ...targets, targetModules: [...targets.targetModules, table] }),
      mixable(`LoRA of ${table === "lm_head" ? table : `model.${table}`}`),
    );
  const strange = new Map(
    [...plainOf("one").modules].map(([name, module]) => [name.replace("layers", "blocks"), module]),
  );
  await refused(
    "x",
    { ...plainOf("one"), modules: strange },
    new FormatError(
      'register: the modules of "x" must be linear layers of the model, got model.blocks.0.self_attn.q_proj, model.blocks.0.self_attn.v_proj, model.blocks.1.self_attn.q_proj and 1 more. Is it an adapter of this model?',
    ),
  );
  const ofUp = plainOf("plain").modules.get("model.layers.0.mlp.up_proj");
  await refused(
    "x",
    { ...plainOf("one"), modules: new Map(ofUp ? [[q, ofUp]] : []) },
    new FormatError(
      `register: ${q} of "x" must be of a layer [32,32], got one of [27,32]. Is it an adapter of this model?`,
    ),
  );
  await refused(
    "rs",
    plainOf("rs"),
    new ShapeError(
      'register: the rank of "rs" must be at most 8, got 17. Make the pool with a larger maxRank, or merge the adapter into a model of its own',
    ),
  );
  await refused(
    "some",
    plainOf("some"),
    new ShapeError('register: "some" must fit 8 pages, got 9. Make the pool with more pages'),
  );
  await refused(
    "plain",
    plainOf("plain"),
    new ShapeError('register: names must differ, got "plain" again. Unregister the other first'),
  );
  for (const call of ["acquire", "unregister"] as const)
    expect(() => pool[call]("nobody")).toThrow(new ShapeError(`${call}: the adapter must be registered, got "nobody"`));
  const large = structuredClone(plainOf("one"));
  large.modules.get(q)?.A.values.fill(65520);
  const half = await poolWith([], { dtype: "f16" });
  await expect(half.register("x", large)).rejects.toThrow(
    new ShapeError(
      'register: values of "x" must be below 65520 in a pool in f16, got one beyond. Make the pool in f32',
    ),
  );
});

test("passes that do not fit are refused", async () => {
  expect(() => new AdapterPool(model, { pages: 0, maxRank: 4 })).toThrow(
    new ShapeError("AdapterPool: pages must be a whole number of at least 1, got 0"),
  );
  expect(() => new AdapterPool({ linears: new Map() }, { pages: 1, maxRank: 4 })).toThrow(
    new ShapeError("AdapterPool: the model must have linear layers, got none"),
  );
  const pool = await poolWith([]);
  const [ids, slots] = [randomIds(2, 3), tensor(gpu, Int32Array.of(-1, -1), [2])];
  const pass = (): Tensor => model.logits(ids);
  expect(() => gpu.scope(() => pool.during(slots, pass))).toThrow(
    new ShapeError("AdapterPool: each row of x needs a slot, got 2 slots and x [2,3,32]"),
  );
  expect(() => gpu.scope(() => pool.during(slots, () => pool.during(slots, pass)))).toThrow(
    new ShapeError("during: the pool must be enabled and idle, got it within another pass"),
  );
  const layer = model.linears.get("model.layers.0.mlp.down_proj");
  const x = empty(gpu, [2, 27], "x");
  x.requiresGrad = true;
  const [on] = layer?.adapters ?? [];
  expect(() => gpu.scope(() => pool.during(slots, () => on?.apply(x, layer?.weight as Tensor)))).toThrow(
    new ShapeError("AdapterPool: a pool is for inference, got an x that requires a gradient. Train by attachLora"),
  );
  expect(() => on?.add(x, x)).toThrow(
    new ShapeError(
      "AdapterPool: a pool must be the only adapter of a layer, got another on model.layers.0.mlp.down_proj",
    ),
  );
  pool.disable();
  expect(() => pool.during(slots, pass)).toThrow(
    new ShapeError("during: the pool must be enabled and idle, got it disabled"),
  );
  gpu.release(ids, slots, x);
});

describe("adapters that PEFT made", () => {
  test.each(["rslora", "patterns", "layers", "regex", "dora", "dora-gpt2", "dora-patterns"])(
    "%s gives PEFT's logits out of a pool",
    async (name) => {
      const json = async (path: string) => JSON.parse(await readFile(`test/golden/${path}`, "utf8"));
      const { base } = await json(`adapters/${name}/expected.json`);
      const { input_ids: ids }: { input_ids: number[][] } = await json(`models/${base}/expected.json`);
      const golden = await valuesOf(`test/golden/adapters/${name}/expected.safetensors`);
      const own = await loadModel(gpu, diskDirectory(`test/golden/models/${base}`));
      const pool = new AdapterPool(own, { pages: 16, maxRank: 8 });
      await pool.register(name, await readAdapter(diskDirectory(`test/golden/adapters/${name}/adapter`)));
      pool.enable();
      const shape = [ids.length, ids[0]?.length ?? 0];
      const slots = tensor(gpu, new Int32Array(ids.flat().length).fill(pool.acquire(name) as number), shape);
      const y = gpu.scope(() => pool.during(slots, () => own.logits(tensor(gpu, Int32Array.from(ids.flat()), shape))));
      expectClose(await read(y), golden.get("lora.logits") ?? [], 2e-4, "logits");
      gpu.release(y, slots);
      own.destroy();
    },
  );
});
