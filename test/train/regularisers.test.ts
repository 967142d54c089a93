// Label smoothing and NEFTune: what they change of a training step, and that an evaluation knows nothing of them.
import { afterAll, beforeAll, expect, test } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { readAll, tensor } from "../../src/tensor/tensor.ts";
import type { Row } from "../../src/train/data.ts";
import { evaluate } from "../../src/train/loss.ts";
import { type TrainOptions, train } from "../../src/train/trainer.ts";
import { expectClose, nd, testGpu } from "../harness.ts";
import { noiseTwin } from "../reference/dropout.ts";
import { crossEntropyTwin } from "../reference/model-ops.ts";

const IDS = [5, 9, 2, 33, 7, 1, 40, 12, 3, 60];
const LABELS = [-100, -100, 2, 33, 7, -100, 40, 12, 3, 60];
const rows: Row[] = [{ inputIds: IDS, labels: LABELS }];
let gpu: Gpu;
let model: CausalModel;

beforeAll(async () => {
  gpu = await testGpu();
  model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
});
afterAll(() => model.destroy());

/** The loss of each step, and of an evaluation after them. */
async function losses(options: Partial<TrainOptions>): Promise<{ steps: number[]; after: number }> {
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" }, 5);
  const steps: number[] = [];
  const settings = { model, adapter, parameters: adapter.parameters, rows, steps: 1, batchSize: 1, learningRate: 0 };
  for await (const { loss } of train({ ...settings, ...options })) steps.push(loss);
  const { loss: after } = await evaluate(model, rows, 1);
  adapter.detach();
  return { steps, after };
}

/** In f64 from the model's logits. */
async function exactLoss(smoothing: number): Promise<number> {
  const logits = gpu.scope(() => model.logits(tensor(gpu, Int32Array.from(IDS), [1, IDS.length])));
  const [values = new Float32Array()] = await readAll([logits]);
  gpu.release(logits);
  const labels = nd([IDS.length], [...LABELS.slice(1), -100]);
  const counted = labels.data.filter((label) => label >= 0).length;
  const twin = crossEntropyTwin(nd([IDS.length, values.length / IDS.length], values), labels, 1 / counted, smoothing);
  return twin.data[0] as number;
}

test("a smoothed step has the loss of PyTorch's formula, an evaluation the plain one", async () => {
  const [plain, smooth] = [await exactLoss(0), await exactLoss(0.2)];
  expect(Math.abs(plain - smooth)).toBeGreaterThan(1e-2);
  const found = await losses({ labelSmoothing: 0.2 });
  expectClose([...found.steps, found.after], [smooth, plain], 1e-5, "losses");
});

/** Loss where the noise of the f64 twin is put into the embeddings of the tokens themselves, which do not repeat. */
async function noisyLoss(alpha: number, seed: number, step: number): Promise<number> {
  const table = model.weights.get("model.embed_tokens.weight");
  if (!table) return expect.fail("the model has an embedding");
  const [before = new Float32Array()] = await readAll([table]);
  const C = table.shape[1] ?? 0;
  const [T, key] = [IDS.length, { seed, step, stream: 2 ** 32 - 1 }];
  const noise = noiseTwin(nd([T, C], new Float64Array(T * C)), alpha / Math.sqrt(T * C), key).data;
  const after = Float32Array.from(before);
  IDS.forEach((id, t) => {
    for (let c = 0; c < C; c++) after[id * C + c] = (before[id * C + c] ?? 0) + (noise[t * C + c] ?? 0);
  });
  gpu.write(table, after);
  const { loss } = await evaluate(model, rows, 1);
  gpu.write(table, before);
  return loss;
}

test("NEFTune adds the noise of its seed and batch to the embeddings in training, and nothing in evaluation", async () => {
  const plain = await exactLoss(0);
  const settings = { neftuneAlpha: 50, seed: 7, steps: 3 };
  const { steps, after } = await losses(settings);
  const expected = [await noisyLoss(50, 7, 1), await noisyLoss(50, 7, 2), await noisyLoss(50, 7, 3)];
  expectClose(steps, expected, 1e-4, "losses");
  for (const [i, loss] of steps.entries()) {
    expect(Math.abs(loss - plain)).toBeGreaterThan(1e-3);
    expect(steps.indexOf(loss)).toBe(i);
  }
  expectClose([after], [plain], 1e-5, "evaluation");
  expect((await losses(settings)).steps).toEqual(steps);
  expect((await losses({ ...settings, eager: true })).steps).toEqual(steps);
  expect((await losses({ ...settings, seed: 8 })).steps).not.toEqual(steps);
  expectClose((await losses({ neftuneAlpha: 0 })).steps, [plain], 1e-5, "no noise");
});

test("settings out of range name the rule and the value", async () => {
  await expect(losses({ labelSmoothing: 1 })).rejects.toThrow(
    new ShapeError("languageTask: labelSmoothing must be at least 0 and below 1, got 1"),
  );
  await expect(losses({ neftuneAlpha: -1 })).rejects.toThrow(
    new ShapeError("languageTask: neftuneAlpha must be a number of at least 0, got -1"),
  );
});
