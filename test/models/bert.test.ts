/** Encoders with a classifier against transformers and PEFT: scripts/golden/models.py made what is expected. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { type Directory, memoryDirectory, memorySource } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora, attachParts } from "../../src/lora/attach.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import type { BertClassifier } from "../../src/models/bert.ts";
import { readClassifierConfig } from "../../src/models/config.ts";
import { loadModel } from "../../src/models/load.ts";
import { loadClassifier } from "../../src/models/load-classifier.ts";
import { saveModel } from "../../src/models/save.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { read, readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { type ClassificationRow, classificationTask, collateClassification } from "../../src/train/classify.ts";
import { TrainingStep } from "../../src/train/step.ts";
import { expectRelative, valuesOf } from "../golden/files.ts";
import { expectClose, testGpu } from "../harness.ts";

interface Expected {
  readonly input_ids: number[][];
  readonly attention_mask: number[][];
  readonly token_type_ids?: number[][];
  readonly labels: number[];
  readonly base_loss: number;
  readonly lora_loss: number;
  readonly steps: { readonly lr: number; readonly losses: number[] };
}

const NAMES = ["bert", "roberta"] as const;
const folder = (name: string): string => `test/golden/models/${name}`;
const json = <T>(path: string): T => JSON.parse(readFileSync(path, "utf8")) as T;
const expectedOf = (name: string): Expected => json(`${folder(name)}/expected.json`);

const rowsOf = ({ input_ids, attention_mask, token_type_ids, labels }: Expected): ClassificationRow[] =>
  input_ids.map((inputIds, i) => ({
    ...{ inputIds, attentionMask: attention_mask[i] ?? [], label: labels[i] ?? -1 },
    ...(token_type_ids && { tokenTypeIds: token_type_ids[i] ?? [] }),
  }));

async function bytesOf(content: AsyncIterable<Uint8Array> | undefined): Promise<Buffer> {
  const parts: Uint8Array[] = [];
  for await (const part of content ?? []) parts.push(part);
  return Buffer.concat(parts);
}

/** The adapter's tensors by the names that PEFT gives them. */
const keyed = (adapter: LoraAdapter): [key: string, t: Tensor][] => [
  ...[...adapter.pairs].flatMap(([module, { A, B }]): [string, Tensor][] => [
    [`base_model.model.${module}.lora_A.weight`, A],
    [`base_model.model.${module}.lora_B.weight`, B],
  ]),
  ...[...adapter.saved].flatMap(([module, { weight, bias }]): [string, Tensor][] => [
    [`base_model.model.${module}.weight`, weight as Tensor],
    [`base_model.model.${module}.bias`, bias ?? expect.fail(`${module} has a bias`)],
  ]),
];

const logitsOf = async (model: BertClassifier, rows: readonly ClassificationRow[], length?: number) => {
  const { gpu } = model;
  const { ids, tokenTypes, lengths, B, T } = collateClassification(rows, model.config, length);
  const found = gpu.scope(() =>
    model.logits(tensor(gpu, ids, [B, T]), {
      lengths: tensor(gpu, lengths, [B]),
      tokenTypes: tensor(gpu, tokenTypes, [B, T]),
    }),
  );
  const values = await read(found);
  gpu.release(found);
  return values;
};

/** The mean loss of these rows and its gradients. */
async function gradientsOf(model: BertClassifier, rows: readonly ClassificationRow[]) {
  const task = classificationTask(model);
  const batch = collateClassification(rows, model.config);
  const found = model.gpu.scope(() => {
    const [loss] = task.load(batch).losses(1 / rows.length);
    return { loss, grads: backward(loss ?? expect.fail("a loss")) };
  });
  return { ...found, loss: found.loss ?? expect.fail("a loss") };
}

