import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { openGpu } from "../../src/gpu/gpu.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadTokenizer } from "../../src/io/tokenizer.ts";
import { loadModel } from "../../src/models/load.ts";
import { type GenerateOptions, generate } from "../../src/serve/generate.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { testGpu } from "../harness.ts";
import { hasShared, shared } from "../shared.ts";

test.skipIf(!hasShared)("200 greedy tokens of stories260K equal transformers' (needs ../shared)", async () => {
  const golden = JSON.parse(readFileSync("test/golden/generate-stories260k.json", "utf8")) as {
    prompt: string;
    prompt_ids: number[];
    new_ids: number[];
  };
  const gpu = await openGpu();
  const directory = diskDirectory(shared("models/stories260K"));
  const model = await loadModel(gpu, directory);
  const promptIds = (await loadTokenizer(directory)).encode(golden.prompt);
  expect(promptIds).toEqual(golden.prompt_ids);
  const ids: number[] = [];
  for await (const id of generate(model, { promptIds, maxTokens: 200 })) ids.push(id);
  expect(ids).toEqual(golden.new_ids);
  gpu.destroy();
});

async function run(options: Partial<GenerateOptions>): Promise<number[]> {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const before = gpu.counters().buffersLive;
  try {
    const ids: number[] = [];
    for await (const id of generate(model, { promptIds: [1, 2, 3], maxTokens: 8, ...options })) ids.push(id);
    return ids;
  } finally {
    expect(gpu.counters().buffersLive, "the cache is given back").toBe(before);
    model.destroy();
  }
}

test("sampling repeats with its seed and differs with another", async () => {
  const first = await run({ temperature: 2, seed: 1 });
  expect(await run({ temperature: 2, seed: 1 })).toEqual(first);
  expect(await run({ temperature: 2, seed: 2 })).not.toEqual(first);
});

test("a temperature near 0 picks what 0 picks", async () => {
  expect(await run({ temperature: 1e-6 })).toEqual(await run({}));
});

test("generation ends where the context does", async () => {
  const ids = await run({ promptIds: Array.from({ length: 60 }, (_, i) => i), maxTokens: 50 });
  expect(ids.length).toBeLessThanOrEqual(4);
});

test("settings out of range name the rule and the value", async () => {
  const refused = (options: Partial<GenerateOptions>, message: string): Promise<void> =>
    expect(run(options)).rejects.toThrow(new ShapeError(message));
  await refused({ promptIds: [] }, "generate: the prompt must have at least one token, got none");
  await refused(
    { promptIds: new Array(64).fill(1) },
    "generate: the prompt must be shorter than the context of 64 tokens, got 64",
  );
  await refused({ promptIds: [64] }, "generate: ids must be in [0, 64), got 64");
  await refused({ maxTokens: -1 }, "generate: maxTokens must be a whole number of at least 0, got -1");
  await refused({ temperature: -1 }, "generate: temperature must be a number of at least 0, got -1");
});
