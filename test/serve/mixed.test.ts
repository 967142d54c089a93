// Requests with adapters of their own in one batch: each gets what it gets alone.
import { readFileSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { type Directory, memoryDirectory } from "../../src/io/bytes.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { readAdapter } from "../../src/lora/adapter-file.ts";
import { AdapterPool } from "../../src/lora/adapter-pool.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import { loadModel } from "../../src/models/load.ts";
import { BatchEngine } from "../../src/serve/batch-engine.ts";
import type { GenerationRequest } from "../../src/serve/engine-types.ts";
import { generate } from "../../src/serve/generate.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { testGpu } from "../harness.ts";
import { hasShared, shared } from "../shared.ts";
import { randomAdapter } from "./adapters.ts";

type Model = Awaited<ReturnType<typeof loadModel>>;
let model: Model;
const adapters = new Map<string, Directory>();
const random = new Random(11);

const CONFIGS: Readonly<Record<string, LoraConfig>> = {
  small: { r: 1, alpha: 3, targetModules: ["q_proj"] },
  wide: { r: 17, alpha: 9, targetModules: "all-linear" },
  stabilised: { r: 8, alpha: 8, targetModules: ["q_proj", "v_proj", "down_proj"], useRslora: true },
  dora: { r: 4, alpha: 8, targetModules: ["k_proj", "o_proj", "up_proj"], useDora: true },
};

beforeAll(async () => {
  model = await loadModel(await testGpu(), diskDirectory("test/golden/llama-default"));
  for (const [name, config] of Object.entries(CONFIGS))
    adapters.set(name, memoryDirectory(name, await randomAdapter(model, config, random)));
});
afterAll(() => model.destroy());

async function alone({ adapter, ...request }: GenerationRequest): Promise<number[]> {
  const files = adapters.get(adapter ?? "");
  const attached = files && (await loadPeft(model, files));
  const ids: number[] = [];
  for await (const id of generate(model, request)) ids.push(id);
  attached?.detach();
  return ids;
}

async function answer(engine: BatchEngine, request: GenerationRequest): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of engine.generate(request)) ids.push(id);
  return ids;
}

async function withPool<T>(pages: number, run: (engine: BatchEngine, pool: AdapterPool) => Promise<T>): Promise<T> {
  const before = model.gpu.counters().bytesLive;
  const pool = new AdapterPool(model, { pages, maxRank: 20 });
  for (const [name, files] of adapters) await pool.register(name, await readAdapter(files));
  pool.enable();
  const engine = new BatchEngine(model, { adapters: pool, maxRows: 8 });
  try {
    return await run(engine, pool);
  } finally {
    await engine.close();
    pool.destroy();
    expect(model.gpu.counters().bytesLive).toBe(before);
  }
}

const requests = (count: number): GenerationRequest[] =>
  Array.from({ length: count }, (_, i) => ({
    adapter: [undefined, ...adapters.keys()][i % 5],
    promptIds: Array.from({ length: 1 + random.below(20) }, () => random.below(model.config.vocabSize)),
    maxTokens: 1 + random.below(12),
  }));

test("requests with five adapters and none in one batch are answered as each is alone", async () => {
  const asked = requests(15);
  const expected: number[][] = [];
  for (const request of asked) expected.push(await alone(request));
  await withPool(64, async (engine, pool) => {
    expect(await Promise.all(asked.map((request) => answer(engine, request)))).toEqual(expected);
    expect(pool.counts).toMatchObject({ resident: 4, used: 0, evictions: 0, loads: 4 });
  });
});

test("where not all adapters fit they take turns, and the answers are the same", async () => {
  const asked = requests(15);
  const expected: number[][] = [];
  for (const request of asked) expected.push(await alone(request));
  await withPool(20, async (engine, pool) => {
    expect(await Promise.all(asked.map((request) => answer(engine, request)))).toEqual(expected);
    expect(pool.counts.evictions).toBeGreaterThan(0);
  });
});

test("a prompt is not taken for known where another adapter has seen it", async () => {
  const promptIds = Array.from({ length: 33 }, () => random.below(model.config.vocabSize));
  const asked = [undefined, "wide", "dora"].map((adapter) => ({ adapter, promptIds, maxTokens: 6 }));
  const expected: number[][] = [];
  for (const request of asked) expected.push(await alone(request));
  await withPool(64, async (engine) => {
    for (const [i, request] of asked.entries()) expect(await answer(engine, request)).toEqual(expected[i]);
    expect(engine.stats().cachedPromptTokens).toBe(0);
    expect(await answer(engine, { adapter: "wide", promptIds, maxTokens: 6 })).toEqual(expected[1]);
    expect(engine.stats().cachedPromptTokens).toBe(32);
  });
});