describe.each(NAMES)("%s", (name) => {
  const expected = expectedOf(name);
  const rows = rowsOf(expected);
  const opened = async () => loadClassifier(await testGpu(), diskDirectory(folder(name)));
  const adapterFolder = `${folder(name)}/adapter`;

  test.each([false, true])(
    "logits, loss and gradients equal transformers' (checkpointing %s)",
    async (checkpointing) => {
      const model = await opened();
      model.checkpointing = checkpointing;
      const { gpu } = model;
      const golden = await valuesOf(`${folder(name)}/expected.safetensors`);
      const full = await valuesOf(`${folder(name)}/expected-full.safetensors`);
      expectClose(await logitsOf(model, rows), golden.get("base.logits") ?? [], 1e-4, "logits");
      for (const t of model.weights.values()) t.requiresGrad = true;
      const { loss, grads } = await gradientsOf(model, rows);
      expectClose(await read(loss), [expected.base_loss], 1e-5, "loss");
      expect(full.size).toBeGreaterThan(20);
      for (const [key, want] of full) {
        const weight = model.weights.get(key.replace(/^grad\./, "")) ?? expect.fail(key);
        expectRelative(await read(grads.get(weight) ?? expect.fail(key)), want, 1e-3, key);
      }
      gpu.release(loss, ...grads.values());
      model.destroy();
    },
  );

  test("an adapter of PEFT's gives its logits and gradients, and five steps of AdamW its adapter and classifier", async () => {
    const model = await opened();
    const { gpu } = model;
    const adapter = await loadPeft(model, diskDirectory(adapterFolder));
    const golden = await valuesOf(`${folder(name)}/expected.safetensors`);
    const tensors = keyed(adapter);
    expect(tensors.map(([key]) => `lora.grad.${key}`).sort()).toEqual(
      [...golden.keys()].filter((key) => key.startsWith("lora.grad.")).sort(),
    );
    expect(new Set(adapter.parameters)).toEqual(new Set(tensors.map(([, t]) => t)));
    expectClose(await logitsOf(model, rows), golden.get("lora.logits") ?? [], 1e-4, "logits");
    const { loss, grads } = await gradientsOf(model, rows);
    expectClose(await read(loss), [expected.lora_loss], 1e-5, "loss");
    expect(grads.size).toBe(tensors.length);
    for (const [key, t] of tensors)
      expectRelative(await read(grads.get(t) ?? expect.fail(key)), golden.get(`lora.grad.${key}`), 1e-3, key);
    gpu.release(loss, ...grads.values());
    const task = classificationTask(model);
    const step = new TrainingStep({ task, parameters: adapter.parameters, adapter });
    for (const _ of expected.steps.losses) step.run([task.collate(rows, 11)], expected.steps.lr);
    const results = await step.read();
    expectClose(
      results.map((result) => result.loss),
      expected.steps.losses,
      2e-4,
      "losses",
    );
    const finals = await readAll(tensors.map(([, t]) => t));
    for (const [i, [key]] of tensors.entries())
      expectRelative(finals[i] ?? [], golden.get(`lora.final.${key}`), 2e-3, key);
    step.destroy();
    adapter.detach();
    model.destroy();
  });

  test("what is saved of an adapter is what was loaded", async () => {
    const model = await opened();
    const adapter = await loadPeft(model, diskDirectory(adapterFolder));
    const files = savePeft(adapter, name);
    const saved = await openSafetensors(memorySource(await bytesOf(files["adapter_model.safetensors"])), "saved");
    const original = await openSafetensors(await fileSource(`${adapterFolder}/adapter_model.safetensors`), "original");
    expect([...saved.tensors.keys()].sort()).toEqual([...original.tensors.keys()].sort());
    for (const key of original.tensors.keys()) {
      expect(saved.tensors.get(key)?.shape).toEqual(original.tensors.get(key)?.shape);
      expect(Buffer.compare(await saved.read(key), await original.read(key)), key).toBe(0);
    }
    const given = json<Record<string, unknown>>(`${adapterFolder}/adapter_config.json`);
    const written = JSON.parse(files["adapter_config.json"]) as Record<string, unknown>;
    expect(written).toEqual(Object.fromEntries(Object.keys(written).map((key) => [key, given[key]])));
    adapter.detach();
    model.destroy();
  });

  test("disabled and unmerged it is the base to the last bit, merged what it was", async () => {
    const model = await opened();
    const base = await logitsOf(model, rows);
    const adapter = await loadPeft(model, diskDirectory(adapterFolder));
    const adapted = await logitsOf(model, rows);
    adapter.merge();
    expectClose(await logitsOf(model, rows), adapted, 1e-4, "merged");
    adapter.unmerge();
    expect(await logitsOf(model, rows)).toEqual(adapted);
    adapter.disable();
    expect(await logitsOf(model, rows)).toEqual(base);
    adapter.detach();
    model.destroy();
  });

  test("rows count by themselves: padding and the rows beside them change nothing", async () => {
    const model = await opened();
    const all = await logitsOf(model, rows, 16);
    const classes = model.config.labels.length;
    for (const [i, row] of rows.entries()) {
      const length = row.attentionMask?.filter(Boolean).length ?? 0;
      const { attentionMask: _, tokenTypeIds, ...rest } = row;
      const alone: ClassificationRow = {
        ...rest,
        inputIds: row.inputIds.slice(0, length),
        ...(tokenTypeIds && { tokenTypeIds: tokenTypeIds.slice(0, length) }),
      };
      expectClose(await logitsOf(model, [alone]), all.slice(i * classes, (i + 1) * classes), 1e-5, `row ${i}`);
    }
    const { gpu } = model;
    const [plain] = rows; // as long as the batch: no lengths are needed, and types are 0 unless given
    const ids = tensor(gpu, Int32Array.from(plain?.inputIds ?? []), [1, plain?.inputIds.length ?? 0]);
    const { tokenTypeIds: _, ...untyped } = plain ?? expect.fail("a row");
    expectClose(await read(gpu.scope(() => model.logits(ids))), await logitsOf(model, [untyped]), 1e-6, "defaults");
    model.destroy();
  });

  test("a saved model is the file that was loaded", async () => {
    const model = await opened();
    const content = (await saveModel(model, diskDirectory(folder(name)))).files.get("model.safetensors");
    const saved = await openSafetensors(memorySource(await bytesOf(content)), "saved");
    const original = await openSafetensors(await fileSource(`${folder(name)}/model.safetensors`), "original");
    expect([...saved.tensors.keys()].sort()).toEqual([...original.tensors.keys()].sort());
    for (const key of original.tensors.keys())
      expect(Buffer.compare(await saved.read(key), await original.read(key)), key).toBe(0);
    model.destroy();
  });

  test("a new adapter trains the classifier whole and leaves the output as it is", async () => {
    const model = await opened();
    const base = await logitsOf(model, rows);
    const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" });
    expect([...adapter.saved.keys()]).toEqual(
      name === "bert" ? ["classifier"] : ["classifier.dense", "classifier.out_proj"],
    );
    expect([...adapter.pairs.keys()].filter((module) => module.includes("classifier"))).toEqual([]);
    expect(adapter.pairs.size).toBe(name === "bert" ? 13 : 12);
    expect(await logitsOf(model, rows)).toEqual(base);
    expect(JSON.parse(savePeft(adapter, name)["adapter_config.json"])).toMatchObject({
      modules_to_save: ["classifier", "score"],
      task_type: "SEQ_CLS",
    });
    adapter.detach();
    model.destroy();
  });
});

