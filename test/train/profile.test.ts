import { expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { readAll } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { byKernel, chromeTrace, type ProfiledDispatch, profileTable } from "../../src/train/profile.ts";
import { profilePage } from "../../src/train/profile-page.ts";
import { TrainingStep } from "../../src/train/step.ts";
import { testGpu } from "../harness.ts";

const ids = [5, 9, 2, 33, 7, 1, 40, 12];
const batch = collate([{ inputIds: ids, labels: ids }], 0);

async function steps(profiles: boolean): Promise<{ values: Float32Array[]; found: ProfiledDispatch[] }> {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 4, alpha: 8, targetModules: "all-linear" }, 3);
  const step = new TrainingStep({ model, parameters: adapter.parameters });
  step.run([batch], 1e-2);
  const found = profiles ? await step.profile([batch], 1e-2) : [];
  if (!profiles) step.run([batch], 1e-2);
  const values = await readAll(adapter.parameters);
  step.destroy();
  adapter.detach();
  model.destroy();
  return { values, found };
}

test("a profiled step is a step like any other, with every dispatch in it", async () => {
  const { values, found } = await steps(true);
  expect(values).toEqual((await steps(false)).values);
  const kernels = byKernel(found);
  expect(kernels.reduce((sum, { dispatches }) => sum + dispatches, 0)).toBe(found.length);
  expect(kernels.find(({ kernel }) => kernel === "attention")?.flops).toBe(2 * 4 * 48 * (8 * 4.5)); // layers · 4 · H·D · pairs
  expect(found.every(({ bytes }) => bytes > 0)).toBe(true);
});

const DISPATCHES: ProfiledDispatch[] = [
  { kernel: "copy", timeMs: 1, flops: 0, bytes: 4e6 },
  { kernel: "matmul", timeMs: 2, flops: 8e6, bytes: 1e6 },
  { kernel: "matmul", timeMs: 1, flops: 4e6, bytes: 1e6 },
];

test("the table sums by kernel, the longest first", () => {
  expect(profileTable(byKernel(DISPATCHES))).toBe(
    [
      "kernel  dispatches     ms   share  GFLOP    MB  GFLOP/s  GB/s",
      "matmul           2  3.000  75.0 %  0.012  2.00     4.00  0.67",
      "copy             1  1.000  25.0 %  0.000  4.00     0.00  4.00",
    ].join("\n"),
  );
});

test("without a clock the table counts, and the page says so", () => {
  const counted = byKernel(DISPATCHES.map((one) => ({ ...one, timeMs: undefined })));
  expect(profileTable(counted).split("\n")[1]).toMatch(/^copy +1 +0\.000 +4\.00 *$/);
  expect(profilePage(counted, "a <b>")).toContain("This device has no clock for its dispatches");
  expect(profilePage(counted, "a <b>")).toContain("<h1>a &#60;b&#62;</h1>");
});

test("the trace lays dispatches end to end, the plot has a point for each kernel that computes", () => {
  const { traceEvents } = JSON.parse(chromeTrace(DISPATCHES)) as { traceEvents: { ts: number; dur: number }[] };
  expect(traceEvents.map(({ ts, dur }) => [ts, dur])).toEqual([
    [0, 1000],
    [1000, 2000],
    [3000, 1000],
  ]);
  const page = profilePage(byKernel(DISPATCHES), "step");
  expect(page.match(/<circle/g)).toHaveLength(1);
  expect(page).not.toContain("NaN");
});

test("an eager step has no profile", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 4, alpha: 8, targetModules: ["q_proj"] });
  const step = new TrainingStep({ model, parameters: adapter.parameters, eager: true });
  await expect(step.profile([batch], 0)).rejects.toThrow(
    new ShapeError("TrainingStep: a profile is made of a replayed step, got an eager one"),
  );
  step.destroy();
  adapter.detach();
  model.destroy();
});
