/** Adapters of embeddings, heads, norms and rows of tokens: what they cost, what they refuse, what files may say. Values: variants.test.ts. */
import { readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { type Directory, memoryDirectory } from "../../src/io/bytes.ts";
import { decodeFloats } from "../../src/io/dtype.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { initLora } from "../../src/lora/init.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, readAll, tensor } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss } from "../../src/train/loss.ts";
import { collect } from "../collect.ts";
import { expectClose, randomNd, testGpu } from "../harness.ts";
import { floatTensor, writeTinyModel } from "../tiny-model.ts";

const IDS = [5, 9, 2, 33, 7, 1, 40, 12];
const BATCH = collate([{ inputIds: IDS, labels: IDS }], 0);

const open = async (name: string): Promise<CausalModel> =>
  loadModel(await testGpu(), diskDirectory(`test/golden/models/${name}`));

const config = (more: Partial<LoraConfig>): LoraConfig => ({ r: 2, alpha: 4, targetModules: ["q_proj"], ...more });

/** Gives its parameters values that do something. */
function attached(model: CausalModel, more: Partial<LoraConfig>) {
  const adapter = attachLora(model, config(more));
  const random = new Random(7);
  for (const p of adapter.parameters) p.gpu.write(p, Float32Array.from(randomNd(p.shape, random, 0.3).data));
  return adapter;
}

const logitsOf = (model: CausalModel) =>
  read(model.gpu.scope(() => model.logits(tensor(model.gpu, Int32Array.from(IDS), [1, IDS.length]))));

/** Gradients of a step, and what was dispatched for it. */
function stepOf(model: CausalModel) {
  const { gpu } = model;
  gpu.resetCounters();
  const { loss, grads } = gpu.scope(() => {
    const l = batchLoss(model, batchInputs(gpu, BATCH), 1 / BATCH.tokens);
    return { loss: l, grads: backward(l) };
  });
  return { loss, grads, dispatches: gpu.counters().dispatches };
}

describe("what is frozen costs nothing:", () => {
  test.each([
    ["an adapted embedding", { targetModules: ["embed_tokens"] }, 1],
    ["an adapted head", { targetModules: ["lm_head"] }, 0],
    ["rows of tokens", { trainableTokenIndices: [3, 9] }, 0],
    ["a copy of the embedding", { modulesToSave: ["embed_tokens"] }, 1],
    ["copies of the norms", { modulesToSave: ["norm"] }, 0],
    ["a copy of the head", { modulesToSave: ["lm_head"] }, 0],
  ] as [string, Partial<LoraConfig>, number][])("%s", async (_, more, scatters) => {
    const model = await open("qwen2");
    const adapter = attached(model, more);
    const { loss, grads, dispatches } = stepOf(model);
    const sizes = (ts: Iterable<{ sizeBytes: number }>): number => [...ts].reduce((sum, t) => sum + t.sizeBytes, 0);
    expect(new Set(grads.keys())).toEqual(new Set(adapter.parameters));
    expect(sizes(grads.values())).toBe(sizes(adapter.parameters));
    expect(dispatches.get("embedding-backward") ?? 0).toBe(scatters);
    model.gpu.release(loss, ...grads.values());
    adapter.detach();
    model.destroy();
  });

  test("rows that were not read have no gradient", async () => {
    const model = await open("qwen2");
    const adapter = attached(model, { targetModules: ["embed_tokens"] });
    const { loss, grads } = stepOf(model);
    const { X } = adapter.tables.get("model.embed_tokens") ?? expect.fail("a table");
    const dX = await read(grads.get(X) ?? expect.fail("dX"));
    const seen = Array.from({ length: 64 }, (_, v) => dX.subarray(2 * v, 2 * v + 2).some((g) => g !== 0));
    expect(seen.flatMap((is, v) => (is ? [v] : []))).toEqual([...new Set(IDS.slice(0, -1))].sort((a, b) => a - b));
    model.gpu.release(loss, ...grads.values());
    adapter.detach();
    model.destroy();
  });
});