/** The golden model with its tensors under other names, or without those that have none. */
async function renamed(
  name: string,
  rename: (key: string) => string | undefined,
  config: Record<string, unknown> = {},
): Promise<Directory> {
  const original = await openSafetensors(await fileSource(`${folder(name)}/model.safetensors`), name);
  const tensors = [...original.tensors].flatMap(([key, { dtype, shape }]) => {
    const to = rename(key);
    const sizeBytes = 4 * shape.reduce((a, b) => a * b, 1);
    return to === undefined ? [] : [{ name: to, dtype, shape, sizeBytes, data: () => original.read(key) }];
  });
  return memoryDirectory("m", {
    "config.json": JSON.stringify({ ...json<object>(`${folder(name)}/config.json`), ...config }),
    "model.safetensors": await bytesOf(encodeSafetensors(tensors)),
  });
}

test("BERT's first files call a LayerNorm's weight and bias gamma and beta, and are saved as such", async () => {
  const gpu = await testGpu();
  const old = (key: string): string =>
    key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
  const directory = await renamed("bert", old);
  const model = await loadClassifier(gpu, directory);
  const rows = rowsOf(expectedOf("bert"));
  const golden = await valuesOf(`${folder("bert")}/expected.safetensors`);
  expectClose(await logitsOf(model, rows), golden.get("base.logits") ?? [], 1e-4, "logits");
  const saved = await bytesOf((await saveModel(model, directory)).files.get("model.safetensors"));
  const names = [...(await openSafetensors(memorySource(saved), "saved")).tensors.keys()];
  expect(names.filter((key) => /LayerNorm\.(gamma|beta)$/.test(key)).length).toBe(10);
  expect(names.filter((key) => /LayerNorm\.(weight|bias)$/.test(key))).toEqual([]);
  model.destroy();
});

