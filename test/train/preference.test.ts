import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { emptyModel, loadModel } from "../../src/models/load.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { longest } from "../../src/train/batches.ts";
import { IGNORED, type PreferencePair, type Row } from "../../src/train/data.ts";
import { planTraining } from "../../src/train/plan.ts";
import { evaluatePreferences, type PreferenceRow, preferenceTask, withReference } from "../../src/train/preference.ts";
import { trainTask } from "../../src/train/trainer.ts";
import { expectRelative, valuesOf } from "../golden/files.ts";
import { expectClose, freshSeed, testGpu } from "../harness.ts";

const BETA = 0.3;

async function start(seed: number): Promise<{ model: CausalModel; adapter: LoraAdapter }> {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" }, 5);
  const random = new Random(seed);
  for (const { B } of adapter.pairs.values())
    gpu.write(
      B,
      Float32Array.from({ length: B.size }, () => random.normal(0, 0.2)),
    );
  return { model, adapter };
}

function pairsOf(seed: number, count: number): PreferencePair[] {
  const random = new Random(seed);
  const ids = (n: number): number[] => Array.from({ length: n }, () => random.below(60) + 3);
  return Array.from({ length: count }, () => {
    const prompt = ids(2 + random.below(4));
    const answer = (): Row => {
      const text = ids(1 + random.below(7));
      return { inputIds: [...prompt, ...text], labels: [...prompt.map(() => IGNORED), ...text] };
    };
    return { chosen: answer(), rejected: answer() };
  });
}

/** log π of a row in f64, from the model's logits. */
async function logProb(model: CausalModel, { inputIds, labels }: Row): Promise<number> {
  const logits = model.gpu.scope(() =>
    model.logits(tensor(model.gpu, Int32Array.from(inputIds), [1, inputIds.length])),
  );
  const values = await read(logits);
  model.gpu.release(logits);
  const V = values.length / inputIds.length;
  return labels.slice(1).reduce((sum, label, t) => {
    if (label === IGNORED) return sum;
    const row = Array.from(values.slice(t * V, (t + 1) * V));
    const most = Math.max(...row);
    return sum + (row[label] ?? 0) - most - Math.log(row.reduce((all, x) => all + Math.exp(x - most), 0));
  }, 0);
}

async function marginOf(model: CausalModel, { chosen, rejected }: PreferencePair): Promise<number> {
  return (await logProb(model, chosen)) - (await logProb(model, rejected));
}

async function lossOf(model: CausalModel, rows: readonly PreferenceRow[], smoothing = 0): Promise<number> {
  const task = preferenceTask(model, { beta: BETA, labelSmoothing: smoothing });
  const inputs = task.load(task.collate(rows, 64));
  const losses = model.gpu.scope(() => inputs.losses(1 / rows.length));
  const [values] = await readAll(losses);
  model.gpu.release(...losses, ...inputs.tensors);
  return values?.[0] ?? Number.NaN;
}

