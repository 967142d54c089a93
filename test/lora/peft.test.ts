import { describe, expect, test } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { type Directory, memoryDirectory, memorySource } from "../../src/io/bytes.ts";
import { encodeFloats } from "../../src/io/dtype.ts";
import { FormatError } from "../../src/io/errors.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { HasLinears } from "../../src/lora/parts.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";

const Q = "model.layers.0.self_attn.q_proj";
const UP = "model.layers.0.mlp.up_proj";
const key = (module: string, part: "A" | "B"): string => `base_model.model.${module}.lora_${part}.weight`;

/** q_proj [4,4] and up_proj [6,4], zeros. */
function tinyModel(gpu: Gpu): HasLinears {
  const linear = (N: number) => ({ weight: tensor(gpu, new Float32Array(N * 4), [N, 4]) });
  return {
    linears: new Map([
      [Q, linear(4)],
      [UP, linear(6)],
    ]),
  };
}

async function bytesOf(content: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const pieces: Uint8Array[] = [];
  for await (const piece of content) pieces.push(piece);
  return new Uint8Array(await new Blob(pieces as Uint8Array<ArrayBuffer>[]).arrayBuffer());
}

/** An adapter directory with these tensors (zeros), and this config over a good one. */
async function adapterDirectory(
  shapes: Record<string, number[]>,
  config: Record<string, unknown> = {},
): Promise<Directory> {
  const tensors = Object.entries(shapes).map(([name, shape]) => {
    const bytes = encodeFloats("F32", new Float32Array(shape.reduce((a, b) => a * b, 1)));
    return { name, dtype: "F32" as const, shape, sizeBytes: bytes.byteLength, data: async () => bytes };
  });
  const json = { peft_type: "LORA", r: 2, lora_alpha: 4, target_modules: ["q_proj", "up_proj"], ...config };
  return memoryDirectory("a", {
    "adapter_config.json": JSON.stringify(json),
    "adapter_model.safetensors": await bytesOf(encodeSafetensors(tensors)),
  });
}

const GOOD = { [key(Q, "A")]: [2, 4], [key(Q, "B")]: [4, 2], [key(UP, "A")]: [2, 4], [key(UP, "B")]: [6, 2] };

test("what savePeft writes, loadPeft reads: same tensors, same settings", async () => {
  const gpu = await testGpu();
  const model = tinyModel(gpu);
  const adapter = attachLora(model, { r: 2, alpha: 3, targetModules: "all-linear", useRslora: true }, 4);
  const values = await readAll(adapter.parameters);
  const files = savePeft(adapter, "base");
  const bytes = await bytesOf(files["adapter_model.safetensors"]);
  adapter.detach();
  const file = await openSafetensors(memorySource(bytes), "adapter_model.safetensors");
  expect([...file.tensors.keys()].sort()).toEqual(Object.keys(GOOD).sort());
  expect(file.metadata.get("format")).toBe("pt");
  const config = JSON.parse(files["adapter_config.json"]) as Record<string, unknown>;
  expect(config).toMatchObject({
    peft_type: "LORA",
    r: 2,
    lora_alpha: 3,
    target_modules: ["q_proj", "up_proj"],
    use_rslora: true,
    rank_pattern: {},
    alpha_pattern: {},
    base_model_name_or_path: "base",
  });
  const directory = memoryDirectory("a", { ...files, "adapter_model.safetensors": bytes });
  const again = await loadPeft(model, directory);
  expect(await readAll(again.parameters)).toEqual(values);
  expect(again.scale).toBeCloseTo(3 / Math.sqrt(2), 12);
  again.detach();
});