test("a base model gets a new classifier, the same for the same seed", async () => {
  const gpu = await testGpu();
  const base = await renamed("roberta", (key) => (key.startsWith("classifier.") ? undefined : key));
  await expect(loadClassifier(gpu, base)).rejects.toThrow(
    new FormatError(
      'm/model.safetensors: a classifier must be there, got no "classifier.dense.weight". To train one, begin with a new one: give newClasses, or --num-labels on the command line',
    ),
  );
  const rows = rowsOf(expectedOf("roberta"));
  const logits: Float32Array[] = [];
  for (const seed of [1, 1, 2]) {
    const model = await loadClassifier(gpu, base, { newClasses: 3, seed });
    expect(model.config.labels).toEqual(["LABEL_0", "LABEL_1", "LABEL_2"]);
    expect(model.weights.get("classifier.out_proj.weight")?.shape).toEqual([3, 32]);
    const [weight = new Float32Array(), bias = []] = await readAll(
      ["weight", "bias"].map((part) => model.weights.get(`classifier.dense.${part}`) ?? expect.fail(part)),
    );
    expect(Math.sqrt(weight.reduce((sum, v) => sum + v * v, 0) / weight.length)).toBeCloseTo(0.02, 2);
    expect(new Set(bias)).toEqual(new Set([0]));
    logits.push(await logitsOf(model, rows));
    model.destroy();
  }
  expect(logits[0]).toEqual(logits[1]);
  expect(logits[0]).not.toEqual(logits[2]);
  await expect(loadClassifier(gpu, base, { newClasses: 1 })).rejects.toThrow(
    new ShapeError("loadClassifier: newClasses must be a whole number of at least 2, got 1"),
  );
});

test("an encoder is no model that predicts tokens, and the other way around", async () => {
  const gpu = await testGpu();
  await expect(loadModel(gpu, diskDirectory(folder("bert")))).rejects.toThrow(
    new FormatError(
      `${folder("bert")}/config.json: the model must predict tokens, got model_type bert, an encoder with a classifier. Load it with loadClassifier`,
    ),
  );
  await expect(loadClassifier(gpu, diskDirectory(folder("gpt2")))).rejects.toThrow(
    new FormatError(
      `${folder("gpt2")}/config.json: the "model_type" of a classifier must be one of bert, roberta, got "gpt2"`,
    ),
  );
});

