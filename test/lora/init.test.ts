/** Where adapters start from. What PEFT makes of the same starts comes from scripts/golden/adapters.py. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { type Directory, memoryDirectory } from "../../src/io/bytes.ts";
import { decodeFloats } from "../../src/io/dtype.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { initLora, type LoraInit } from "../../src/lora/init.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { read, tensor } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { TrainingStep } from "../../src/train/step.ts";
import { expectClose, testGpu } from "../harness.ts";

const BASE = diskDirectory("test/golden/models/qwen2");
const json = <T>(path: string): T => JSON.parse(readFileSync(`test/golden/${path}`, "utf8")) as T;
const { input_ids: IDS, labels: LABELS } = json<{ input_ids: number[][]; labels: number[][] }>(
  "models/qwen2/expected.json",
);
const BATCH = collate(
  IDS.map((inputIds, i) => ({ inputIds, labels: LABELS[i] ?? [] })),
  0,
);
const ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const CONFIG = { r: 4, alpha: 6, targetModules: ALL };

async function logitsOf(model: CausalModel): Promise<Float32Array> {
  const { gpu } = model;
  const logits = gpu.scope(() =>
    model.logits(tensor(gpu, Int32Array.from(IDS.flat()), [IDS.length, IDS[0]?.length ?? 0])),
  );
  const values = await read(logits);
  gpu.release(logits);
  return Float32Array.from(values);
}

async function saved(adapter: LoraAdapter): Promise<Directory> {
  const files = savePeft(adapter, "qwen2");
  const parts: Uint8Array[] = [];
  for await (const part of files["adapter_model.safetensors"]) parts.push(part);
  return memoryDirectory("saved", { ...files, "adapter_model.safetensors": Buffer.concat(parts) });
}

const started = async (init: LoraInit, config: LoraConfig = CONFIG) => {
  const model = await loadModel(await testGpu(), BASE);
  const before = await logitsOf(model);
  const adapter = attachLora(model, config, 7);
  await initLora(adapter, init, 7);
  return { model, adapter, before };
};

describe.each([
  ["pissa", {}],
  ["olora", { rankPattern: { q_proj: 2 } }],
  ["pissa-rslora", { useRslora: true }],
] as const)("%s", (name, more) => {
  const init = name === "olora" ? "olora" : "pissa";

  test("five steps equal PEFT's, and what is saved for the base as it was gives the same logits", async () => {
    const { model, adapter, before } = await started(init, { ...CONFIG, ...more });
    const { gpu } = model;
    const expected = json<{ steps: { lr: number; losses: number[] } }>(`adapters/${name}/expected.json`);
    const path = `test/golden/adapters/${name}/expected.safetensors`;
    const final = decodeFloats("F32", await (await openSafetensors(await fileSource(path), path)).read("final.logits"));
    expectClose(await logitsOf(model), before, 1e-4, "unchanged at first");
    const step = new TrainingStep({ model, parameters: adapter.parameters });
    for (const _ of expected.steps.losses) step.run([BATCH], expected.steps.lr);
    const losses = (await step.read()).map(({ loss }) => loss);
    expectClose(losses, expected.steps.losses, 5e-4, "losses");
    step.destroy();
    const after = await logitsOf(model);
    expectClose(after, final, 2e-3, "logits after the steps");

    const directory = await saved(adapter);
    const config = JSON.parse(readFileSync(`test/golden/adapters/${name}/adapter/adapter_config.json`, "utf8"));
    const file = (await directory.open("adapter_config.json")) ?? expect.fail("a file");
    const own = JSON.parse(new TextDecoder().decode(await file.read(0, file.sizeBytes)));
    for (const key of ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"])
      expect(own[key], key).toEqual(config[key]);
    adapter.merge();
    expectClose(await logitsOf(model), after, 1e-4, "merged");
    adapter.unmerge();
    adapter.disable();
    expect(await logitsOf(model), "disabled: the base to the bit").toEqual(before);
    adapter.detach();
    for (const place of [directory, diskDirectory(`test/golden/adapters/${name}/adapter`)]) {
      const again = await loadPeft(model, place);
      expectClose(await logitsOf(model), place === directory ? after : final, 2e-4, place.name);
      again.detach();
    }
    const live = gpu.counters().bytesLive;
    model.destroy();
    expect(gpu.counters().bytesLive).toBeLessThan(live);
  });
});

test("PiSSA by power iterations comes near PiSSA", async () => {
  const { model, adapter, before } = await started("pissa_niter_60");
  const exact = await started("pissa");
  expectClose(await logitsOf(model), before, 1e-4, "unchanged");
  for (const [name, { residual }] of adapter.beginnings) {
    const want = exact.adapter.beginnings.get(name)?.residual ?? expect.fail(name);
    expectClose(await read(residual), await read(want), 1e-3, name);
  }
  for (const { adapter: one, model: of } of [{ adapter, model }, exact]) {
    one.detach();
    of.destroy();
  }
});

test("gaussian: A is normal with deviation 1/r, B zero; orthogonal: neither is zero, their product is", async () => {
  const { model, adapter, before } = await started("gaussian", { ...CONFIG, r: 8 });
  const { A, B } = adapter.pairs.get("model.layers.0.mlp.down_proj") ?? expect.fail("a pair");
  const values = await read(A);
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  const deviation = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
  expect(Math.abs(mean)).toBeLessThan(0.03);
  expect(deviation).toBeGreaterThan(0.1);
  expect(deviation).toBeLessThan(0.15);
  expect((await read(B)).every((v) => v === 0)).toBe(true);
  adapter.detach();
  const other = attachLora(model, { ...CONFIG, r: 8 });
  await initLora(other, "orthogonal", 3);
  const pair = other.pairs.get("model.layers.0.mlp.down_proj") ?? expect.fail("a pair");
  expect((await read(pair.A)).every((v) => v !== 0)).toBe(true);
  expect((await read(pair.B)).every((v) => v !== 0)).toBe(true);
  expectClose(await logitsOf(model), before, 1e-5, "unchanged");
  other.detach();
  model.destroy();
});

test("a DoRA adapter can begin with a part of the base, too", async () => {
  const { model, adapter, before } = await started("olora", { ...CONFIG, useDora: true });
  expectClose(await logitsOf(model), before, 2e-4, "unchanged at first");
  const again = await saved(adapter);
  const step = new TrainingStep({ model, parameters: adapter.parameters });
  step.run([BATCH], 0.01);
  await step.read();
  step.destroy();
  const [after, trained] = [await logitsOf(model), await saved(adapter)];
  adapter.detach();
  for (const [place, want] of [
    [trained, after],
    [again, before],
  ] as const) {
    const loaded = await loadPeft(model, place);
    expectClose(await logitsOf(model), want, 5e-4, "saved and loaded");
    loaded.detach();
  }
  model.destroy();
});

test("starts that cannot be are refused", async () => {
  const { model, adapter } = await started("pissa");
  await expect(initLora(adapter, "gaussian")).rejects.toThrow(
    new ShapeError("start: an adapter starts once, at its own scale, got one that did. Attach a fresh one"),
  );
  adapter.detach();
  const wide = attachLora(model, { ...CONFIG, r: 20, targetModules: ["k_proj"] });
  await expect(initLora(wide, "olora")).rejects.toThrow(
    new ShapeError("olora: r must be at most 16, the rank of model.layers.0.self_attn.k_proj, got 20"),
  );
  wide.detach();
  const odd = attachLora(model, { ...CONFIG, r: 3 });
  await expect(initLora(odd, "orthogonal")).rejects.toThrow(new ShapeError("orthogonal: r must be even, got 3"));
  await expect(initLora(odd, "best" as LoraInit)).rejects.toThrow(
    new ShapeError(
      'init: must be gaussian, orthogonal, pissa, pissa_niter_N or olora, got "best". Leave it out for PEFT\'s usual start',
    ),
  );
  odd.detach();
  model.destroy();
});
