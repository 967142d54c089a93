import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { add, mul, sum } from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { readConfig } from "../../src/models/config.ts";
import { loadModel, weightShapes } from "../../src/models/load.ts";
import { saveModel } from "../../src/models/save.ts";
import { inverseFrequencies } from "../../src/nn/rope.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { read, readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss } from "../../src/train/loss.ts";
import { valuesOf } from "../golden/files.ts";
import { expectClose, testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";

const VARIANTS = ["llama-default", "llama-rope3", "llama-bias", "llama-sharded"] as const;

interface Expected {
  readonly input_ids: number[][];
  readonly labels: number[][];
  readonly base_loss: number;
  readonly lora_loss: number;
}

const folder = (name: string): string => `test/golden/${name}`;
const expectedOf = (name: string): Expected =>
  JSON.parse(readFileSync(`${folder(name)}/expected.json`, "utf8")) as Expected;
const batchOf = ({ input_ids, labels }: Expected) =>
  collate(
    input_ids.map((inputIds, i) => ({ inputIds, labels: labels[i] ?? [] })),
    0,
  );

describe.each(VARIANTS)("%s", (name) => {
  test("logits and loss equal transformers", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder(name)));
    const expected = expectedOf(name);
    const batch = batchOf(expected);
    const { logits, loss } = gpu.scope(() => ({
      logits: model.logits(tensor(gpu, batch.ids, [batch.B, batch.T])),
      loss: batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens),
    }));
    const golden = await valuesOf(`${folder(name)}/expected.safetensors`);
    expectClose(await read(logits), golden.get("base.logits") ?? [], 1e-4, "logits");
    expectClose(await read(loss), [expected.base_loss], 1e-5, "loss");
    gpu.release(logits, loss);
    model.destroy();
  });

  // PyTorch's own f32 gradients are up to 6e-5 from its f64 ones here.
  test("LoRA gradients of every adapted layer equal PEFT's", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder(name)));
    const adapter = await loadPeft(model, diskDirectory(`${folder(name)}/adapter`));
    const expected = expectedOf(name);
    const batch = batchOf(expected);
    const { loss, grads } = gpu.scope(() => {
      const l = batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens);
      return { loss: l, grads: backward(l) };
    });
    const golden = await valuesOf(`${folder(name)}/expected.safetensors`);
    expectClose(await read(loss), [expected.lora_loss], 1e-5, "loss");
    expect(grads.size).toBe(adapter.parameters.length);
    for (const [module, { A, B }] of adapter.pairs)
      for (const [part, t] of [
        ["A", A],
        ["B", B],
      ] as const) {
        const grad = grads.get(t);
        if (!grad) expect.fail(`${module} lora_${part} has no gradient`);
        const key = `lora.grad.base_model.model.${module}.lora_${part}.weight`;
        expectClose(await read(grad), golden.get(key) ?? [], 2e-4, key);
      }
    gpu.release(loss, ...grads.values());
    adapter.detach();
    model.destroy();
  });

  test("gradients of a full fine-tune equal PyTorch's", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder(name)));
    const golden = await valuesOf(`${folder(name)}/expected-full.safetensors`);
    const biases = [...model.linears].flatMap(([module, { bias }]) =>
      bias ? [[`${module}.bias`, bias] as const] : [],
    );
    const weights = new Map([...model.weights, ...biases]);
    for (const t of weights.values()) t.requiresGrad = true;
    const batch = batchOf(expectedOf(name));
    const grads = gpu.scope(() => backward(batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens)));
    expect(golden.size).toBeGreaterThan(3);
    for (const [key, want] of golden) {
      const grad = grads.get(weights.get(key.replace(/^grad\./, "")) as never);
      if (!grad) expect.fail(`${key} has no gradient`);
      expectClose(await read(grad), want, 2e-5, key);
    }
    gpu.release(...grads.values());
    model.destroy();
  });
});