test("an adapter with many requests does not keep another waiting", async () => {
  await withPool(64, async (engine) => {
    const noEnd = new Map(model.config.eosIds.map((id) => [id, -1e9]));
    const order: string[] = [];
    const ask = async (adapter: string): Promise<void> => {
      await answer(engine, { adapter, promptIds: [1, 2, 3], maxTokens: 20, logitBias: noEnd });
      order.push(adapter);
    };
    await Promise.all([...Array.from({ length: 24 }, () => ask("wide")), ask("small")]);
    expect(order.indexOf("small")).toBeLessThan(8);
  });
});

test("an adapter is unloaded when those who use it are done, and what comes under its name afterwards begins anew", async () => {
  const promptIds = Array.from({ length: 40 }, (_, i) => i + 1);
  const [small, wide] = [
    await alone({ adapter: "small", promptIds, maxTokens: 6 }),
    await alone({ adapter: "wide", promptIds, maxTokens: 6 }),
  ];
  expect(small).not.toEqual(wide);
  await withPool(64, async (engine, pool) => {
    const running = answer(engine, { adapter: "small", promptIds, maxTokens: 6 });
    const gone = engine.unload("small");
    expect(engine.adapters).toEqual(["wide", "stabilised", "dora"]);
    expect(() => engine.generate({ adapter: "small", promptIds: [1], maxTokens: 1 })).toThrow(
      new ShapeError('generate: the adapter must be one of wide, stabilised, dora, got "small"'),
    );
    expect(await running).toEqual(small);
    await gone;
    expect(pool.names).toEqual(["wide", "stabilised", "dora"]);
    await expect(engine.unload("small")).rejects.toThrow(
      new ShapeError('unload: the adapter must be loaded, got "small"'),
    );
    // The same name and the same prompt, whose pages are there still: they are of other weights.
    await engine.load("small", adapters.get("wide") as Directory);
    expect(await answer(engine, { adapter: "small", promptIds, maxTokens: 6 })).toEqual(wide);
    expect(engine.stats().cachedPromptTokens).toBe(0);
    expect(await answer(engine, { adapter: "small", promptIds, maxTokens: 6 })).toEqual(wide);
    expect(engine.stats().cachedPromptTokens).toBe(32);
  });
});

test("where somebody else holds the pool a request is told, and does not wait for ever", async () => {
  await withPool(20, async (engine, pool) => {
    const slot = pool.acquire("wide");
    await expect(answer(engine, { adapter: "stabilised", promptIds: [1, 2], maxTokens: 2 })).rejects.toThrow(
      new ShapeError(
        'generate: the pool must have room for "stabilised" where no request runs, got it in use by others',
      ),
    );
    pool.release(slot as number);
    await answer(engine, { adapter: "stabilised", promptIds: [1, 2], maxTokens: 2 });
  });
});

test.skipIf(!hasShared)(
  "greedy answers with PEFT's adapter equal PEFT's, beside those of the base (needs ../shared)",
  async () => {
    const golden = JSON.parse(readFileSync("test/golden/answers-stories260k.json", "utf8")) as {
      readonly max_new_tokens: number;
      readonly eos: number;
      readonly prompts: readonly (readonly number[])[];
      readonly greedy: readonly (readonly number[])[];
      readonly adapted: readonly (readonly number[])[];
    };
    const stories = await loadModel(await testGpu(), diskDirectory(shared("models/stories260K")));
    const pool = new AdapterPool(stories, { pages: 32, maxRank: 16 });
    await pool.register("golden", await readAdapter(diskDirectory(shared("golden/stories260K-lora/final"))));
    pool.enable();
    const engine = new BatchEngine(stories, { adapters: pool });
    const ask = (adapter: string | undefined) =>
      golden.prompts.map((promptIds) => answer(engine, { adapter, promptIds, maxTokens: golden.max_new_tokens }));
    const found = await Promise.all([...ask(undefined), ...ask("golden")]);
    const expected = [...golden.greedy, ...golden.adapted].map((ids) =>
      ids.includes(golden.eos) ? ids.slice(0, ids.indexOf(golden.eos)) : ids,
    );
    expect(found).toEqual(expected);
    await engine.close();
    pool.destroy();
    stories.destroy();
  },
);
