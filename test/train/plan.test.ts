// What happens before the first step is in the plan, too.
import { expect, test } from "vitest";
import { dryGpu } from "../../src/gpu/dry.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { attachEva, planEva } from "../../src/lora/init-eva.ts";
import { initLoraGa, planLoraGa } from "../../src/lora/init-lora-ga.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { emptyModel, loadModel } from "../../src/models/load.ts";
import { generate, planGeneration } from "../../src/serve/generate.ts";
import { calibrationBatches } from "../../src/train/calibration.ts";
import type { Row } from "../../src/train/data.ts";
import { testGpu } from "../harness.ts";

const DIRECTORY = diskDirectory("test/golden/llama-default");
const CONFIG = { r: 2, alpha: 4, targetModules: "all-linear" };
const rows = [11, 21, 14].map((n): Row => {
  const inputIds = Array.from({ length: n }, (_, t) => (7 * t + n) % 60);
  return { inputIds, labels: inputIds };
});

type Work = (model: CausalModel) => Promise<unknown> | unknown;

/** Bytes beyond the model, at most. */
async function peakOf(gpu: Gpu, model: CausalModel, run: Work): Promise<number> {
  const { bytesLive } = gpu.counters();
  gpu.resetCounters();
  await run(model);
  return gpu.counters().bytesPeak - bytesLive;
}

test.each<[what: string, run: Work, plan: Work]>([
  ["EVA", (model) => attachEva(model, CONFIG, batchesOf(model)), (model) => planEva(model, CONFIG, batchesOf(model))],
  [
    "LoRA-GA",
    (model) => initLoraGa(attachLora(model, CONFIG), batchesOf(model)),
    (model) => planLoraGa(attachLora(model, CONFIG), batchesOf(model)),
  ],
  [
    "a sample",
    async (model) => {
      for await (const _ of generate(model, { promptIds: rows[1]?.inputIds ?? [], maxTokens: 9 }));
    },
    (model) => planGeneration(model, 21, 9),
  ],
])("the memory of %s is what its plan says", async (_, run, plan) => {
  const gpu = await testGpu();
  const dry = dryGpu(gpu);
  const [model, unfilled] = [await loadModel(gpu, DIRECTORY), await emptyModel(dry, DIRECTORY)];
  const [took, planned] = [await peakOf(gpu, model, run), await peakOf(dry, unfilled, plan)];
  expect(took).toBeGreaterThan(0);
  expect(planned).toBe(took);
  model.destroy();
});

const batchesOf = (model: CausalModel) => calibrationBatches(model, rows, { batchSize: 2, batches: 2 });
