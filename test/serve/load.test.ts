// All of the server but its socket under load: streams with random adapters, of which some are cut off, while others come and go with other weights.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { type Directory, memoryDirectory } from "../../src/io/bytes.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadTokenizer, type PairTokenizer } from "../../src/io/tokenizer.ts";
import { readAdapter } from "../../src/lora/adapter-file.ts";
import { AdapterPool } from "../../src/lora/adapter-pool.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import { BatchEngine } from "../../src/serve/batch-engine.ts";
import { generateTokens } from "../../src/serve/generate.ts";
import { textOf } from "../../src/serve/text.ts";
import { Random } from "../../src/tensor/random.ts";
import { freshSeed, testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { randomAdapter } from "./adapters.ts";
import { ADMIN_KEY, eventsOf, type TestApp, testApp } from "./http/harness.ts";

const [STREAMS, EACH, MAX_TOKENS, ROWS] = [64, 4, 8, 16];
const STAY = ["a", "b", "c"];
/** Comes and goes, with the weights of one and another by turns. */
const VISITOR = "guest";
const WEIGHTS = [...STAY, "d", "e"];
/** The last one is of more than two pages. */
const PROMPTS = [[5], [7, 8, 9], Array.from({ length: 37 }, (_, i) => 3 + (i % 40))];
const folders = new Map<string, Directory>();
/** By weights and prompt. */
const expected = new Map<string, string>();
let place: string;
let model: CausalModel;
let tokenizer: PairTokenizer;

beforeAll(async () => {
  place = await mkdtemp(join(tmpdir(), "lowrank-"));
  await writeTinyModel(place, { tokenizer: true });
  tokenizer = await loadTokenizer(diskDirectory(place));
  model = await loadModel(await testGpu(), diskDirectory(place));
  const random = new Random(5);
  for (const [i, name] of WEIGHTS.entries()) {
    const config = { r: 1 + 2 * i, alpha: 8, targetModules: "all-linear", useDora: i === 1 } as const;
    folders.set(name, memoryDirectory(name, await randomAdapter(model, config, random)));
  }
  for (const name of ["base", ...WEIGHTS]) {
    const files = folders.get(name);
    const adapter = files && (await loadPeft(model, files));
    for (const promptIds of PROMPTS) expected.set(`${name} ${promptIds}`, await alone(promptIds));
    adapter?.detach();
  }
});
afterAll(async () => {
  model.destroy();
  await rm(place, { recursive: true });
});

async function alone(promptIds: readonly number[]): Promise<string> {
  const tokens = generateTokens(model, { promptIds, maxTokens: MAX_TOKENS });
  let text = "";
  for await (const piece of textOf(tokens, { tokenizer, promptIds, room: MAX_TOKENS })) text += piece.text;
  return text;
}

/** A greedy answer, streamed; its text is undefined where it was cut off after so many reads. */
async function ask(app: TestApp, name: string, prompt: readonly number[], reads = Number.POSITIVE_INFINITY) {
  const response = await app.post("/v1/completions", {
    ...{ model: name, prompt, max_tokens: MAX_TOKENS, temperature: 0, stream: true },
  });
  if (response.status !== 200 || !response.body) return { status: response.status, text: await response.text() };
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let all = "";
  for (let i = 0; ; i++) {
    if (i === reads) {
      await reader.cancel();
      return { status: 200, text: undefined };
    }
    const { value, done } = await reader.read();
    if (done) break;
    all += decoder.decode(value, { stream: true });
  }
  const { objects, isDone } = eventsOf(all);
  expect(isDone, all).toBe(true);
  const texts = objects.map(({ choices }) => (choices as { text: string }[])[0]?.text ?? "");
  return { status: 200, text: texts.join("") };
}

test.each(["host", "device"] as const)(
  "64 streams get what each model says alone while adapters come and go, and leave nothing behind, tokens chosen by the %s",
  async (choices) => {
    expect(new Set(expected.values()).size, "the models differ").toBeGreaterThan(expected.size / 2);
    const bytes = model.gpu.counters().bytesLive;
    const pool = new AdapterPool(model, { pages: 16, maxRank: 9 });
    for (const name of STAY) await pool.register(name, await readAdapter(folders.get(name) as Directory));
    pool.enable();
    const engine = new BatchEngine(model, { adapters: pool, maxRows: ROWS, maxStepTokens: 32, choices });
    const app = testApp({
      ...{ engine, tokenizer, adminKey: ADMIN_KEY, limits: { concurrentPerKey: 1000 } },
      adapterDirectory: async (name) => folders.get(name),
    });
    const seed = freshSeed();
    const counts = { whole: 0, cutOff: 0, unknown: 0 };
    const stream = async (n: number): Promise<void> => {
      const random = new Random(seed + n);
      for (let i = 0; i < EACH; i++) {
        const name = ["base", ...STAY, VISITOR][random.below(5)] as string;
        const prompt = PROMPTS[random.below(PROMPTS.length)] as number[];
        // Some leave while they wait for a place, or before they have read anything.
        const { status, text } = await ask(app, name, prompt, random.uniform() < 0.3 ? random.below(6) : undefined);
        const models = name === VISITOR ? ["d", "e"] : [name];
        if (text === undefined) counts.cutOff++;
        else if (status === 404 && name === VISITOR) counts.unknown++;
        else {
          expect(status, `${text}, seed ${seed}`).toBe(200);
          expect(models.map((one) => expected.get(`${one} ${prompt}`))).toContain(text);
          counts.whole++;
        }
      }
    };
    const comeAndGo = async (): Promise<void> => {
      for (let i = 0; i < 8; i++) {
        const weights = i % 2 ? "d" : "e";
        const admin = async (action: string, body: object): Promise<void> => {
          const response = await app.post(`/v1/${action}`, body, { Authorization: `Bearer ${ADMIN_KEY}` });
          expect(response.status, await response.text()).toBe(200);
        };
        await admin("load_lora_adapter", { lora_name: VISITOR, lora_path: weights });
        // The second time its pages are known.
        for (let n = 0; n < 2; n++)
          for (const prompt of PROMPTS) {
            const right = { status: 200, text: expected.get(`${weights} ${prompt}`) };
            expect(await ask(app, VISITOR, prompt), `${weights}, seed ${seed}`).toEqual(right);
          }
        await admin("unload_lora_adapter", { lora_name: VISITOR });
      }
    };
    await Promise.all([comeAndGo(), ...Array.from({ length: STREAMS }, (_, n) => stream(n))]);
    let together = 0;
    const full = Array.from({ length: ROWS }, async () => {
      for await (const _ of engine.generate({ promptIds: [5], maxTokens: MAX_TOKENS }))
        together = Math.max(together, engine.stats().running);
    });
    await Promise.all(full);
    expect(together, "all rows are free again").toBe(ROWS);
    await app.app.drain(10_000);
    expect(counts.whole + counts.cutOff + counts.unknown).toBe(STREAMS * EACH);
    expect(counts.whole, "answered whole").toBeGreaterThan(STREAMS);
    expect(counts.cutOff, "cut off").toBeGreaterThan(STREAMS / 4);
    expect(app.seen.errors).toEqual([]);
    expect(engine.stats()).toMatchObject({ running: 0, waiting: 0, kvPagesUsed: 0 });
    expect(engine.stats().cachedPromptTokens, "pages were shared").toBeGreaterThan(1000);
    expect(pool.counts).toMatchObject({ used: 0 });
    await engine.close();
    pool.destroy();
    expect(model.gpu.counters().bytesLive).toBe(bytes);
  },
);
