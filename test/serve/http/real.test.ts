// OpenAI's own client, the server, the batch engine, a pool of adapters and a model: all of it, and nothing made up.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI, { BadRequestError } from "openai";
import { afterAll, beforeAll, expect, test } from "vitest";
import { type Listening, listen } from "../../../src/cli/serve-node.ts";
import { CHATML, chatTemplate } from "../../../src/io/chat-template.ts";
import { diskDirectory } from "../../../src/io/files.ts";
import { loadTokenizer, type PairTokenizer } from "../../../src/io/tokenizer.ts";
import { readAdapter } from "../../../src/lora/adapter-file.ts";
import { AdapterPool } from "../../../src/lora/adapter-pool.ts";
import { attachLora } from "../../../src/lora/attach.ts";
import type { CausalModel } from "../../../src/models/causal.ts";
import { loadModel } from "../../../src/models/load.ts";
import { savePeftTo } from "../../../src/node.ts";
import { BatchEngine } from "../../../src/serve/batch-engine.ts";
import { generateTokens } from "../../../src/serve/generate.ts";
import { createApp } from "../../../src/serve/http/app.ts";
import { textOf } from "../../../src/serve/text.ts";
import { Random } from "../../../src/tensor/random.ts";
import { testGpu } from "../../harness.ts";
import { writeTinyModel } from "../../tiny-model.ts";

const PROMPTS = ["Once upon", "The sea was", "A"];
const NAMES = ["base", "loud", "quiet"];
const MAX_TOKENS = 16;
const expected = new Map<string, string>();
let folder: string;
let tokenizer: PairTokenizer;
let model: CausalModel;
let pool: AdapterPool;
let engine: BatchEngine;
let server: Listening;
let client: OpenAI;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "lowrank-"));
  await writeTinyModel(join(folder, "model"), { tokenizer: true, config: { max_position_embeddings: 256 } });
  const gpu = await testGpu();
  tokenizer = await loadTokenizer(diskDirectory(join(folder, "model")));
  model = await loadModel(gpu, diskDirectory(join(folder, "model")));
  const random = new Random(3);
  for (const name of NAMES) {
    const adapter = name === "base" ? undefined : attachLora(model, { r: 4, alpha: 8, targetModules: "all-linear" }, 1);
    for (const parameter of adapter?.parameters ?? [])
      gpu.write(
        parameter,
        Float32Array.from({ length: parameter.size }, () => random.normal(0, 0.2)),
      );
    if (adapter) await savePeftTo(adapter, join(folder, name), "model");
    for (const prompt of PROMPTS) expected.set(`${name} ${prompt}`, await alone(prompt));
    adapter?.detach();
  }
  pool = new AdapterPool(model, { pages: 16, maxRank: 8 });
  for (const name of NAMES.slice(1)) await pool.register(name, await readAdapter(diskDirectory(join(folder, name))));
  pool.enable();
  engine = new BatchEngine(model, { adapters: pool });
  const app = createApp({
    ...{ engine, tokenizer, renderChat: chatTemplate(CHATML, "chatml"), modelName: "base" },
    hosts: ["127.0.0.1"],
  });
  server = await listen(app, { host: "127.0.0.1", port: 0, maxConnections: 64 });
  client = new OpenAI({ baseURL: `http://127.0.0.1:${server.port}/v1`, apiKey: "none", maxRetries: 0 });
});

afterAll(async () => {
  server.cutOff();
  await server.close();
  await engine.close();
  pool.destroy();
  model.destroy();
  await rm(folder, { recursive: true });
});

async function alone(prompt: string): Promise<string> {
  const promptIds = tokenizer.encode(prompt);
  const tokens = generateTokens(model, { promptIds, maxTokens: MAX_TOKENS });
  let text = "";
  for await (const piece of textOf(tokens, { tokenizer, promptIds, room: MAX_TOKENS })) text += piece.text;
  return text;
}

