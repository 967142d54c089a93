/** Starts that are fitted to data. What PEFT makes of the same comes from scripts/golden/inits.py. */
import { readFileSync } from "node:fs";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { decodeFloats } from "../../src/io/dtype.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { openSafetensors, type SafetensorsFile } from "../../src/io/safetensors.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { addRows, explained, type Pca } from "../../src/lora/incremental-pca.ts";
import { attachEva, type EvaOptions } from "../../src/lora/init-eva.ts";
import { initLoraGa, type LoraGaOptions } from "../../src/lora/init-lora-ga.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { type Matrix, matrix, multiply, svd, transpose } from "../../src/tensor/linalg.ts";
import { read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { calibrationBatches } from "../../src/train/calibration.ts";
import type { Row } from "../../src/train/data.ts";
import { TrainingStep } from "../../src/train/step.ts";
import { expectClose, testGpu } from "../harness.ts";

const ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const CONFIG = { r: 4, alpha: 6, targetModules: ALL };
const K_PROJ = { ...CONFIG, targetModules: ["k_proj"] };

/** For where it does not matter whether directions have settled. */
const QUICK = { maxPasses: 3 };

interface Expected {
  readonly rows: Row[];
  readonly modules: Record<string, { r: number; alpha: number; scale: number }>;
}

const expectedOf = (name: string): Expected =>
  JSON.parse(readFileSync(`test/golden/adapters/${name}/expected.json`, "utf8")) as Expected;

async function tensorsOf(name: string): Promise<(key: string) => Promise<Matrix>> {
  const path = `test/golden/adapters/${name}/expected.safetensors`;
  const file: SafetensorsFile = await openSafetensors(await fileSource(path), path);
  return async (key) => {
    const [rows = 0, columns = 0] = file.tensors.get(key)?.shape ?? expect.fail(key);
    return matrix(rows, columns, decodeFloats("F32", await file.read(key)));
  };
}

const { rows: ROWS } = expectedOf("lora-ga");
let model: CausalModel;
let batches: ReturnType<typeof calibrationBatches>;
let before: Float32Array;
const attached: LoraAdapter[] = [];

test("of packed rows each segment is seen as training sees it, alone", async () => {
  const [first, second] = [
    [1, 2, 3, 4, 5],
    [9, 8, 7],
  ] as const;
  const ids = [...first, ...second];
  const packed = [{ inputIds: ids, labels: ids, starts: [0, first.length] }];
  const [batch] = calibrationBatches(model, packed, { batchSize: 1, batches: 1 });
  const hiddenOf = (inputIds: readonly number[]): Promise<Float32Array> =>
    read(model.hidden(tensor(model.gpu, Int32Array.from(inputIds), [1, inputIds.length])));
  const expected = [...(await hiddenOf(first)), ...(await hiddenOf(second))];
  expectClose(await read(batch?.forward() as Tensor), expected, 1e-5);
  batch?.destroy();
});

beforeAll(async () => {
  model = await loadModel(await testGpu(), diskDirectory("test/golden/models/qwen2"));
  batches = calibrationBatches(model, ROWS, { batchSize: 2, batches: 99 });
  before = await logitsOf();
});
afterEach(() => {
  for (const adapter of attached.splice(0)) adapter.detach(); // also where a test failed
});
afterAll(() => {
  for (const batch of batches) batch.destroy();
  model.destroy();
});

async function logitsOf(): Promise<Float32Array> {
  const ids = ROWS.slice(0, 2).map(({ inputIds }) => inputIds);
  const { gpu } = model;
  const logits = gpu.scope(() => model.logits(tensor(gpu, Int32Array.from(ids.flat()), [2, ids[0]?.length ?? 0])));
  const values = Float32Array.from(await read(logits));
  gpu.release(logits);
  return values;
}

function attach(...args: Parameters<typeof attachLora>): LoraAdapter {
  const adapter = attachLora(...args);
  attached.push(adapter);
  return adapter;
}

const matrixOf = async (t: { readonly shape: readonly number[] } & Parameters<typeof read>[0]): Promise<Matrix> =>
  matrix(t.shape[0] ?? 0, t.shape[1] ?? 0, await read(t));
/** XᵀX: signs and order of the rows do not show. */
const gram = (X: Matrix): Float64Array => multiply(transpose(X), X).data;

async function savedAndLoaded(adapter: LoraAdapter): Promise<{ config: Record<string, unknown>; again: LoraAdapter }> {
  const files = savePeft(adapter, "qwen2");
  const parts: Uint8Array[] = [];
  for await (const part of files["adapter_model.safetensors"]) parts.push(part);
  adapter.detach();
  const directory = memoryDirectory("saved", { ...files, "adapter_model.safetensors": Buffer.concat(parts) });
  return { config: JSON.parse(files["adapter_config.json"]), again: await loadPeft(model, directory) };
}

async function trainFiveSteps(adapter: LoraAdapter): Promise<void> {
  const step = new TrainingStep({ model, parameters: adapter.parameters });
  for (let i = 0; i < 5; i++) step.run([collate(ROWS.slice(0, 2), 0)], 0.01);
  const losses = (await step.read()).map(({ loss }) => loss);
  expect(losses.at(-1)).toBeLessThan(losses[0] ?? 0);
  step.destroy();
}

test("components of rows in batches are those of PEFT's incremental PCA, and of all rows where none is dropped", async () => {
  const tensorOf = await tensorsOf("eva");
  const parts = await Promise.all([0, 1, 2].map((i) => tensorOf(`pca.${i}`)));
  const fitted = async (c: number): Promise<Pca> => {
    let pca: Pca | undefined;
    for (const part of parts) pca = await addRows(model.gpu, pca, part, c, 3);
    return pca as Pca;
  };
  const four = await fitted(4);
  expectClose(four.components.data, (await tensorOf("pca.components")).data, 1e-3, "components");
  expectClose(four.s, (await tensorOf("pca.s")).data, 1e-4, "singular values");
  expectClose(explained(four), (await tensorOf("pca.explained")).data, 1e-4, "shares");

  const [all, few] = [parts.flatMap(({ data }) => [...data]), await fitted(9)];
  const rows = all.length / 16;
  const mean = Array.from({ length: 16 }, (_, k) => all.reduce((sum, x, p) => sum + (p % 16 === k ? x : 0), 0) / rows);
  const centred = all.map((x, p) => x - (mean[p % 16] ?? 0));
  expectClose(few.mean, mean, 1e-6, "mean");
  expectClose([few.squares], [centred.reduce((sum, x) => sum + x * x, 0)], 1e-6, "squares");
  expectClose(few.s.subarray(0, 4), svd(matrix(rows, 16, centred)).s.subarray(0, 4), 1e-4, "of all rows");
});

describe("EVA", () => {
  test("ranks, alphas and the directions of every module are PEFT's", async () => {
    const { modules } = expectedOf("eva");
    const tensorOf = await tensorsOf("eva");
    const adapter = await attachEva(model, { ...CONFIG, rankPattern: { down_proj: 2 } }, batches.slice(0, 1));
    expect([...adapter.pairs.keys()].sort()).toEqual(Object.keys(modules).sort());
    for (const [name, { A, B, scale }] of adapter.pairs) {
      expect({ r: A.shape[0], scale }, name).toEqual({ r: modules[name]?.r, scale: modules[name]?.scale });
      expect(adapter.config.alphaPattern?.[name] ?? 6, name).toBe(modules[name]?.alpha);
      expectClose(gram(await matrixOf(A)), gram(await tensorOf(`${name}.A`)), 2e-2, name); // PEFT sketches with 2c columns
      expect((await read(B)).every((value) => value === 0)).toBe(true);
    }
    expect(await logitsOf(), "the base to the bit").toEqual(before);
    adapter.detach();
  });

  test("after training, what is saved has the ranks in its patterns and gives the same logits", async () => {
    const adapter = await attachEva(model, CONFIG, batches, QUICK);
    await trainFiveSteps(adapter);
    const [after, ranks] = [await logitsOf(), adapter.config.rankPattern];
    const { config, again } = await savedAndLoaded(adapter);
    expect(config.rank_pattern).toEqual(ranks);
    expect(Object.keys(ranks ?? {}).length).toBeGreaterThan(0);
    expectClose(await logitsOf(), after, 1e-5);
    again.detach();
  });

  test("rho 1 leaves the ranks; a module that gets none is no target; without adjusting alphas stay", async () => {
    const even = await attachEva(model, CONFIG, batches, { rho: 1, ...QUICK });
    expect([even.config.rankPattern, even.config.alphaPattern]).toEqual([{}, {}]);
    even.detach();
    const scarce = { ...CONFIG, r: 1 };
    const few = await attachEva(model, scarce, batches, { rho: 4, adjustScalingFactors: false, ...QUICK });
    const ranks = [...few.pairs.values()].map(({ A }) => A.shape[0] ?? 0);
    expect(ranks.reduce((a, b) => a + b)).toBe(14);
    expect(few.pairs.size).toBeLessThan(14);
    expect(few.config.targetModules).toEqual([...few.pairs.keys()]);
    expect(few.config.alphaPattern).toEqual({});
    few.detach();
  });

  test("a classifier's head is trained whole beside what else is, and gets no directions", async () => {
    const renamed = <T>(map: ReadonlyMap<string, T>): Map<string, T> =>
      new Map([...map].map(([name, one]) => [name === "model.layers.1.mlp.down_proj" ? "score" : name, one]));
    const { groups } = model;
    const classifier = {
      linears: renamed(model.linears),
      modules: renamed(model.modules),
      groups,
      taskType: "SEQ_CLS",
    };
    const settings = { ...CONFIG, targetModules: "all-linear", modulesToSave: ["model.norm"] };
    const adapter = await attachEva(classifier, settings, batches, QUICK);
    expect([...adapter.saved.keys()].sort()).toEqual(["model.norm", "score"]);
    const ranks = [...adapter.pairs.values()].map(({ A }) => A.shape[0] ?? 0);
    expect(ranks.reduce((a, b) => a + b, 0)).toBe(4 * (model.linears.size - 1));
    adapter.detach();
  });

  test("positions that are not learned are left out", async () => {
    const masked = ROWS.map(({ inputIds, labels }) => ({
      inputIds: inputIds.map((id, t) => (labels[t] === -100 ? 5 : id)),
      labels,
    }));
    // What the first layer reads is each token's own: that of masked positions may be any.
    const others = calibrationBatches(model, masked, { batchSize: 2, batches: 99 });
    const config = { ...K_PROJ, layersToTransform: [0] };
    const directions: Float64Array[] = [];
    for (const data of [batches, others]) {
      const adapter = await attachEva(model, config, data, { rho: 1, ...QUICK });
      for (const { A } of adapter.pairs.values()) directions.push(gram(await matrixOf(A)));
      adapter.detach();
    }
    expectClose(directions[0] ?? [], directions[1] ?? [NaN], 1e-6);
    for (const batch of others) batch.destroy();
  });

  test.each<[string, typeof CONFIG, number, EvaOptions, string]>([
    ["no data", CONFIG, 0, {}, "eva: at least one batch of data is needed, got none"],
    ["rho below 1", CONFIG, 9, { rho: 0.5 }, "eva: rho must be a number of at least 1, got 0.5"],
    ["tau above 1", CONFIG, 9, { tau: 1.5 }, "eva: tau must be from 0 to 1, got 1.5"],
    [
      "a rank above the inputs",
      { ...CONFIG, r: 17 },
      9,
      {},
      "eva: rho times the rank must be at most 32, the inputs of model.layers.0.self_attn.q_proj, got 34. Use a smaller rank or rho",
    ],
    [
      "a rank above the tokens",
      { ...CONFIG, r: 22, targetModules: ["down_proj"] },
      9,
      {},
      "eva: a batch must have at least 44 tokens to learn, rho times the rank, got 42. Use larger batches, a smaller rank or rho",
    ],
    [
      "too few passes",
      K_PROJ,
      9,
      { maxPasses: 0 },
      "eva: maxPasses must be a whole number of at least 3, one for each batch, got 0",
    ],
  ])("%s is refused", async (_, config, count, options, message) => {
    await expect(attachEva(model, config, batches.slice(0, count), options)).rejects.toThrow(new ShapeError(message));
  });

  test("a layer that has an adapter is refused", async () => {
    const adapter = attach(model, K_PROJ);
    await expect(attachEva(model, K_PROJ, batches)).rejects.toThrow(
      new ShapeError("eva: layers must be without an adapter, got one on model.layers.0.self_attn.k_proj. Detach it"),
    );
    adapter.detach();
  });
});

describe("LoRA-GA", () => {
  test.each<[NonNullable<LoraGaOptions["direction"]>, NonNullable<LoraGaOptions["scale"]>]>([
    ["ArB2r", "stable"],
    ["A2rBr", "weight_svd"],
    ["ArBr", "gd_scale"],
    ["ArB2r", "unit"],
  ])(
    "%s, %s: A and B of every module are PEFT's but for signs, and the output is unchanged",
    async (direction, scale) => {
      const tensorOf = await tensorsOf("lora-ga");
      const adapter = attach(model, CONFIG);
      await initLoraGa(adapter, batches, { direction, scale });
      for (const [name, { A, B }] of adapter.pairs) {
        if (name.includes("layers.1") && scale !== "stable") continue;
        const [a, b] = [
          await tensorOf(`${direction}.${scale}.${name}.A`),
          await tensorOf(`${direction}.${scale}.${name}.B`),
        ];
        expectClose(gram(await matrixOf(A)), gram(a), 2e-3, `${name} A`);
        const [own, want] = [gram(transpose(await matrixOf(B))), gram(transpose(b))];
        const most = Math.max(...want.map(Math.abs));
        expectClose(
          own.map((v) => v / most),
          want.map((v) => v / most),
          2e-3,
          `${name} B`,
        );
      }
      expectClose(await logitsOf(), before, 1e-4, "unchanged");
      adapter.disable();
      expect(await logitsOf(), "the base to the bit").toEqual(before);
      adapter.detach();
    },
  );

  test("random takes the same triplets for A and B", async () => {
    const adapter = attach(model, K_PROJ);
    await initLoraGa(adapter, batches, { direction: "random", scale: "unit" });
    const tensorOf = await tensorsOf("lora-ga");
    const name = "model.layers.0.self_attn.k_proj";
    const { A, B } = adapter.pairs.get(name) ?? expect.fail(name);
    const [first, second] = [await tensorOf(`ArB2r.unit.${name}.A`), await tensorOf(`ArB2r.unit.${name}.B`)];
    const [a, b] = [await matrixOf(A), await matrixOf(B)];
    // A row of A that is not among PEFT's first r goes with a column of B that is among its second r, and the other way around.
    const overlap = (X: Matrix, i: number, Y: Matrix): number => {
      const row = matrix(1, X.columns, X.data.subarray(i * X.columns, (i + 1) * X.columns));
      const unit = Math.hypot(...row.data);
      return Math.hypot(...multiply(row, transpose(Y)).data) / unit;
    };
    const seconds = matrix(4, second.rows, transpose(second).data);
    for (let j = 0; j < 4; j++) {
      const length = Math.hypot(...seconds.data.subarray(j * second.rows, (j + 1) * second.rows));
      for (let k = 0; k < second.rows; k++)
        seconds.data[j * second.rows + k] = (seconds.data[j * second.rows + k] ?? 0) / length;
    }
    for (let i = 0; i < 4; i++)
      expect(Math.abs(overlap(a, i, first) + overlap(transpose(b), i, seconds) - 1)).toBeLessThan(2e-3);
    expectClose(await logitsOf(), before, 1e-4, "unchanged");
    adapter.detach();
  });

  test("after training, an adapter of twice the rank gives the same logits on the base as it was", async () => {
    const adapter = attach(model, CONFIG);
    await initLoraGa(adapter, batches);
    await trainFiveSteps(adapter);
    const after = await logitsOf();
    const { config, again } = await savedAndLoaded(adapter);
    expect([config.r, config.lora_alpha, config.init_lora_weights]).toEqual([8, 12, true]);
    expectClose(await logitsOf(), after, 2e-4);
    again.detach();
  });

  test("gradients and what the passes need are given back", async () => {
    const { gpu } = model;
    const adapter = attach(model, K_PROJ);
    const live = gpu.counters().bytesLive;
    await initLoraGa(adapter, batches);
    const kept = [...adapter.beginnings.values()].reduce((sum, { A, B, residual }) => {
      return sum + A.sizeBytes + B.sizeBytes + residual.sizeBytes;
    }, 0);
    expect(gpu.counters().bytesLive - live).toBe(kept);
    expect([...model.linears.values()].some(({ weight }) => "requiresGrad" in weight && weight.requiresGrad)).toBe(
      false,
    );
    adapter.detach();
  });

  test.each<[string, number, number, object, string]>([
    ["no data", 4, 0, {}, "lora_ga: at least one batch of data is needed, got none"],
    [
      "an unknown direction",
      4,
      9,
      { direction: "BrAr" },
      'lora_ga: direction must be one of ArB2r, A2rBr, ArBr, random, got "BrAr"',
    ],
    [
      "an unknown scale",
      4,
      9,
      { scale: "large" },
      'lora_ga: scale must be one of stable, weight_svd, gd_scale, unit, got "large"',
    ],
    ["gamma 0", 4, 9, { gamma: 0 }, "lora_ga: gamma must be a number above 0, got 0"],
    [
      "a rank above half",
      9,
      9,
      {},
      "lora_ga: r must be at most 8, half the rank of model.layers.0.self_attn.k_proj, got 9",
    ],
  ])("%s is refused", async (_, r, count, options, message) => {
    const adapter = attach(model, { ...K_PROJ, r });
    await expect(initLoraGa(adapter, batches.slice(0, count), options)).rejects.toThrow(new ShapeError(message));
    adapter.detach();
  });

  test("packed weights are refused", async () => {
    const packed = await loadModel(model.gpu, diskDirectory("test/golden/models/qwen2"), { weights: "nf4" });
    const adapter = attachLora(packed, K_PROJ);
    await expect(initLoraGa(adapter, batches)).rejects.toThrow(
      new ShapeError("lora_ga: gradients are taken of f32 weights, got nf4. Load the model as f32"),
    );
    adapter.detach();
    packed.destroy();
  });
});