describe("preference tuning", () => {
  test("has the loss of the paper, worked out in f64 from the logits with and without the adapter", async () => {
    const seed = freshSeed();
    const { model, adapter } = await start(seed);
    const pairs = pairsOf(seed, 5);
    const rows = await withReference(model, adapter, pairs, 2);
    expect(adapter.state).toBe("enabled");
    adapter.disable();
    const references: number[] = [];
    for (const pair of pairs) references.push(await marginOf(model, pair));
    expectClose(
      rows.map((row) => row.referenceMargin),
      references,
      1e-4,
      `references (seed ${seed})`,
    );
    adapter.enable();
    const z: number[] = [];
    for (const [i, pair] of pairs.entries()) z.push(BETA * ((await marginOf(model, pair)) - (references[i] as number)));
    const softplus = (x: number): number => Math.log1p(Math.exp(x));
    const wanted = z.reduce((sum, x) => sum + softplus(-x) / 5, 0);
    const smooth = z.reduce((sum, x) => sum + (0.9 * softplus(-x) + 0.1 * softplus(x)) / 5, 0);
    expectClose(
      [await lossOf(model, rows), await lossOf(model, rows, 0.1)],
      [wanted, smooth],
      1e-4,
      `loss (seed ${seed})`,
    );
    const evaluated = await evaluatePreferences(model, rows, 2, BETA);
    expectClose([evaluated.loss, evaluated.margin], [wanted, z.reduce((a, b) => a + b, 0) / 5], 1e-4, `seed ${seed}`);
    expect(evaluated.accuracy).toBe(z.filter((x) => x > 0).length / 5);
    model.destroy();
  });

  test("has the gradient that the loss's change along it says, and none for the base", async () => {
    const seed = freshSeed();
    const { model, adapter } = await start(seed);
    const rows = await withReference(model, adapter, pairsOf(seed, 3), 3);
    const { gpu } = model;
    const task = preferenceTask(model, { beta: BETA, labelSmoothing: 0.1 });
    const inputs = task.load(task.collate(rows, 64));
    const random = new Random(seed, 1);
    const values = await readAll(adapter.parameters);
    const gradients = backward(inputs.losses(1 / 3)[0] as Tensor);
    expect(gradients.size).toBe(adapter.parameters.length);
    const directions = values.map((v) => v.map(() => random.normal()));
    let along = 0;
    for (const [i, p] of adapter.parameters.entries()) {
      const g = await read(gradients.get(p) as Tensor);
      along += g.reduce((sum, x, j) => sum + x * (directions[i]?.[j] ?? 0), 0);
    }
    const at = async (by: number): Promise<number> => {
      for (const [i, p] of adapter.parameters.entries())
        gpu.write(
          p,
          (values[i] as Float32Array).map((v, j) => v + by * (directions[i]?.[j] ?? 0)),
        );
      return lossOf(model, rows, 0.1);
    };
    const h = 1e-3;
    const difference = ((await at(h)) - (await at(-h))) / (2 * h);
    expect(
      Math.abs(along - difference) <= 0.02 * Math.abs(difference) + 2e-3,
      `${along} against ${difference}, seed ${seed}`,
    ).toBe(true);
    gpu.release(...inputs.tensors);
    model.destroy();
  });

  test("teaches the adapter to prefer what was chosen", async () => {
    const { model, adapter } = await start(3);
    for (const { B } of adapter.pairs.values()) model.gpu.write(B, new Float32Array(B.size));
    const rows = await withReference(model, adapter, pairsOf(4, 6), 3);
    const task = preferenceTask(model, { beta: BETA });
    const options = { task, parameters: adapter.parameters, rows, steps: 15, batchSize: 3, learningRate: 2e-2 };
    const losses: number[] = [];
    for await (const { loss } of trainTask(options)) losses.push(loss);
    expect(Math.abs((losses[0] ?? 0) - Math.LN2)).toBeLessThanOrEqual(1e-5); // the adapter is the reference at first
    expect(losses.at(-1)).toBeLessThan(0.3);
    expect((await evaluatePreferences(model, rows, 4, BETA)).accuracy).toBe(1);
    model.destroy();
  });

  test("takes the steps that PEFT and PyTorch take", async () => {
    const gpu = await testGpu();
    const golden = JSON.parse(await readFile("test/golden/dpo/expected.json", "utf8"));
    const {
      beta,
      label_smoothing: labelSmoothing,
      lr: learningRate,
      weight_decay: weightDecay,
      steps,
    } = golden.settings;
    const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
    const adapter = await loadPeft(model, diskDirectory("test/golden/llama-default/adapter"));
    const rowOf = ({ input_ids: inputIds, labels }: { input_ids: number[]; labels: number[] }): Row => ({
      inputIds,
      labels,
    });
    const pairs = Object.values(golden.pairs as Record<string, Record<"chosen" | "rejected", never>>).map(
      ({ chosen, rejected }) => ({ chosen: rowOf(chosen), rejected: rowOf(rejected) }),
    );
    const rows = await withReference(model, adapter, pairs, 4);
    expectClose(
      rows.map(({ referenceMargin }) => referenceMargin),
      golden.reference_margins,
      1e-4,
      "reference",
    );
    const losses: number[] = [];
    const tokens: number[] = [];
    const settings = { steps, batchSize: 4, learningRate, weightDecay, schedule: "constant" } as const;
    const task = preferenceTask(model, { beta, labelSmoothing });
    for await (const metrics of trainTask({ task, adapter, parameters: adapter.parameters, rows, ...settings })) {
      losses.push(metrics.loss);
      tokens.push(metrics.tokens);
    }
    expectClose(losses, golden.losses, 1e-4, "losses");
    const all = pairs.reduce((sum, { chosen, rejected }) => sum + chosen.inputIds.length + rejected.inputIds.length, 0);
    expect(tokens).toEqual([all, all, all]);
    const final = await valuesOf("test/golden/dpo/final.safetensors");
    for (const [name, { A, B }] of adapter.pairs)
      for (const [part, trained] of Object.entries({ A, B })) {
        const key = `base_model.model.${name}.lora_${part}.weight`;
        expectRelative(await read(trained), final.get(key), 2e-3, key);
      }
    expect(final.size).toBe(2 * adapter.pairs.size);
    model.destroy();
  });

  test("takes the memory that is planned for it", async () => {
    const gpu = await testGpu();
    const directory = diskDirectory("test/golden/llama-default");
    const config = { r: 2, alpha: 4, targetModules: "all-linear" };
    const rows = pairsOf(6, 6).map((pair) => {
      const { inputIds } = pair.chosen.inputIds.length < pair.rejected.inputIds.length ? pair.rejected : pair.chosen;
      return { ...pair, inputIds, referenceMargin: 0 };
    });
    const plan = await planTraining(
      gpu,
      async (dry) => {
        const unfilled = await emptyModel(dry, directory);
        const { parameters } = attachLora(unfilled, config);
        return { model: unfilled, task: preferenceTask(unfilled), parameters };
      },
      { batchSize: 3, maxLength: longest(rows) },
    );
    const { bytesLive } = gpu.counters();
    gpu.resetCounters();
    const model = await loadModel(gpu, directory);
    const { parameters } = attachLora(model, config);
    const task = preferenceTask(model);
    for await (const _ of trainTask({ task, parameters, rows, steps: 2, batchSize: 3, learningRate: 1e-3 }));
    expect(gpu.counters().bytesPeak - bytesLive).toBe(plan.peak);
    model.destroy();
  });

  test("refuses settings out of range", async () => {
    const { model } = await start(1);
    expect(() => preferenceTask(model, { beta: 0 })).toThrow("preferenceTask: beta must be a number above 0, got 0");
    expect(() => preferenceTask(model, { labelSmoothing: 0.5 })).toThrow(
      "preferenceTask: labelSmoothing must be at least 0 and below 0.5, got 0.5",
    );
    model.destroy();
  });
});