test("both spellings of RoPE settings are read alike", async () => {
  const [v5, v4] = ["config.json", "config.v4.json"].map((file) =>
    readFileSync(`${folder("llama-rope3")}/${file}`, "utf8"),
  );
  const read5 = await readConfig(memoryDirectory("m", { "config.json": v5 ?? "" }));
  const read4 = await readConfig(memoryDirectory("m", { "config.json": v4 ?? "" }));
  expect(read4).toEqual(read5);
  expect(read5).toMatchObject({ rope: { type: "llama3", factor: 8 } });
});

test("llama3 scaling keeps fast frequencies, divides slow ones and blends between", () => {
  const rope = {
    type: "llama3",
    theta: 10000,
    factor: 8,
    lowFreqFactor: 1,
    highFreqFactor: 4,
    originalLength: 64,
  } as const;
  const plain = inverseFrequencies(32, { type: "default", theta: 10000 });
  const scaled = inverseFrequencies(32, rope);
  expect(scaled[0]).toBe(plain[0]);
  expect(scaled[15]).toBeCloseTo((plain[15] ?? 0) / 8, 12);
  const ratios = Array.from(scaled, (f, i) => f / (plain[i] ?? 1));
  expect(ratios.some((r) => r > 0.126 && r < 0.999)).toBe(true);
});

test("yarn with its usual borders keeps fast frequencies, divides slow ones and blends between", () => {
  const rope = { type: "yarn", theta: 10000, factor: 4, betaFast: 32, betaSlow: 1, truncate: true } as const;
  const scaled = inverseFrequencies(64, { ...rope, attentionFactor: 1, originalLength: 4096 });
  const plain = inverseFrequencies(64, { type: "default", theta: 10000 });
  const kept = Array.from(scaled, (f, i) => (f / (plain[i] ?? 1) - 0.25) / 0.75);
  // Pairs that turn 32 times and once in 4096 positions: 64·ln(4096 / 2π·32) / 2·ln 10⁴ = 10.47, and 22.51.
  expect(kept.slice(0, 11).every((share) => Math.abs(share - 1) < 1e-12)).toBe(true);
  expect(kept[11]).toBeCloseTo(1 - 1 / 13, 12);
  expect(kept[22]).toBeCloseTo(1 - 12 / 13, 12);
  expect(kept.slice(23).every((share) => Math.abs(share) < 1e-12)).toBe(true);
});

test("a cache gives the logits of the last position that a full pass gives", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory(folder("llama-default")));
  const ids = [3, 9, 27, 1, 5];
  const whole = gpu.scope(() => model.logits(tensor(gpu, Int32Array.from(ids), [1, 5]), { lastOnly: true }));
  const cache = model.cache(1, 8);
  const parts = [[3, 9, 27], [1], [5]].map((part) =>
    gpu.scope(() => model.logits(tensor(gpu, Int32Array.from(part), [1, part.length]), { cache, lastOnly: true })),
  );
  const [full, , , last] = await readAll([whole, ...parts]);
  expect(whole.shape).toEqual([1, 1, model.config.vocabSize]);
  expectClose(last ?? [], full ?? [], 1e-5, "logits");
  gpu.release(whole, ...parts, ...cache.layers.flatMap(({ k, v }) => [k, v]));
  model.destroy();
});

