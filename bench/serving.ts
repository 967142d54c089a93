/**
 * The batch engine on models of random weights: decoding one row against the device's copy bandwidth, many rows with many adapters against the
 * base alone, and a prompt that begins as one before. Each answer is compared with the one alone before anything is timed.
 *
 *     node --import tsx --import ./scripts/wgsl.mjs bench/serving.ts [--quick] [--json bench/results/node-swiftshader-serving.json]
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { parseArgs } from "node:util";
import { defineKernel } from "../src/gpu/kernel.ts";
import { type CausalModel, type Gpu, generate, isPacked, openGpu, Random, type Tensor } from "../src/index.ts";
import { memoryDirectory } from "../src/io/bytes.ts";
import { packMatrix } from "../src/kernels/pack.ts";
import { readConfig } from "../src/models/config.ts";
import { makeModel, weightShapes } from "../src/models/load.ts";
import { AdapterPool, BatchEngine, type PlainAdapter } from "../src/serve.ts";
import type { PackedMatrix } from "../src/tensor/packed.ts";
import { empty, tensor } from "../src/tensor/tensor.ts";
import { commit } from "./page/commit.ts";
import copySource from "./probes/copy.wgsl";

const { values } = parseArgs({ options: { quick: { type: "boolean", default: false }, json: { type: "string" } } });
const [ROWS, RANK, ROUNDS] = [32, 16, values.quick ? 1 : 5];
const TOKENS = values.quick ? 4 : 12;
const copy = defineKernel("copy", copySource);
const PER_THREAD = 4;
const gpu = await openGpu();
/** A Llama whose linear layers are f16. */
async function modelOf(device: Gpu, hidden: number, layers: number, context: number): Promise<CausalModel> {
  const settings = {
    ...{ architectures: ["LlamaForCausalLM"], model_type: "llama", vocab_size: 512, hidden_size: hidden },
    ...{ intermediate_size: (hidden * 11) / 4, num_hidden_layers: layers, num_attention_heads: hidden / 64 },
    ...{ num_key_value_heads: hidden / 256, max_position_embeddings: context, rms_norm_eps: 1e-5, eos_token_id: 0 },
  };
  const config = await readConfig(memoryDirectory("random", { "config.json": JSON.stringify(settings) }));
  const random = new Random(1);
  const period = Float32Array.from({ length: 65_537 }, () => random.normal());
  const weights = new Map<string, Tensor | PackedMatrix>();
  let seed = 0;
  for (const [name, shape] of weightShapes(config)) {
    const size = shape.reduce((a, b) => a * b, 1);
    const [rows = 0, columns = 0] = shape;
    const std = 1 / Math.sqrt(columns || 1);
    seed += 7919;
    const at = (i: number): number => (shape.length === 1 ? 1 : std * (period[(i + seed) % period.length] as number));
    const data = Float32Array.from({ length: size }, (_, i) => at(i));
    const isLinear = name.endsWith("_proj.weight");
    weights.set(name, isLinear ? packMatrix(device, data, [rows, columns], "f16") : tensor(device, data, shape));
  }
  return makeModel(device, config, weights);
}

function adapterOf(model: CausalModel, n: number): PlainAdapter {
  const random = new Random(1000 + n);
  const matrix = (rows: number, columns: number, std: number) => ({
    ...{ rows, columns },
    values: Float32Array.from({ length: rows * columns }, () => random.uniform(-std, std)),
  });
  const modules = new Map(
    [...model.linears].map(([name, { weight }]) => {
      const [N = 0, K = 0] = weight.shape;
      return [name, { A: matrix(RANK, K, 1 / Math.sqrt(K)), B: matrix(N, RANK, 0.2) }];
    }),
  );
  const config = { r: RANK, alpha: RANK, targetModules: "all-linear" as const };
  return { format: "peft", config, baseModel: "", modules, dtypes: new Set(["F32"]), sizeBytes: 0 };
}

const noEnd = new Map([[0, -1e9]]);
const promptOf = (seed: number, length: number): number[] => {
  const random = new Random(seed);
  return Array.from({ length }, () => 1 + random.below(511));
};

/** What the model says alone, one sequence in a plain cache. */
async function alone(model: CausalModel, promptIds: number[], maxTokens: number): Promise<number[]> {
  const ids: number[] = [];
  for await (const id of generate(model, { promptIds, maxTokens, logitBias: noEnd })) ids.push(id);
  return ids;
}

function demandEqual(what: string, found: readonly number[] | undefined, expected: readonly number[]): void {
  if (found?.join() !== expected.join())
    throw new Error(`bench: ${what} must be ${expected.join()}, got ${found?.join()}`);
}

async function answer(
  engine: BatchEngine,
  promptIds: number[],
  maxTokens: number,
  adapter?: string,
): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of engine.generate({ promptIds, maxTokens, adapter, logitBias: noEnd })) ids.push(id);
  return ids;
}

const median = (all: readonly number[]): number => all.toSorted((a, b) => a - b)[Math.floor(all.length / 2)] ?? 0;

async function timed(run: () => Promise<unknown>): Promise<number> {
  const from = performance.now();
  await run();
  return performance.now() - from;
}

/** Bytes that a token of one row reads at least: every weight once. */
function weightBytes(model: CausalModel): number {
  const packed = [...model.packed.values()].reduce((sum, { words }) => sum + words.sizeBytes, 0);
  return packed + model.head.reduce((sum, part) => sum + (isPacked(part) ? 0 : part.sizeBytes), 0);
}