test("clients of three models at once, half of them streamed, get what each model says alone", async () => {
  expect(new Set(expected.values()).size, "the models differ").toBe(expected.size);
  const asked = NAMES.flatMap((name) =>
    PROMPTS.flatMap((prompt) => [true, false].map((stream) => ({ name, prompt, stream }))),
  );
  const answers = asked.map(async ({ name, prompt, stream }) => {
    const body = { model: name, prompt, max_tokens: MAX_TOKENS, temperature: 0 };
    if (!stream) return (await client.completions.create(body)).choices[0]?.text;
    let text = "";
    for await (const event of await client.completions.create({ ...body, stream: true }))
      text += event.choices[0]?.text ?? "";
    return text;
  });
  expect(await Promise.all(answers)).toEqual(asked.map(({ name, prompt }) => expected.get(`${name} ${prompt}`)));
  expect(engine.stats()).toMatchObject({ running: 0, waiting: 0, kvPagesUsed: 0, adaptersResident: 2 });
});

test("an answer under a JSON schema is JSON that fits it, however it is drawn", async () => {
  const schema = {
    type: "object",
    properties: { name: { type: "string", maxLength: 8 }, age: { type: "integer", minimum: 0, maximum: 99 } },
    required: ["name", "age"],
    additionalProperties: false,
  };
  const ask = (seed: number) =>
    client.chat.completions.create({
      ...{ model: seed % 2 ? "loud" : "base", messages: [{ role: "user", content: "Who?" }], max_tokens: 120 },
      ...{ temperature: 1.5, seed },
      response_format: { type: "json_schema", json_schema: { name: "person", schema, strict: true } },
    });
  const found = await Promise.all([1, 2, 3, 4, 5, 6].map(ask));
  for (const { choices } of found) {
    expect(choices[0]?.finish_reason).toBe("stop");
    const { name, age } = JSON.parse(choices[0]?.message.content ?? "") as { name: string; age: number };
    expect([...name].length).toBeLessThanOrEqual(8);
    expect(Number.isInteger(age) && age >= 0 && age <= 99).toBe(true);
  }
});

test("a schema that cannot be kept to is a 400 that names its place", async () => {
  const refused = client.chat.completions.create({
    ...{ model: "base", messages: [{ role: "user", content: "Who?" }] },
    response_format: { type: "json_schema", json_schema: { name: "x", schema: { type: "string", format: "email" } } },
  });
  await expect(refused).rejects.toThrow(BadRequestError);
  await expect(refused).rejects.toMatchObject({ param: "response_format", message: expect.stringContaining("email") });
});

test("choices of one prompt differ when drawn and not when greedy, and the prompt's pages are computed once", async () => {
  const prompt = Array.from({ length: 40 }, (_, i) => 3 + (i % 50));
  const before = engine.stats();
  const { choices } = await client.completions.create({
    ...{ model: "loud", prompt, n: 4, temperature: 1, seed: 1, max_tokens: MAX_TOKENS },
  });
  expect(new Set(choices.map(({ text }) => text)).size).toBe(4);
  const after = engine.stats();
  expect(after.promptTokens - before.promptTokens).toBe(4 * 40);
  expect(after.cachedPromptTokens - before.cachedPromptTokens, "two pages for each of the others").toBe(3 * 32);
  const greedy = await client.completions.create({
    ...{ model: "loud", prompt: "Once upon", n: 3, temperature: 0, max_tokens: MAX_TOKENS },
  });
  expect(greedy.choices.map(({ text }) => text)).toEqual(
    Array.from({ length: 3 }, () => expected.get("loud Once upon")),
  );
  const schema = {
    type: "object",
    properties: { age: { type: "integer", minimum: 0, maximum: 99 } },
    required: ["age"],
  };
  const people = await client.chat.completions.create({
    ...{
      model: "base",
      messages: [{ role: "user", content: "Who?" }],
      max_tokens: 60,
      temperature: 1.5,
      seed: 3,
      n: 3,
    },
    response_format: {
      type: "json_schema",
      json_schema: { name: "person", schema: { ...schema, additionalProperties: false }, strict: true },
    },
  });
  for (const { message } of people.choices) expect(JSON.parse(message.content ?? "")).toHaveProperty("age");
  expect(engine.stats()).toMatchObject({ running: 0, waiting: 0, kvPagesUsed: 0 });
});
