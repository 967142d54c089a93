// What takes long can be given up: the reason is thrown, the model is as before and no memory stays behind.
import { afterAll, beforeAll, beforeEach, expect, test } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import type { ByteSource, Directory } from "../../src/io/bytes.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { initLora } from "../../src/lora/init.ts";
import { attachEva } from "../../src/lora/init-eva.ts";
import { initLoftq } from "../../src/lora/init-loftq.ts";
import { initLoraGa } from "../../src/lora/init-lora-ga.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel, openLinears } from "../../src/models/load.ts";
import { readAll } from "../../src/tensor/tensor.ts";
import { calibrationBatches } from "../../src/train/calibration.ts";
import { type Classifier, classifierLogits, evaluateClassifier } from "../../src/train/classify.ts";
import type { Row } from "../../src/train/data.ts";
import { classifierCurvature, predictClasses } from "../../src/train/laplace-classify.ts";
import { languageCurvature, predictTokens } from "../../src/train/laplace-language.ts";
import { evaluate } from "../../src/train/loss.ts";
import { evaluatePreferences, withReference } from "../../src/train/preference.ts";
import { testGpu } from "../harness.ts";

const DIRECTORY = diskDirectory("test/golden/llama-default");
const CONFIG = { r: 2, alpha: 4, targetModules: "all-linear" };
const row = (...inputIds: number[]): Row => ({ inputIds, labels: inputIds });
const rows = [row(1, 2, 3, 4, 5, 6), row(5, 6, 7, 8, 9, 10), row(11, 12, 13, 4)];
const pairs = [{ chosen: row(1, 2, 3), rejected: row(1, 2, 4) }];
const REASON = new Error("enough");
const aborted = AbortSignal.abort(REASON);
let gpu: Gpu;
let model: CausalModel;

beforeAll(async () => {
  gpu = await testGpu();
});
beforeEach(async () => {
  model = await loadModel(gpu, DIRECTORY);
});
afterAll(() => model.destroy());

async function givesUp(run: () => Promise<unknown>): Promise<void> {
  const { bytesLive } = gpu.counters();
  await expect(run()).rejects.toBe(REASON);
  expect(gpu.counters().bytesLive).toBe(bytesLive);
}

test("loading, in the midst of the weights", async () => {
  const later = new AbortController();
  let opened = 0;
  const slow: Directory = {
    name: DIRECTORY.name,
    async open(file) {
      const source = await DIRECTORY.open(file);
      if (!source || !file.endsWith(".safetensors")) return source;
      const read: ByteSource["read"] = (offset, length) => {
        if (++opened === 6) later.abort(REASON);
        return source.read(offset, length);
      };
      return { sizeBytes: source.sizeBytes, read };
    },
  };
  await givesUp(() => loadModel(gpu, slow, { signal: later.signal }));
  expect(opened).toBe(6);
  model.destroy();
});

test("evaluations", async () => {
  const adapter = attachLora(model, CONFIG);
  await givesUp(() => evaluate(model, rows, 1, { signal: aborted }));
  await givesUp(() => withReference(model, adapter, pairs, 1, aborted));
  expect(adapter.state).toBe("enabled");
  const referenced = await withReference(model, adapter, pairs, 1);
  await givesUp(() => evaluatePreferences(model, referenced, 1, 0.1, aborted));
  model.destroy();
});

test("Laplace's approximation of a language model, its parameters as before", async () => {
  const { parameters } = attachLora(model, CONFIG);
  await givesUp(() => languageCurvature(model, parameters, rows, { signal: aborted }));
  const curvature = await languageCurvature(model, parameters, rows, { rank: 2 });
  const before = await readAll(parameters);
  await givesUp(() => predictTokens(model, curvature, 1, rows, { signal: aborted }));
  expect(await readAll(parameters)).toEqual(before);
  curvature.destroy();
  model.destroy();
});

test("starts by the base and by the data, nothing attached or begun", async () => {
  const batches = calibrationBatches(model, rows, { batchSize: 3, batches: 1 });
  await givesUp(() => attachEva(model, CONFIG, batches, { signal: aborted }));
  expect([...model.linears.values()].some(({ adapters }) => adapters)).toBe(false);
  const adapter = attachLora(model, CONFIG, 5);
  const before = await readAll(adapter.parameters);
  await givesUp(() => initLora(adapter, "pissa", 0, aborted));
  await givesUp(() => initLoraGa(adapter, batches, { signal: aborted }));
  expect(adapter.state).toBe("enabled");
  expect(adapter.beginnings.size).toBe(0);
  expect(await readAll(adapter.parameters)).toEqual(before);
  model.destroy();
  for (const batch of batches) batch.destroy();

  const packed = await loadModel(gpu, DIRECTORY, { weights: "int8" });
  const onPacked = attachLora(packed, CONFIG);
  const linears = await openLinears(DIRECTORY);
  const later = new AbortController();
  const first = async (module: string): Promise<Float32Array> => {
    later.abort(REASON); // while the first module is at work
    return linears(module);
  };
  await givesUp(() => initLoftq(onPacked, first, { iterations: 2, signal: later.signal }));
  packed.destroy();
});

test("classifiers", async () => {
  const limits = { vocabSize: 64, tokenTypes: 1, padId: 0, labels: ["a", "b"] };
  const classifier: Classifier = { gpu, config: limits, logits: () => expect.fail("nothing is to be computed") };
  const classRows = [{ inputIds: [1, 2], label: 0 }];
  const { parameters } = attachLora(model, CONFIG);
  await givesUp(() => classifierLogits(classifier, classRows, 1, aborted));
  await givesUp(() => evaluateClassifier(classifier, classRows, 1, aborted));
  await givesUp(() => classifierCurvature(classifier, parameters, classRows, { signal: aborted }));
  const curvature = await languageCurvature(model, parameters, rows, { rank: 2 });
  await givesUp(() => predictClasses(classifier, curvature, 1, classRows, { signal: aborted }));
  curvature.destroy();
});