describe("config.json", () => {
  const configOf = (name: string, changes: Record<string, unknown>) =>
    readClassifierConfig(
      memoryDirectory("m", {
        "config.json": JSON.stringify({ ...json<object>(`${folder(name)}/config.json`), ...changes }),
      }),
    );

  test("says how many classes there are: two without names, those with names, or num_labels", async () => {
    expect((await configOf("roberta", {})).labels).toEqual(["LABEL_0", "LABEL_1"]);
    expect((await configOf("roberta", { id2label: { 0: "no", 1: "yes", 2: "maybe" } })).labels).toEqual([
      "no",
      "yes",
      "maybe",
    ]);
    expect((await configOf("roberta", { num_labels: 3 })).labels.length).toBe(3);
  });

  test("says where positions begin", async () => {
    expect(await configOf("bert", {})).toMatchObject({ firstPosition: 0, contextLength: 32, padId: 0 });
    expect(await configOf("roberta", {})).toMatchObject({ firstPosition: 2, contextLength: 32, padId: 1 });
  });

  test.each([
    [{ hidden_size: 36 }, '"hidden_size" must be a multiple of 4 · num_attention_heads = 16, got 36'],
    [{ position_embedding_type: "relative_key" }, '"position_embedding_type" must be "absolute", got "relative_key"'],
    [{ is_decoder: true }, '"is_decoder" must be false, got true'],
    [{ pad_token_id: -1 }, `"pad_token_id" must be a token's id, got -1`],
    [{ hidden_act: "relu" }, '"hidden_act" must be one of silu, swish, gelu, gelu_pytorch_tanh, gelu_new, got "relu"'],
    [
      { problem_type: "regression" },
      '"problem_type" must be "single_label_classification", got "regression". Other losses are not supported yet',
    ],
    [
      { id2label: { 0: "score" } },
      '"id2label" must be the names of two classes or more, by numbers from 0 on, got {"0":"score"}',
    ],
    [
      { id2label: { 1: "a", 2: "b" } },
      '"id2label" must be the names of two classes or more, by numbers from 0 on, got {"1":"a","2":"b"}',
    ],
  ])("with %j is refused", async (changes, message) => {
    await expect(configOf("bert", changes)).rejects.toThrow(new FormatError(`m/config.json: ${message}`));
  });
});

test("rows longer than the context are refused", async () => {
  const gpu = await testGpu();
  const model = await loadClassifier(gpu, diskDirectory(folder("roberta")));
  const ids = tensor(gpu, new Int32Array(33), [1, 33]);
  expect(() => model.logits(ids)).toThrow(new ShapeError("logits: at most 32 positions fit, got 33. Shorten the rows"));
  model.destroy();
});

