/** Models whose linear layers are kept packed: they compute what the same values in f32 compute. */
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { decodeFloats } from "../../src/io/dtype.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { initLora } from "../../src/lora/init.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { emptyModel, loadModel } from "../../src/models/load.ts";
import { saveModel } from "../../src/models/save.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { isPacked, type PackedMatrix, tensorsIn } from "../../src/tensor/packed.ts";
import { read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss } from "../../src/train/loss.ts";
import { planTraining } from "../../src/train/plan.ts";
import { TrainingStep } from "../../src/train/step.ts";
import { expectClose, testGpu } from "../harness.ts";

const folder = (name: string): string => `test/golden/${name}`;
const rowsOf = (name: string) => {
  const { input_ids: ids, labels } = JSON.parse(readFileSync(`${folder(name)}/expected.json`, "utf8")) as {
    input_ids: number[][];
    labels: number[][];
  };
  return collate(
    ids.map((inputIds, i) => ({ inputIds, labels: labels[i] ?? [] })),
    0,
  );
};

async function logitsOf(model: CausalModel, name: string): Promise<Float32Array> {
  const { ids, B, T } = rowsOf(name);
  const logits = model.gpu.scope(() => model.logits(tensor(model.gpu, ids, [B, T])));
  const values = Float32Array.from(await read(logits));
  model.gpu.release(logits);
  return values;
}

/** The f32 model with what the packed weights of another hold. */
async function widened(name: string, packed: CausalModel): Promise<CausalModel> {
  const wide = await loadModel(packed.gpu, diskDirectory(folder(name)));
  for (const [module, layer] of wide.linears) {
    const { weight } = packed.linears.get(module) ?? expect.fail(module);
    if (!isPacked(weight)) continue;
    layer.weight.gpu.release(...tensorsIn(layer.weight));
    layer.weight = unpackMatrix(weight);
  }
  return wide;
}

/** A and B that are not zero, the same for each adapter of such sizes. */
function fill({ pairs }: LoraAdapter): void {
  for (const { A, B } of pairs.values())
    for (const t of [A, B])
      t.gpu.write(
        t,
        Float32Array.from({ length: t.size }, (_, i) => 0.1 * Math.sin(i + t.size)),
      );
}

async function gradientsOf(model: CausalModel, adapter: LoraAdapter, name: string) {
  const { gpu } = model;
  const batch = rowsOf(name);
  const { loss, grads } = gpu.scope(() => {
    const l = batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens);
    return { loss: l, grads: backward(l) };
  });
  const values = [];
  for (const p of adapter.parameters)
    values.push(Float32Array.from(await read(grads.get(p) ?? expect.fail("a gradient"))));
  const [value = Number.NaN] = await read(loss);
  gpu.release(loss, ...grads.values());
  return { loss: value, values };
}

