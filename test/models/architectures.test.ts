/** Every architecture against transformers and PEFT: scripts/golden/models.py made what is expected. */
import { existsSync, readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import { readConfig } from "../../src/models/config.ts";
import { loadModel } from "../../src/models/load.ts";
import { saveModel } from "../../src/models/save.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { read, readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss } from "../../src/train/loss.ts";
import { TrainingStep } from "../../src/train/step.ts";
import { expectRelative, valuesOf } from "../golden/files.ts";
import { expectClose, testGpu } from "../harness.ts";

const NAMES = [
  "llama-linear",
  "llama-dynamic",
  "llama-yarn",
  "mistral",
  "qwen2",
  "qwen2-window",
  "qwen3",
  "smollm3",
  "gemma2",
  "gemma3",
  "phi3",
  "phi3-longrope",
  "olmo2",
  "granite",
  "gpt2",
] as const;

interface Expected {
  readonly input_ids: number[][];
  readonly labels: number[][];
  readonly base_loss: number;
  readonly lora_loss: number;
  readonly steps: { readonly lr: number; readonly losses: number[] };
}

const folder = (name: string): string => `test/golden/models/${name}`;
const expectedOf = (name: string): Expected =>
  JSON.parse(readFileSync(`${folder(name)}/expected.json`, "utf8")) as Expected;
const batchOf = ({ input_ids, labels }: Expected) =>
  collate(
    input_ids.map((inputIds, i) => ({ inputIds, labels: labels[i] ?? [] })),
    0,
  );

describe.each(NAMES)("%s", (name) => {
  test("logits, losses and gradients of all but the linear layers equal transformers'", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder(name)));
    const expected = expectedOf(name);
    const batch = batchOf(expected);
    const golden = await valuesOf(`${folder(name)}/expected.safetensors`);
    const full = await valuesOf(`${folder(name)}/expected-full.safetensors`);
    const biases = [...model.linears].flatMap(([module, { bias }]) =>
      bias ? [[`${module}.bias`, bias] as const] : [],
    );
    const weights = new Map([...model.weights, ...biases]);
    const logits = gpu.scope(() => model.logits(tensor(gpu, batch.ids, [batch.B, batch.T])));
    for (const t of weights.values()) t.requiresGrad = true;
    const { loss, grads } = gpu.scope(() => {
      const l = batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens);
      return { loss: l, grads: backward(l) };
    });
    expectClose(await read(logits), golden.get("base.logits") ?? [], 1e-4, "logits");
    expectClose(await read(loss), [expected.base_loss], 1e-5, "loss");
    expect(full.size).toBeGreaterThan(3);
    for (const [key, want] of full) {
      const grad = grads.get(weights.get(key.replace(/^grad\./, "")) as Tensor);
      if (!grad) expect.fail(`${key} has no gradient`);
      expectRelative(await read(grad), want, 2e-4, key);
    }
    gpu.release(logits, loss, ...grads.values());
    model.destroy();
  });

  test("an adapter of PEFT's gives its logits and gradients, and five steps of AdamW its adapter", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder(name)));
    const adapter = await loadPeft(model, diskDirectory(`${folder(name)}/adapter`));
    const expected = expectedOf(name);
    const batch = batchOf(expected);
    const golden = await valuesOf(`${folder(name)}/expected.safetensors`);
    const keyed = [...adapter.pairs].flatMap(([module, { A, B }]) => [
      [`base_model.model.${module}.lora_A.weight`, A] as const,
      [`base_model.model.${module}.lora_B.weight`, B] as const,
    ]);
    const logits = gpu.scope(() => model.logits(tensor(gpu, batch.ids, [batch.B, batch.T])));
    expectClose(await read(logits), golden.get("lora.logits") ?? [], 2e-4, "logits");
    const { loss, grads } = gpu.scope(() => {
      const l = batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens);
      return { loss: l, grads: backward(l) };
    });
    expectClose(await read(loss), [expected.lora_loss], 1e-5, "loss");
    expect(grads.size).toBe(keyed.length);
    for (const [key, t] of keyed)
      expectRelative(
        await read(grads.get(t) ?? expect.fail(key)),
        golden.get(`lora.grad.${key}`) ?? new Float32Array(),
        5e-4,
        key,
      );
    gpu.release(logits, loss, ...grads.values());
    const step = new TrainingStep({ model, parameters: adapter.parameters });
    for (const _ of expected.steps.losses) step.run([batch], expected.steps.lr);
    const results = await step.read();
    expectClose(
      results.map((result) => result.loss),
      expected.steps.losses,
      2e-4,
      "losses",
    );
    const finals = await readAll(keyed.map(([, t]) => t));
    for (const [i, [key]] of keyed.entries())
      expectRelative(finals[i] ?? [], golden.get(`lora.final.${key}`) ?? new Float32Array(), 2e-3, key);
    step.destroy();
    adapter.detach();
    model.destroy();
  });

  test("a cache gives what a full pass gives, and a saved model is the file that was loaded", async () => {
    const gpu = await testGpu();
    const directory = diskDirectory(folder(name));
    const model = await loadModel(gpu, directory);
    const [ids = []] = expectedOf(name).input_ids;
    const of = (part: readonly number[]): Tensor => tensor(gpu, Int32Array.from(part), [1, part.length]);
    const whole = gpu.scope(() => model.logits(of(ids), { lastOnly: true }));
    const cache = model.cache(1, ids.length);
    const short = (await valuesOf(`${folder(name)}/expected.safetensors`)).get("short.logits"); // of rows within the original context
    if (short) {
      const rows = expectedOf(name).input_ids.map((row) => row.slice(0, short.length / (2 * model.config.vocabSize)));
      const got = gpu.scope(() => model.logits(tensor(gpu, Int32Array.from(rows.flat()), [2, rows[0]?.length ?? 0])));
      expectClose(await read(got), short, 1e-4, "short rows");
      gpu.release(got);
    }
    const cuts = name === "llama-dynamic" || name === "phi3-longrope" ? [ids.length] : [3, 4, ids.length];
    let last = whole;
    for (const [i, cut] of cuts.entries()) {
      last = gpu.scope(() => model.logits(of(ids.slice(cuts[i - 1] ?? 0, cut)), { cache, lastOnly: true }));
    }
    expectClose(await read(last), await read(whole), 1e-4, "logits");
    const parts: Uint8Array[] = [];
    for await (const part of (await saveModel(model, directory)).files.get("model.safetensors") ?? []) parts.push(part);
    const saved = await openSafetensors(
      (await memoryDirectory("saved", { file: Buffer.concat(parts) }).open("file")) ?? expect.fail("a file"),
      "saved",
    );
    const original = await openSafetensors(
      await fileSource(`${folder(name)}/model.safetensors`),
      `${folder(name)}/model.safetensors`,
    );
    expect([...saved.tensors.keys()].sort()).toEqual([...original.tensors.keys()].sort());
    for (const key of original.tensors.keys()) {
      expect(saved.tensors.get(key)?.shape).toEqual(original.tensors.get(key)?.shape);
      expect(Buffer.compare(await saved.read(key), await original.read(key)), key).toBe(0);
    }
    gpu.release(whole, last, ...cache.layers.flatMap(({ k, v }) => [k, v]));
    model.destroy();
  });

  const old = `${folder(name)}/config.v4.json`;
  if (existsSync(old))
    test("its older configuration is read alike", async () => {
      const of = (path: string) => readConfig(memoryDirectory("m", { "config.json": readFileSync(path, "utf8") }));
      expect(await of(old)).toEqual(await of(`${folder(name)}/config.json`));
    });
});