describe("an adapter that does not fit is refused by name", () => {
  const file = "a/adapter_model.safetensors";
  const asked = "the tensors must be those that adapter_config.json and the model ask for";
  const { [key(Q, "A")]: _, ...missing } = GOOD;
  const cases: [string, Record<string, number[]>, Record<string, unknown>, string][] = [
    ["a missing tensor", missing, {}, `${file}: ${asked}, got missing ${key(Q, "A")}. Is it an adapter of this model?`],
    [
      "an extra tensor",
      { ...GOOD, extra: [1] },
      {},
      `${file}: ${asked}, got unknown extra. Is it an adapter of this model?`,
    ],
    [
      "a misnamed tensor",
      { ...missing, [`${Q}.lora_A.weight`]: [2, 4] },
      {},
      `${file}: ${asked}, got missing ${key(Q, "A")}; unknown ${Q}.lora_A.weight. Is it an adapter of this model?`,
    ],
    [
      "a tensor of another shape",
      { ...GOOD, [key(UP, "B")]: [5, 2] },
      {},
      `${file}: tensor "${key(UP, "B")}" must be [6,2], got [5,2]`,
    ],
    ["another rank than its config says", GOOD, { r: 3 }, `${file}: tensor "${key(Q, "A")}" must be [3,4], got [2,4]`],
    [
      "a module the model has not",
      GOOD,
      { target_modules: ["c_attn"] },
      'a/adapter_config.json: the adapter does not fit this model: target modules: "c_attn" must match a module, got none. The model has q_proj, up_proj',
    ],
    [
      "modules the model has not",
      GOOD,
      { target_modules: ["c_attn", "c_proj"] },
      'a/adapter_config.json: the adapter does not fit this model: target modules: "c_attn,c_proj" must match a module, got none. The model has q_proj, up_proj',
    ],
    [
      "targets that are all trained whole",
      GOOD,
      { modules_to_save: ["q_proj", "up_proj"] },
      "a/adapter_config.json: the adapter does not fit this model: lora: exclude_modules, modules_to_save and layers_to_transform must leave a target, got none of 2. The first is model.layers.0.self_attn.q_proj",
    ],
    ["another method", GOOD, { peft_type: "IA3" }, 'a/adapter_config.json: "peft_type" must be "LORA", got "IA3"'],
    [
      "DoRA without magnitudes",
      GOOD,
      { use_dora: true },
      "a/adapter_model.safetensors: the tensors must be those that adapter_config.json and the model ask for, got missing base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector, base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector. Is it an adapter of this model?",
    ],
    [
      "a rank that is not the tensors'",
      GOOD,
      { rank_pattern: { q_proj: 4 } },
      'a/adapter_model.safetensors: tensor "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" must be [4,4], got [2,4]',
    ],
    [
      "a rank of 0 by a pattern",
      GOOD,
      { rank_pattern: { q_proj: 0 } },
      'a/adapter_config.json: lora: rank_pattern of "q_proj" must be a whole number of at least 1, got 0',
    ],
    [
      "layers with a regular expression",
      GOOD,
      { target_modules: ".*_proj", layers_to_transform: [0] },
      'a/adapter_config.json: lora: layers_to_transform needs target modules as a list, got ".*_proj". Say in the expression which layers',
    ],
    [
      "layers that do not exist",
      GOOD,
      { layers_to_transform: 7 },
      "a/adapter_config.json: the adapter does not fit this model: lora: exclude_modules, modules_to_save and layers_to_transform must leave a target, got none of 2. The first is model.layers.0.self_attn.q_proj",
    ],
    [
      "biases of some modules",
      GOOD,
      { bias: "some" },
      'a/adapter_config.json: "bias" must be "none", "lora_only" or "all", got "some"',
    ],
    [
      "a flag that is none",
      GOOD,
      { use_dora: "yes" },
      'a/adapter_config.json: "use_dora" must be true or false, got "yes"',
    ],
    [
      "patterns that are no numbers",
      GOOD,
      { alpha_pattern: { q_proj: "8" } },
      'a/adapter_config.json: "alpha_pattern" must be an object of numbers, got {"q_proj":"8"}',
    ],
    [
      "an initialisation that changed the base",
      GOOD,
      { init_lora_weights: "pissa" },
      'a/adapter_config.json: "init_lora_weights" must be true, false, gaussian, orthogonal or eva: others change the base weights. Convert the adapter with PEFT\'s path_initial_model_for_weight_conversion, got "pissa"',
    ],
    ["a rank of 0", GOOD, { r: 0 }, 'a/adapter_config.json: "r" must be a number above 0, got 0'],
  ];
  test.each(cases)("%s", async (_name, tensors, config, message) => {
    const gpu = await testGpu();
    const before = gpu.counters().buffersLive;
    const model = tinyModel(gpu);
    await expect(loadPeft(model, await adapterDirectory(tensors, config))).rejects.toThrow(new FormatError(message));
    gpu.release(...[...model.linears.values()].map(({ weight }) => weight as Tensor));
    expect(gpu.counters().buffersLive, "nothing stays behind").toBe(before);
  });

  test("a directory without a config", async () => {
    const gpu = await testGpu();
    await expect(loadPeft(tinyModel(gpu), memoryDirectory("a", {}))).rejects.toThrow(
      new FormatError("a/adapter_config.json: an adapter directory must have it, got no such file. Check the path"),
    );
  });
});

test("targets that the model lacks are passed over, as PEFT does, with a warning", async () => {
  const gpu = await testGpu();
  const model = tinyModel(gpu);
  const target_modules = ["k_proj", "q_proj", "up_proj", "gate_proj"];
  const warnings: string[] = [];
  const onWarning = (text: string): void => void warnings.push(text);
  const adapter = await loadPeft(model, await adapterDirectory(GOOD, { target_modules }), { onWarning });
  expect([...adapter.pairs.keys()]).toEqual([Q, UP]);
  expect(warnings).toEqual(["adapter_config.json has target_modules that the model lacks: k_proj, gate_proj"]);
  const saved = savePeft(adapter, "base");
  expect(JSON.parse(saved["adapter_config.json"]).target_modules).toEqual(["q_proj", "up_proj"]);
  adapter.detach();
  const settings = { r: 2, alpha: 4, targetModules: target_modules };
  expect(() => attachLora(model, settings), "a user's own settings").toThrow(
    new ShapeError('target modules: "k_proj" must match a module, got none. The model has q_proj, up_proj'),
  );
});

test("keys PEFT adds later, and PEFT's own unused ones, do not matter", async () => {
  const gpu = await testGpu();
  const config = {
    some_new_key: 1,
    loftq_config: {},
    megatron_core: "megatron.core",
    alpha_pattern: {},
    rank_pattern: {},
    use_dora: false,
  };
  const adapter = await loadPeft(tinyModel(gpu), await adapterDirectory(GOOD, config));
  expect(adapter.pairs.size).toBe(2);
  expect(adapter.scale).toBe(2);
  adapter.detach();
});
