/** LoRA-FA. What PEFT's optimizer makes of the same comes from scripts/golden/inits.py. */
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loraFa } from "../../src/lora/lora-fa.ts";
import { loadModel } from "../../src/models/load.ts";
import { read } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import type { Row } from "../../src/train/data.ts";
import { TrainingStep } from "../../src/train/step.ts";
import { valuesOf } from "../golden/files.ts";
import { expectClose, testGpu } from "../harness.ts";

const PLACE = "test/golden/adapters/lora-fa";
const { rows, lr, losses } = JSON.parse(readFileSync(`${PLACE}/expected.json`, "utf8")) as {
  rows: Row[];
  lr: number;
  losses: number[];
};
const CONFIG = { r: 4, alpha: 6, targetModules: ["q_proj", "down_proj"] };

test.each([false, true])("four steps are those of PEFT's optimizer, A untouched (eager: %s)", async (eager) => {
  const model = await loadModel(await testGpu(), diskDirectory("test/golden/models/qwen2"));
  const { gpu } = model;
  const values = await valuesOf(`${PLACE}/expected.safetensors`);
  const adapter = attachLora(model, CONFIG);
  for (const [name, { A, B }] of adapter.pairs) {
    gpu.write(A, values.get(`${name}.A`) ?? expect.fail(name));
    gpu.write(B, values.get(`${name}.B`) ?? expect.fail(name));
  }
  const settings = await loraFa(adapter);
  const step = new TrainingStep({ model, adapter, eager, ...settings });
  for (const _ of losses) step.run([collate(rows, 0)], lr);
  const got = (await step.read()).map(({ loss }) => loss);
  expectClose(got, losses, 2e-4, "losses");
  for (const [name, { A, B }] of adapter.pairs) {
    expect(await read(A), name).toEqual(values.get(`${name}.A`));
    expectClose(await read(B), values.get(`${name}.final`) ?? [], 1e-5, name);
  }
  step.destroy();
  gpu.release(...settings.projections.values());
  adapter.detach();
  model.destroy();
});

test("A has no gradient and no state: fewer bytes and fewer dispatches than LoRA takes", async () => {
  const model = await loadModel(await testGpu(), diskDirectory("test/golden/models/qwen2"));
  const adapter = attachLora(model, CONFIG);
  const sizeOf = (of: readonly { readonly sizeBytes: number }[]): number => of.reduce((sum, t) => sum + t.sizeBytes, 0);
  const measure = (trained: typeof adapter.parameters): { bytes: number; gradients: number; dispatches: number } => {
    const step = new TrainingStep({ model, adapter, parameters: trained });
    step.run([collate(rows, 0)], lr);
    const [plan] = step.plans.values();
    const { sizeBytes, gradientBytes } = step.optimizer;
    step.destroy();
    return { bytes: sizeBytes, gradients: gradientBytes, dispatches: plan?.dispatches.length ?? 0 };
  };
  const full = measure(adapter.parameters);
  const { parameters, projections } = await loraFa(adapter);
  const pairs = [...adapter.pairs.values()];
  const frozen = measure([...parameters]);
  expect(full.gradients - frozen.gradients).toBe(sizeOf(pairs.map(({ A }) => A)));
  expect(full.bytes - frozen.bytes).toBe(2 * sizeOf(pairs.map(({ A }) => A)));
  expect(full.dispatches - frozen.dispatches, "dA of every layer").toBeGreaterThanOrEqual(pairs.length);
  model.gpu.release(...projections.values());
  adapter.detach();
  model.destroy();
});