test.each([
  ["llama-dynamic", "dynamic"],
  ["phi3-longrope", "longrope"],
])(
  "packed rows of %s are refused where the angles go by the length, and are what rows of their own are below it",
  async (name, type) => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder(name)));
    const packedOf = (length: number): Tensor => {
      const ids = Array.from({ length }, (_, i) => 3 + i);
      const batch = batchInputs(gpu, collate([{ inputIds: ids, labels: ids, starts: [0, 6] }], 0));
      return model.hidden(batch.ids, { packing: batch.packing ?? expect.fail("a packing") });
    };
    expect(() => gpu.scope(() => packedOf(17))).toThrow(
      new ShapeError(
        `hidden: angles of "${type}" RoPE go by the length of a sequence past 16 tokens, which a packed row has several of, got rows of 17. Leave out --packing, or make rows of at most 16`,
      ),
    );
    const packed = gpu.scope(() => packedOf(16));
    const alone = gpu.scope(() =>
      model.hidden(
        tensor(
          gpu,
          Int32Array.from({ length: 10 }, (_, i) => 9 + i),
          [1, 10],
        ),
      ),
    );
    const values = await read(packed);
    expectClose(values.subarray(6 * model.config.hiddenSize), await read(alone), 1e-5, "the second segment");
    gpu.release(packed, alone);
    model.destroy();
  },
);

test("YaRN lengthens the context by its factor, unless config.json has a longer one already", async () => {
  const { rope_parameters: _, ...json } = JSON.parse(readFileSync(`${folder("qwen2")}/config.json`, "utf8"));
  const contextOf = async (max_position_embeddings: number, rope_scaling: object): Promise<number> => {
    const config = JSON.stringify({ ...json, max_position_embeddings, rope_scaling });
    return (await readConfig(memoryDirectory("m", { "config.json": config }))).contextLength;
  };
  const yarn = { type: "yarn", factor: 4, original_max_position_embeddings: 32768 };
  expect(await contextOf(32768, yarn), "as Qwen2.5 documents it").toBe(131072);
  expect(await contextOf(131072, yarn), "as files of longer models have it").toBe(131072);
  expect(await contextOf(163840, { ...yarn, original_max_position_embeddings: 4096 })).toBe(163840);
  expect(await contextOf(100, { type: "yarn", factor: 1.505 }), "of max_position_embeddings").toBe(150);
});