describe.each([
  ["models/qwen2", "nf4", false],
  ["models/gemma2", "int8", false],
  ["models/gpt2", "nf4", false],
  ["models/phi3", "nf4", true],
  ["llama-bias", "stored", false],
  ["llama-sharded", "stored", true],
] as const)("%s kept as %s, DoRA %s", (name, weights, useDora) => {
  test("logits and the gradients of an adapter are those of the widened weights", async () => {
    const gpu = await testGpu();
    const packed = await loadModel(gpu, diskDirectory(folder(name)), { weights });
    expect(packed.packed.size).toBe(packed.linears.size);
    const wide = await widened(name, packed);
    const config = { r: 4, alpha: 8, targetModules: "all-linear", useDora };
    const [ofPacked, ofWide] = [attachLora(packed, config), attachLora(wide, config)];
    expectClose(await logitsOf(packed, name), await logitsOf(wide, name), 1e-4, "logits");
    fill(ofPacked);
    fill(ofWide);
    const [got, want] = [await gradientsOf(packed, ofPacked, name), await gradientsOf(wide, ofWide, name)];
    expectClose([got.loss], [want.loss], 1e-5, "loss");
    for (const [i, values] of got.values.entries()) expectClose(values, want.values[i] ?? [], 2e-4, `gradient ${i}`);

    const before = await logitsOf(packed, name);
    ofPacked.merge();
    expect(packed.packed.size).toBe(0);
    expectClose(await logitsOf(packed, name), before, 2e-4, "merged");
    ofPacked.unmerge();
    expect(packed.packed.size).toBe(packed.linears.size);
    expect(await logitsOf(packed, name)).toEqual(before);
    ofPacked.detach();
    ofWide.detach();
    packed.destroy();
    wide.destroy();
  });

  test("a run takes the memory that its plan says, and packed weights take their bits", async () => {
    const gpu = await testGpu();
    const before = gpu.counters().bytesLive;
    gpu.resetCounters();
    const model = await loadModel(gpu, diskDirectory(folder(name)), { weights });
    const batch = rowsOf(name);
    const adapter = attachLora(model, { r: 4, alpha: 8, targetModules: "all-linear", useDora });
    gpu.resetCounters();
    const step = new TrainingStep({ model, parameters: adapter.parameters });
    step.run([batch], 0.001);
    await step.read();
    const peak = gpu.counters().bytesPeak - before;
    const plan = await planTraining(
      gpu,
      async (dry) => {
        const empty = await emptyModel(dry, diskDirectory(folder(name)), { weights });
        const attached = attachLora(empty, { r: 4, alpha: 8, targetModules: "all-linear", useDora });
        return { model: empty, parameters: attached.parameters };
      },
      { batchSize: batch.B, maxLength: batch.T },
    );
    expect(Math.abs(peak / plan.peak - 1)).toBeLessThan(0.05);
    for (const w of model.packed.values()) {
      const size = w.shape[0] * w.shape[1];
      const scales = size / w.group;
      const nf4 = size / 2 + 4 * (257 + 65 * Math.ceil(scales / 256)); // 4 bits a weight, and the scales in 8 bits with their table
      expect(bytesOf(w)).toBe({ nf4, int8: size + 4 * scales, stored: 2 * size }[weights]);
    }
    step.destroy();
    adapter.detach();
    model.destroy();
  });
});

const bytesOf = (w: PackedMatrix): number => tensorsIn(w).reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);

test("weights stored in 16 bits give transformers' logits as they are", async () => {
  const gpu = await testGpu();
  for (const name of ["llama-bias", "llama-sharded"]) {
    const path = `${folder(name)}/expected.safetensors`;
    const golden = decodeFloats("F32", await (await openSafetensors(await fileSource(path), path)).read("base.logits"));
    const model = await loadModel(gpu, diskDirectory(folder(name)), { weights: "stored" });
    expectClose(await logitsOf(model, name), golden, 1e-4, name);
    model.destroy();
  }
});

test("what packed weights cannot do is refused", async () => {
  const gpu = await testGpu();
  const directory = diskDirectory(folder("models/qwen2"));
  const eight = await loadModel(gpu, directory, { weights: "int8" });
  await expect(saveModel(eight, directory)).rejects.toThrow(
    new ShapeError(
      "saveModel: weights must be f32 or nf4, got model.layers.0.self_attn.q_proj.weight packed as int8. Load the model as f32",
    ),
  );
  eight.destroy();
  const model = await loadModel(gpu, directory, { weights: "nf4" });
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  await expect(initLora(adapter, "pissa")).rejects.toThrow(
    new ShapeError("pissa: a part of the base is taken from f32 weights, got nf4. Load the model as f32"),
  );
  const { A, B } = adapter.pairs.get("model.layers.0.self_attn.q_proj") ?? expect.fail("a pair");
  const values = { A: new Float32Array(A.size), B: new Float32Array(B.size) };
  expect(() => adapter.start(new Map([["model.layers.0.self_attn.q_proj", values]]), true)).toThrow(
    new ShapeError("start: a part of the base is taken from f32 weights, got nf4. Load it as f32"),
  );
  const weight = model.linears.get("model.layers.0.self_attn.q_proj")?.weight as PackedMatrix | Tensor;
  expect(isPacked(weight)).toBe(true);
  adapter.detach();
  model.destroy();
});