async function oneRow() {
  const model = await modelOf(gpu, 2048, 2, 256);
  const engine = new BatchEngine(model, { maxRows: 1, maxStepTokens: 64 });
  const promptIds = promptOf(1, 8);
  demandEqual("one row", await answer(engine, promptIds, 2 + TOKENS), await alone(model, promptIds, 2 + TOKENS));
  const stepMs: number[] = [];
  for (let i = 0; i < ROUNDS; i++) {
    const one = await timed(() => answer(engine, promptIds, 2));
    const more = await timed(() => answer(engine, promptIds, 2 + TOKENS));
    stepMs.push((more - one) / TOKENS);
  }
  await engine.close();
  const bytes = weightBytes(model);
  model.destroy();
  const [from, to] = [empty(gpu, [1 << 24], "copy"), empty(gpu, [1 << 24], "copy")];
  const copyMs: number[] = [];
  for (let i = 0; i < 7; i++)
    copyMs.push(
      await timed(async () => {
        const n = from.size / 4;
        copy(gpu, { n }, { x: from, y: to }, [n / PER_THREAD], { PER_THREAD });
        gpu.flush();
        await gpu.finish();
      }),
    );
  gpu.release(from, to);
  const [weightsGbs, copyGbs] = [bytes / median(stepMs) / 1e6, (2 * from.sizeBytes) / median(copyMs) / 1e6];
  return {
    hidden: 2048,
    layers: 2,
    weightBytes: bytes,
    stepMs: median(stepMs),
    weightsGbs,
    copyGbs,
    share: weightsGbs / copyGbs,
  };
}

async function manyRows() {
  const model = await modelOf(gpu, 2048, 1, 64);
  const prompts = Array.from({ length: ROWS }, (_, i) => promptOf(10 + i, 2));
  const pool = new AdapterPool(model, { pages: ROWS * RANK, maxRank: RANK, slots: ROWS });
  for (let n = 0; n < ROWS; n++) await pool.register(`${n}`, adapterOf(model, n));
  pool.enable();
  const engine = new BatchEngine(model, {
    adapters: pool,
    maxRows: ROWS,
    maxStepTokens: 2 * ROWS,
    cacheTokens: 64 * ROWS,
  });
  const adapterFor = (count: number, i: number): string | undefined => (count === 0 ? undefined : `${i % count}`);
  const batch = (count: number, tokens: number): Promise<number[][]> =>
    Promise.all(prompts.map((ids, i) => answer(engine, ids, tokens, adapterFor(count, i))));
  for (const count of [0, 4, ROWS]) {
    const all = await batch(count, 2);
    for (const [i, ids] of prompts.entries())
      demandEqual(`row ${i} of ${count} adapters`, all[i], await answer(engine, ids, 2, adapterFor(count, i)));
  }
  const ms = new Map<number, number[]>([0, 4, ROWS].map((count) => [count, []]));
  for (let i = 0; i < ROUNDS; i++)
    for (const [count, all] of ms) {
      const short = await timed(() => batch(count, 2));
      all.push(((await timed(() => batch(count, 2 + TOKENS))) - short) / TOKENS);
    }
  await engine.close();
  const base = weightBytes(model);
  const oneAdapter = pool.counts.gpuBytes / ROWS;
  pool.destroy();
  model.destroy();
  const ratios = (count: number): number[] =>
    (ms.get(count) ?? []).map((one, i) => (ms.get(0)?.[i] ?? Number.NaN) / one).toSorted((a, b) => a - b);
  const of = (count: number) => ({
    tokensPerSecond: (1000 * ROWS) / median(ms.get(count) ?? []),
    overBase: median(ratios(count)),
    least: ratios(count)[0],
    most: ratios(count).at(-1),
    byBytes: base / (base + count * oneAdapter),
  });
  return { hidden: 2048, layers: 1, rows: ROWS, r: RANK, base: of(0), adapters4: of(4), adapters32: of(ROWS) };
}

async function prefix() {
  const model = await modelOf(gpu, 512, 2, 1100);
  const engine = new BatchEngine(model, { maxRows: 4, cacheTokens: 2400 });
  const [firsts, seconds, shares]: [number[], number[], number[]] = [[], [], []];
  // The first round traces the steps, and its answers are checked.
  for (let i = 0; i <= ROUNDS; i++) {
    const system = promptOf(90 + i, 1000);
    const ask = (seed: number) => timed(() => answer(engine, [...system, ...promptOf(seed, 20)], 1));
    firsts[i] = await ask(200 + i);
    const before = engine.stats().cachedPromptTokens;
    seconds[i] = await ask(300 + i);
    shares[i] = 1 - (engine.stats().cachedPromptTokens - before) / 1020;
    if (i > 0) continue;
    const again = [...system, ...promptOf(400, 20)];
    demandEqual("a prompt that is known in part", await answer(engine, again, 4), await alone(model, again, 4));
  }
  await engine.close();
  model.destroy();
  const [firstMs, secondMs] = [median(firsts.slice(1)), median(seconds.slice(1))];
  return { promptTokens: 1020, firstMs, secondMs, time: secondMs / firstMs, computed: median(shares) };
}

const result = {
  command: "node --import tsx --import ./scripts/wgsl.mjs bench/serving.ts",
  ...{ commit: commit(), date: new Date().toISOString(), adapter: gpu.info.description },
  oneRow: await oneRow(),
  rows: await manyRows(),
  prefix: await prefix(),
};
console.log(JSON.stringify(result, null, 2));
if (values.json) {
  mkdirSync(dirname(values.json), { recursive: true });
  writeFileSync(values.json, `${JSON.stringify(result, null, 2)}\n`);
}
process.exit(0);