describe("packed rows", () => {
  const ofSegments = (lengths: readonly number[], of: (at: number, first: number) => number): Int32Array =>
    Int32Array.from(
      lengths.flatMap((n, i) => {
        const first = lengths.slice(0, i).reduce((a, b) => a + b, 0);
        return Array.from({ length: n }, (_, t) => of(t, first));
      }),
    );

  test("give each segment what a row of its own gives, gradients too", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder("llama-default")));
    const adapter = await loadPeft(model, diskDirectory(`${folder("llama-default")}/adapter`));
    const ids = [3, 9, 27, 1, 5, 40, 41, 2, 7, 8, 11];
    const lengths = [4, 1, 6];
    const H = model.config.hiddenSize;
    const weights = Float32Array.from({ length: ids.length * H }, (_, i) => Math.sin(i));
    const firsts = lengths.map((_, i) => lengths.slice(0, i).reduce((a, b) => a + b, 0));
    const lossOf = (h: Tensor, first: number): Tensor =>
      sum(mul(h, tensor(gpu, weights.subarray(first * H, first * H + h.size), h.shape)));
    const packed = gpu.scope(() => {
      const packing = {
        positions: tensor(
          gpu,
          ofSegments(lengths, (t) => t),
          [1, 11],
        ),
        starts: tensor(
          gpu,
          ofSegments(lengths, (_, first) => first),
          [1, 11],
        ),
      };
      const h = model.hidden(tensor(gpu, Int32Array.from(ids), [1, 11]), { packing });
      return { h, grads: backward(lossOf(h, 0)) };
    });
    const alone = gpu.scope(() => {
      const hs = firsts.map((first, i) => {
        const segment = ids.slice(first, first + (lengths[i] ?? 0));
        return model.hidden(tensor(gpu, Int32Array.from(segment), [1, segment.length]));
      });
      const losses = hs.map((h, i) => lossOf(h, firsts[i] ?? 0));
      return { hs, grads: backward(losses.reduce((l, more) => add(l, more))) };
    });
    const rows = (await readAll(alone.hs)).flatMap((values) => [...values]);
    expectClose(await read(packed.h), rows, 1e-5, "hidden");
    // Sums over other rows in another order: both are f32 gradients with cancellation.
    for (const [name, { A, B }] of adapter.pairs)
      for (const t of [A, B])
        expectClose(await read(packed.grads.get(t) as Tensor), await read(alone.grads.get(t) as Tensor), 1e-4, name);
    gpu.release(packed.h, ...packed.grads.values(), ...alone.hs, ...alone.grads.values());
    adapter.detach();
    model.destroy();
  });

  test("take no cache", async () => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(folder("llama-default")));
    const ids = tensor(gpu, Int32Array.of(1, 2), [1, 2]);
    expect(() => model.hidden(ids, { cache: model.cache(1, 4), packing: { positions: ids, starts: ids } })).toThrow(
      new ShapeError("hidden: packed rows take no cache, got one. Give each segment a row of its own"),
    );
    model.destroy();
  });
});

describe("an embedding above what a device can bind comes in pieces", () => {
  const path = "out/test/pieces";
  const limits = { maxBufferSize: 2 ** 30, maxStorageBufferBindingSize: 64 * 32 * 4 + 100 };
  const rows = [3, 199, 64, 127, 128, 0, 63, 199];
  const labelled = collate([{ inputIds: rows, labels: rows }], 0);

  test.each([
    [true, "F16"],
    [false, "F32"],
  ] as const)("tied %s, stored in %s: logits, loss, gradients and file as in one piece", async (tied, dtype) => {
    const gpu = await testGpu();
    await writeTinyModel(path, { config: { vocab_size: 200, tie_word_embeddings: tied }, dtype });
    const directory = diskDirectory(path);
    const whole = await loadModel(gpu, directory);
    const pieced = await loadModel(gpu, directory, { limits });
    expect([...pieced.weights].filter(([name]) => /embed|head/.test(name)).map(([name, t]) => [name, t.shape])).toEqual(
      ["model.embed_tokens.weight", ...(tied ? [] : ["lm_head.weight"])].flatMap((name) => [
        [`${name}[0:64]`, [64, 32]],
        [`${name}[64:128]`, [64, 32]],
        [`${name}[128:192]`, [64, 32]],
        [`${name}[192:200]`, [8, 32]],
      ]),
    );
    const outcome = async (model: CausalModel): Promise<Float32Array[]> => {
      const weights = [...model.weights];
      for (const [, t] of weights) t.requiresGrad = true;
      const { logits, loss, grads } = gpu.scope(() => {
        const ids = tensor(gpu, labelled.ids, [1, rows.length]);
        const l = batchLoss(model, batchInputs(gpu, labelled), 1);
        return { logits: model.logits(ids), loss: l, grads: backward(l) };
      });
      const embedded = weights.flatMap(([name, t]) => (/embed|head/.test(name) ? [grads.get(t) as Tensor] : []));
      const [a = [], b = [], ...pieces] = await readAll([logits, loss, ...embedded]);
      gpu.release(logits, loss, ...grads.values());
      return [Float32Array.from(a), Float32Array.from(b), Float32Array.from(pieces.flatMap((values) => [...values]))];
    };
    const [one, several] = [await outcome(whole), await outcome(pieced)];
    for (const [i, what] of ["logits", "loss", "gradients"].entries())
      expectClose(several[i] ?? [], one[i] ?? [], 1e-5, what);
    const bytes = async (model: CausalModel): Promise<Buffer> => {
      const parts: Uint8Array[] = [];
      for await (const part of (await saveModel(model, directory)).files.get("model.safetensors") ?? [])
        parts.push(part);
      return Buffer.concat(parts);
    };
    expect(await bytes(pieced)).toEqual(await bytes(whole));
    whole.destroy();
    pieced.destroy();
  });

  test("logits in pieces have no gradient, and say so", async () => {
    const gpu = await testGpu();
    const directory = diskDirectory(path);
    const model = await loadModel(gpu, directory, { limits });
    for (const t of model.weights.values()) t.requiresGrad = true;
    const logits = model.logits(tensor(gpu, Int32Array.of(1, 2), [1, 2]));
    expect(() => backward(logits, logits)).toThrow(
      new ShapeError("logits: gradients need one head without a cap. Use linearCrossEntropy"),
    );
    model.destroy();
  });

  test("an embedding that fits stays in one", async () => {
    const config = await readConfig(diskDirectory(path));
    expect(weightShapes(config, { ...limits, maxStorageBufferBindingSize: 200 * 32 * 4 })).toEqual(
      weightShapes(config),
    );
  });
});

