// The plainest engine behind the server: real text, by the base and by an adapter, one answer after the other.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, expect, test } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import { savePeftTo } from "../../src/node.ts";
import type { Engine } from "../../src/serve/engine-types.ts";
import { QueueFull } from "../../src/serve/errors.ts";
import { generate } from "../../src/serve/generate.ts";
import { oneAtATime } from "../../src/serve/one-at-a-time.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { loadTokenizer, type Tokenizer } from "../../src/tokenizer.ts";
import { testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { testApp } from "./http/harness.ts";

let home = "";
let gpu: Gpu;
let model: CausalModel;
let tokenizer: Tokenizer;
let engine: Engine;
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-engine-"));
  await writeTinyModel(at("model"), { tokenizer: true });
  gpu = await testGpu();
  model = await loadModel(gpu, diskDirectory(at("model")));
  tokenizer = await loadTokenizer(diskDirectory(at("model")));
  const adapter = attachLora(model, { r: 4, alpha: 16, targetModules: "all-linear" });
  const random = new Random(5);
  for (const { A, B } of adapter.pairs.values())
    for (const t of [A, B])
      gpu.write(
        t,
        Float32Array.from({ length: t.shape.reduce((a, b) => a * b) }, () => random.normal(0, 0.3)),
      );
  await savePeftTo(adapter, at("adapter"), "tiny");
  adapter.detach();
});
afterAll(async () => {
  gpu.destroy();
  await rm(home, { recursive: true, force: true });
});
beforeEach(() => {
  engine = oneAtATime(model, { maxWaiting: 1 });
});

async function idsOf(tokens: AsyncIterable<number | { readonly id: number }>): Promise<number[]> {
  const ids: number[] = [];
  for await (const token of tokens) ids.push(typeof token === "number" ? token : token.id);
  return ids;
}
const promptIds = [5, 6, 7];

test("a request has the text of generateTokens, with the adapter only where it is asked for", async () => {
  const plain = await idsOf(generate(model, { promptIds, maxTokens: 12 }));
  await engine.load("pirate", diskDirectory(at("adapter")));
  const other = await idsOf(engine.generate({ promptIds, maxTokens: 12, adapter: "pirate" }));
  expect(other).not.toEqual(plain);
  expect(await idsOf(engine.generate({ promptIds, maxTokens: 12 }))).toEqual(plain);
  expect(engine.stats()).toMatchObject({
    running: 0,
    waiting: 0,
    adaptersResident: 1,
    adapterLoads: 1,
    promptTokens: 6,
  });

  const { post } = testApp({ engine, tokenizer });
  for (const [name, ids] of [
    ["base", plain],
    ["pirate", other],
  ] as const) {
    const asked = { model: name, prompt: promptIds, max_tokens: 12, temperature: 0 };
    const answer = (await (await post("/v1/completions", asked)).json()) as { choices: { text: string }[] };
    const before = tokenizer.decode(promptIds);
    expect(answer.choices[0]?.text).toBe(tokenizer.decode([...promptIds, ...ids]).slice(before.length));
  }
  await engine.unload("pirate");
  expect(engine.adapters).toEqual([]);
});

test("a second request waits, a third is one too many, and one that is taken back lets the next go on", async () => {
  const first = engine.generate({ promptIds, maxTokens: 3 });
  await first.next();
  const second = engine.generate({ promptIds, maxTokens: 3 }).next();
  expect(engine.stats()).toMatchObject({ running: 1, waiting: 1 });
  await expect(engine.generate({ promptIds, maxTokens: 3 }).next()).rejects.toThrow(
    new QueueFull("generate: at most 1 requests may wait, got one more"),
  );
  await first.return();
  expect((await second).done).toBe(false);
});

test("an aborted request gives its memory back and makes room", async () => {
  const before = gpu.counters().buffersLive;
  const leave = new AbortController();
  const tokens = engine.generate({ promptIds, maxTokens: 50, signal: leave.signal });
  await tokens.next();
  leave.abort();
  expect((await tokens.next()).done).toBe(true);
  expect(gpu.counters().buffersLive).toBe(before);
  expect((await engine.generate({ promptIds, maxTokens: 1 }).next()).done).toBe(false);
});

test("an adapter that is not there, or is none, is refused and leaves nothing", async () => {
  await expect(engine.generate({ promptIds, maxTokens: 1, adapter: "x" }).next()).rejects.toThrow(
    new ShapeError('generate: the adapter must be loaded, got "x", which is not'),
  );
  await expect(engine.load("x", memoryDirectory("x", {}))).rejects.toThrow(FormatError);
  expect(engine.adapters).toEqual([]);
  expect((await engine.generate({ promptIds, maxTokens: 1 }).next()).done).toBe(false);
});

test("closing waits for what runs, and takes no more", async () => {
  const first = engine.generate({ promptIds, maxTokens: 2 });
  await first.next();
  let isClosed = false;
  const closed = engine.close().then(() => {
    isClosed = true;
  });
  await expect(engine.generate({ promptIds, maxTokens: 3 }).next()).rejects.toThrow(QueueFull);
  expect(isClosed).toBe(false);
  await first.next();
  await first.next();
  await closed;
});