describe("modules_to_save", () => {
  const settings = { r: 2, alpha: 2, targetModules: ["query"] };

  test.each([
    [["classifier", "head"], "head"],
    [["pooling"], "pooling"],
  ])("%j is refused", async (modulesToSave, bad) => {
    const model = await loadClassifier(await testGpu(), diskDirectory(folder("bert")));
    expect(() => attachLora(model, { ...settings, modulesToSave })).toThrow(
      new ShapeError(`lora: modules_to_save must name modules of the model, got "${bad}". Look for its name`),
    );
    model.destroy();
  });

  test("of an encoder takes embeddings and norms beside the classifier, and the output stays what it is at first", async () => {
    const gpu = await testGpu();
    const model = await loadClassifier(gpu, diskDirectory(folder("bert")));
    const ids = tensor(gpu, Int32Array.of(4, 9, 30, 12), [1, 4]);
    const before = await read(gpu.scope(() => model.logits(ids)));
    const adapter = attachLora(model, { ...settings, modulesToSave: ["word_embeddings", "output.LayerNorm"] });
    expect([...adapter.saved.keys()].sort()).toEqual([
      "bert.embeddings.word_embeddings",
      ...[0, 1].flatMap((i) => ["attention.output", "output"].map((at) => `bert.encoder.layer.${i}.${at}.LayerNorm`)),
      "classifier",
    ]);
    expect(JSON.parse(savePeft(adapter, "bert")["adapter_config.json"])).toMatchObject({
      modules_to_save: ["word_embeddings", "output.LayerNorm", "classifier", "score"],
    });
    expect(await read(gpu.scope(() => model.logits(ids)))).toEqual(before);
    const { weight } = adapter.saved.get("bert.encoder.layer.1.output.LayerNorm") ?? expect.fail("a norm");
    gpu.write(weight as Tensor, new Float32Array(32));
    expect(await read(gpu.scope(() => model.logits(ids)))).not.toEqual(before);
    adapter.detach();
    expect(await read(gpu.scope(() => model.logits(ids)))).toEqual(before);
    model.destroy();
  });

  test("of a causal model takes a projection, but no Conv1D", async () => {
    const gpu = await testGpu();
    const qwen = await loadModel(gpu, diskDirectory(folder("qwen2")));
    const adapter = attachLora(qwen, { r: 2, alpha: 2, targetModules: "all-linear", modulesToSave: ["0.mlp.up_proj"] });
    expect([...adapter.saved.keys()]).toEqual(["model.layers.0.mlp.up_proj"]);
    expect(adapter.pairs.has("model.layers.0.mlp.up_proj")).toBe(false);
    expect(adapter.pairs.has("model.layers.1.mlp.up_proj")).toBe(true);
    adapter.detach();
    const gpt2 = await loadModel(gpu, diskDirectory(folder("gpt2")));
    expect(() => attachLora(gpt2, { r: 2, alpha: 2, targetModules: ["c_proj"], modulesToSave: ["c_attn"] })).toThrow(
      new ShapeError(
        'lora: modules_to_save must be modules that files have as [N,K], got "transformer.h.0.attn.c_attn". Adapt it, or leave it out',
      ),
    );
    qwen.destroy();
    gpt2.destroy();
  });

  test.each([[undefined], [[]], [["score"]], [["classifier"]]])(
    "%j of a fresh adapter trains the classifier, as in PEFT",
    async (modulesToSave) => {
      const model = await loadClassifier(await testGpu(), diskDirectory(folder("bert")));
      const adapter = attachLora(model, { ...settings, ...(modulesToSave && { modulesToSave }) });
      expect([...adapter.saved.keys()]).toEqual(["classifier"]);
      adapter.detach();
      model.destroy();
    },
  );

  test("a classifier that lacks in the adapter's file, or has other classes, is refused by name", async () => {
    const gpu = await testGpu();
    const directory = diskDirectory(folder("bert"));
    const model = await loadClassifier(gpu, directory, { newClasses: 2 });
    await expect(loadPeft(model, diskDirectory(`${folder("bert")}/adapter`))).rejects.toThrow(
      new FormatError(
        `${folder("bert")}/adapter/adapter_model.safetensors: tensor "base_model.model.classifier.weight" must be [2,32], got [3,32]`,
      ),
    );
    const adapter = attachParts(model, settings, {
      linear: () => ({ A: tensor(gpu, new Float32Array(64), [2, 32]), B: tensor(gpu, new Float32Array(64), [32, 2]) }),
    });
    expect(adapter.saved.size).toBe(0);
    const files = savePeft(adapter, "bert");
    const bytes = await bytesOf(files["adapter_model.safetensors"]);
    const config = JSON.parse(files["adapter_config.json"]) as Record<string, unknown>;
    adapter.detach();
    const as = (modules_to_save: unknown): Directory =>
      memoryDirectory("a", {
        "adapter_config.json": JSON.stringify({ ...config, modules_to_save }),
        "adapter_model.safetensors": bytes,
      });
    (await loadPeft(model, as([]))).detach();
    await expect(loadPeft(model, as(null))).rejects.toThrow(
      new FormatError(
        "a/adapter_model.safetensors: the tensors must be those that adapter_config.json and the model ask for, got missing base_model.model.classifier.weight, base_model.model.classifier.bias. Is it an adapter of this model?",
      ),
    );
    await expect(loadPeft(model, as(["pooling"]))).rejects.toThrow(
      new FormatError(
        'a/adapter_config.json: the adapter does not fit this model: lora: modules_to_save must name modules of the model, got "pooling". Look for its name',
      ),
    );
    await expect(loadPeft(model, as(7))).rejects.toThrow(
      new FormatError('a/adapter_config.json: "modules_to_save" must be a list of names, got 7'),
    );
    model.destroy();
  });

  test("two adapters do not share a classifier", async () => {
    const model = await loadClassifier(await testGpu(), diskDirectory(folder("bert")));
    const first = attachLora(model, settings);
    expect(() => attachLora(model, { ...settings, targetModules: ["value"] })).toThrow(
      new ShapeError(
        "enable: adapters share a layer where each only adds B·A to it, got two on classifier of which one does more: DoRA, a start from the base, a trained copy or bias, a pool. Disable or unmerge the other first",
      ),
    );
    first.detach();
    model.destroy();
  });
});