describe("tables in pieces, for a small device, give the same:", () => {
  let home = "";
  beforeAll(async () => {
    home = await mkdtemp(join(tmpdir(), "lowrank-vocabulary-"));
    await writeTinyModel(home, { config: { vocab_size: 160, num_hidden_layers: 1 } });
  });
  afterAll(() => rm(home, { recursive: true, force: true }));

  /** All that an adapter gives, on a model whose tables are in pieces of at most so many bytes. */
  async function results(more: Partial<LoraConfig>, most: number) {
    const limits = { maxBufferSize: most, maxStorageBufferBindingSize: most };
    const model = await loadModel(await testGpu(), diskDirectory(home), { limits });
    const adapter = attached(model, more);
    const logits = await logitsOf(model);
    const { loss, grads } = stepOf(model);
    const values = await readAll([loss, ...adapter.parameters.flatMap((p) => grads.get(p) ?? [])]);
    const files = savePeft(adapter, "tiny");
    const saved = await collect(files["adapter_model.safetensors"]);
    adapter.merge();
    const merged = await logitsOf(model);
    adapter.unmerge();
    adapter.detach();
    const again = await loadPeft(model, memoryDirectory("a", { ...files, "adapter_model.safetensors": saved }));
    expect(await logitsOf(model)).toEqual(logits);
    again.detach();
    const pieces = model.head.length;
    model.gpu.release(loss, ...grads.values());
    model.destroy();
    return { logits, values: values.flatMap((v) => [...v]), merged, saved, pieces };
  }

  test.each([
    ["embedding and head", { targetModules: ["q_proj", "embed_tokens", "lm_head"] }],
    ["rows of tokens", { trainableTokenIndices: { embed_tokens: [3, 33], lm_head: [9, 140] } }],
  ] as [string, Partial<LoraConfig>][])("%s", async (_, more) => {
    const [whole, apart] = [await results(more, 2 ** 20), await results(more, 64 * 32 * 4)];
    expect([whole.pieces, apart.pieces]).toEqual([1, 3]);
    expectClose(apart.logits, whole.logits, 1e-5, "logits");
    expectClose(apart.merged, whole.logits, 1e-4, "merged");
    expectClose(apart.values, whole.values, 1e-4, "loss and gradients");
    expect(Buffer.compare(apart.saved, whole.saved)).toBe(0);
  });

  test("copies, whose pieces are trained each", async () => {
    const { pieces, logits, merged } = await results({ modulesToSave: ["embed_tokens", "lm_head"] }, 64 * 32 * 4);
    expect(pieces).toBe(3);
    expectClose(merged, logits, 1e-4, "merged");
  });
});

test("a target that is trained whole is no target, as in PEFT, and is saved and loaded so", async () => {
  const model = await open("gemma2");
  const adapter = attached(model, { targetModules: ["q_proj", "lm_head"], modulesToSave: ["lm_head"] });
  expect([adapter.tables, adapter.saved].map((of) => [...of.keys()])).toEqual([[], ["lm_head"]]);
  expect([...adapter.pairs.keys()].every((name) => name.endsWith(".q_proj"))).toBe(true);
  const logits = await logitsOf(model);
  const files = savePeft(adapter, "gemma2");
  const directory = memoryDirectory("a", {
    ...files,
    "adapter_model.safetensors": await collect(files["adapter_model.safetensors"]),
  });
  adapter.detach();
  const again = await loadPeft(model, directory);
  expect(again.config.targetModules).toEqual(["q_proj", "lm_head"]);
  expect(await logitsOf(model)).toEqual(logits);
  again.detach();
  model.destroy();
});

describe("settings that contradict each other or the model are refused:", () => {
  test.each([
    [
      "DoRA of an embedding",
      { targetModules: ["q_proj", "embed_tokens"], useDora: true },
      "use_dora is for linear layers, got model.embed_tokens as a target. Leave one of them out",
    ],
    [
      "a bias of B on a head",
      { targetModules: ["lm_head"], loraBias: true },
      "lora_bias is for linear layers, got lm_head as a target. Leave one of them out",
    ],
    [
      "rows of an adapted embedding",
      { targetModules: ["embed_tokens"], trainableTokenIndices: [3] },
      "rows of model.embed_tokens are trained alone, got model.embed_tokens in target_modules or modules_to_save too. Leave one of them out",
    ],
    [
      "rows of an embedding whose copy is trained",
      { modulesToSave: ["embed_tokens"], trainableTokenIndices: [3] },
      "rows of model.embed_tokens are trained alone, got model.embed_tokens in target_modules or modules_to_save too. Leave one of them out",
    ],
    [
      "rows of a tied embedding, with an adapted head",
      { targetModules: ["lm_head"], trainableTokenIndices: [3] },
      "rows of model.embed_tokens are trained alone, got lm_head in target_modules or modules_to_save too. Leave one of them out",
    ],
    [
      "rows of a layer",
      { trainableTokenIndices: { q_proj: [3] } },
      'trainable_token_indices must name an embedding or a head, got "q_proj". The model has model.embed_tokens, lm_head',
    ],
    [
      "a token past the vocabulary",
      { trainableTokenIndices: [3, 64] },
      "trainable_token_indices of model.embed_tokens must be below 64, its rows, got 64",
    ],
    [
      "a token twice",
      { trainableTokenIndices: [3, 9, 3] },
      "trainable_token_indices must be ids of tokens, each once, got 3",
    ],
    [
      "no token",
      { trainableTokenIndices: { lm_head: [] } },
      "trainable_token_indices must be ids of tokens, each once, got an empty list",
    ],
    [
      "a copy of nothing",
      { modulesToSave: ["embedding"] },
      'modules_to_save must name modules of the model, got "embedding". Look for its name',
    ],
  ] as [string, Partial<LoraConfig>, string][])("%s", async (_, more, message) => {
    const model = await open("gemma2");
    const { bytesLive } = model.gpu.counters();
    expect(() => attachLora(model, config(more))).toThrow(new ShapeError(`lora: ${message}`));
    expect(model.gpu.counters().bytesLive).toBe(bytesLive);
    model.destroy();
  });

  test.each([
    [{ targetModules: ["embed_tokens"] }, "model.embed_tokens", "lm_head"],
    [{ modulesToSave: ["lm_head"] }, "lm_head", "model.embed_tokens"],
    [{ trainableTokenIndices: { lm_head: [3] } }, "lm_head", "model.embed_tokens"],
  ] as [Partial<LoraConfig>, string, string][])("merging %j where tables are tied", async (more, name, other) => {
    const model = await open("gemma2");
    const adapter = attached(model, more);
    const before = await logitsOf(model);
    expect(() => adapter.merge()).toThrow(
      new ShapeError(
        `merge: an embedding and a head that are tied must be changed alike, got ${name} changed apart from ${other}. Keep the adapter apart`,
      ),
    );
    expect(await logitsOf(model)).toEqual(before);
    adapter.detach();
    model.destroy();
  });

  test("a start from the base, of a head", async () => {
    const model = await open("qwen2");
    const adapter = attachLora(model, config({ targetModules: ["q_proj", "lm_head"] }));
    await expect(initLora(adapter, "olora")).rejects.toThrow(
      new ShapeError("start: a part of the base is taken from linear layers, got lm_head. Leave it out"),
    );
    adapter.detach();
    model.destroy();
  });
});

