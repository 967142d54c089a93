import { expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { readAll } from "../../src/tensor/tensor.ts";
import { findLearningRate } from "../../src/train/find-learning-rate.ts";
import { testGpu } from "../harness.ts";

test("a sweep ends where the loss runs away, suggests a rate at which it fell, and leaves the adapter as it was", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["down_proj"] }, 5);
  const inputIds = [1, 2, 3, 4, 5, 6];
  const options = { model, parameters: adapter.parameters, rows: [{ inputIds, labels: inputIds }], batchSize: 1 };
  const before = await readAll(adapter.parameters);
  const { points, suggestion } = await findLearningRate({ ...options, lowest: 1e-5, highest: 1e35, steps: 60 });
  expect(await readAll(adapter.parameters)).toEqual(before);
  const at = points.findIndex(({ learningRate }) => learningRate === suggestion);
  expect(points[at + 1]?.loss).toBeLessThan(points[at - 1]?.loss ?? Number.NaN);
  expect(points.length).toBeGreaterThan(10);
  expect(points.length).toBeLessThan(60);
  points.forEach(({ learningRate }, i) => {
    expect(Math.abs(learningRate / (1e-5 * 1e40 ** (i / 59)) - 1)).toBeLessThan(1e-12);
  });
  const none = await findLearningRate({ ...options, signal: AbortSignal.abort() });
  expect(none).toEqual({ points: [], suggestion: undefined });
  await expect(findLearningRate({ ...options, lowest: 1, highest: 0.5 })).rejects.toThrow(
    new ShapeError("findLearningRate: rates must rise from above 0 in at least 2 steps, got 1 to 0.5 in 100"),
  );
  adapter.detach();
  model.destroy();
});