test("a row longer than the context is refused", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory(folder("llama-default")));
  expect(() => model.logits(tensor(gpu, new Int32Array(65), [1, 65]))).toThrow(
    new ShapeError("logits: at most 64 positions fit, got 65. Shorten the rows"),
  );
  model.destroy();
});

describe("a model directory that does not fit is refused by name", () => {
  const config = {
    model_type: "llama",
    vocab_size: 8,
    hidden_size: 8,
    intermediate_size: 8,
    num_hidden_layers: 1,
    num_attention_heads: 2,
  };
  const cases: [string, Record<string, string>, string][] = [
    ["no config", {}, "m/config.json: a model directory must have it, got no such file. Check the path"],
    [
      "another architecture",
      { "config.json": JSON.stringify({ ...config, model_type: "mamba" }) },
      'm/config.json: "model_type" must be one of llama, mistral, qwen2, qwen3, smollm3, gemma2, gemma3_text, phi3, olmo2, granite, gpt2, got "mamba"',
    ],
    [
      "no weights",
      { "config.json": JSON.stringify(config) },
      "m/model.safetensors: the weights must be there, or model.safetensors.index.json, got neither. Download the model again",
    ],
    [
      "a missing shard",
      {
        "config.json": JSON.stringify(config),
        "model.safetensors.index.json": JSON.stringify({
          weight_map: { "model.norm.weight": "model-00001-of-00002.safetensors" },
        }),
      },
      "m/model-00001-of-00002.safetensors: the shard must be there by m/model.safetensors.index.json, got no such file. Download the model again",
    ],
    [
      "a rope scaling that is not supported",
      { "config.json": JSON.stringify({ ...config, rope_scaling: { rope_type: "spiral", factor: 2 } }) },
      'm/config.json: "rope_type" of rope_scaling must be default, linear, dynamic, llama3, yarn or longrope, got "spiral"',
    ],
    [
      "heads that do not divide",
      { "config.json": JSON.stringify({ ...config, num_key_value_heads: 3 }) },
      'm/config.json: "num_key_value_heads" must be a divisor of num_attention_heads = 2, got 3',
    ],
  ];
  test.each(cases)("%s", async (_, files, message) => {
    const gpu = await testGpu();
    await expect(loadModel(gpu, memoryDirectory("m", files))).rejects.toThrow(new FormatError(message));
  });
});