describe("the files of PEFT", () => {
  const folder = "test/golden/adapters/vocabulary/adapter";
  const weights = "adapter_model.safetensors";
  const BASE = "base_model.model.model.embed_tokens.base_layer.weight";

  /** The golden adapter with the weight of its embedding, as PEFT saves it too, and other settings. */
  async function directory(shape: readonly number[], settings: object = {}): Promise<Directory> {
    const file = await openSafetensors(await fileSource(`${folder}/${weights}`), weights);
    const tensors = await Promise.all(
      [...file.tensors].map(async ([name, { shape: of }]) =>
        floatTensor(name, of, decodeFloats("F32", await file.read(name))),
      ),
    );
    const base = floatTensor(BASE, shape, new Float32Array(shape.reduce((a, b) => a * b)));
    const json = { ...JSON.parse(readFileSync(`${folder}/adapter_config.json`, "utf8")), ...settings };
    return memoryDirectory("a", {
      "adapter_config.json": JSON.stringify(json),
      [weights]: await collect(encodeSafetensors([...tensors, base])),
    });
  }

  test("may have the weight of the base's embedding, which changes nothing", async () => {
    const model = await open("qwen2");
    const adapter = await loadPeft(model, diskDirectory(folder));
    const logits = await logitsOf(model);
    adapter.detach();
    const other = await loadPeft(model, await directory([64, 32]));
    expect(await logitsOf(model)).toEqual(logits);
    other.detach();
    await expect(loadPeft(model, await directory([66, 32]))).rejects.toThrow(
      new FormatError(
        `a/${weights}: tensor "${BASE}" must be [64,32], got [66,32]. Is the adapter of a model with another vocabulary?`,
      ),
    );
    model.destroy();
  });

  test("may have settings that nobody knows, of which there is a warning", async () => {
    const model = await open("qwen2");
    const warnings: string[] = [];
    const onWarning = (text: string): void => void warnings.push(text);
    (await loadPeft(model, await directory([64, 32], { lora_magic: 1, lora_more: 2 }), { onWarning })).detach();
    expect(warnings).toEqual(["adapter_config.json has keys that PEFT 0.21 does not know: lora_magic, lora_more"]);
    model.destroy();
  });

  test.each([
    [
      { trainable_token_indices: 7 },
      '"trainable_token_indices" must be a list of ids, or lists of ids by module, got 7',
    ],
    [
      { trainable_token_indices: { embed_tokens: ["a"] } },
      '"trainable_token_indices" must be a list of ids, or lists of ids by module, got {"embed_tokens":["a"]}',
    ],
    [{ ensure_weight_tying: true }, '"ensure_weight_tying" must be null, got true. This setting is not supported yet'],
    [
      { use_dora: true },
      "the adapter does not fit this model: lora: use_dora is for linear layers, got model.embed_tokens as a target. Leave one of them out",
    ],
  ])("with %j are refused", async (settings, message) => {
    const model = await open("qwen2");
    await expect(loadPeft(model, await directory([64, 32], settings))).rejects.toThrow(
      new FormatError(`a/adapter_config.json: ${message}`),
    );
    model.destroy();
  });
});
