/** Models in NF4 as directories: what transformers and bitsandbytes save is loaded as it is, and written again. */
import { readFileSync } from "node:fs";
import { beforeAll, describe, expect, test } from "vitest";
import { type Directory, memoryDirectory, memorySource } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { encodeSafetensors, openSafetensors, type TensorToWrite } from "../../src/io/safetensors.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { readConfig } from "../../src/models/config.ts";
import { emptyModel, type LoadOptions, loadModel } from "../../src/models/load.ts";
import { type SaveOptions, saveModel } from "../../src/models/save.ts";
import { bitsPerWeight } from "../../src/models/weights.ts";
import { isPacked, type PackedMatrix, tensorsIn } from "../../src/tensor/packed.ts";
import { read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { loadTokenizer } from "../../src/tokenizer.ts";
import { readRows } from "../../src/train/data.ts";
import { train } from "../../src/train/trainer.ts";
import { expectClose, testGpu } from "../harness.ts";

const golden = (name: string): Directory => diskDirectory(`test/golden/${name}`);

async function logitsOf({ gpu, config }: CausalModel, model: CausalModel): Promise<Float32Array> {
  const ids = Int32Array.from({ length: 12 }, (_, i) => (7 * i + 3) % config.vocabSize);
  const logits = gpu.scope(() => model.logits(tensor(gpu, ids, [1, 12])));
  const values = Float32Array.from(await read(logits));
  gpu.release(logits);
  return values;
}

/** What `saveModel` gives, in memory. */
async function saved(model: CausalModel, source: Directory, options?: SaveOptions) {
  const { files, ...rest } = await saveModel(model, source, options);
  const contents: Record<string, Uint8Array> = {};
  for (const [file, pieces] of files) {
    const parts = [];
    for await (const piece of pieces) parts.push(Uint8Array.from(piece));
    contents[file] = new Uint8Array(Buffer.concat(parts));
  }
  return { contents, directory: memoryDirectory("saved", contents), ...rest };
}

const configOf = (contents: Record<string, Uint8Array>) =>
  JSON.parse(new TextDecoder().decode(contents["config.json"])) as Record<string, unknown>;

/** The very values of a weight. */
async function valuesOf(w: Tensor | PackedMatrix): Promise<Float32Array> {
  if (!isPacked(w)) return Float32Array.from(await read(w));
  const wide = unpackMatrix(w);
  const values = Float32Array.from(await read(wide));
  w.gpu.release(wide);
  return values;
}

function fill({ pairs }: LoraAdapter, size: number): void {
  for (const { A, B } of pairs.values())
    for (const t of [A, B])
      t.gpu.write(
        t,
        Float32Array.from({ length: t.size }, (_, i) => size * Math.sin(i + t.size)),
      );
}

describe.each([
  ["models/qwen2", true],
  ["models/gpt2", false],
  ["models/phi3", true],
  ["llama-bias", true],
] as const)("%s, its scales quantised: %s", (name, doubleQuant) => {
  test("a model quantised here is saved, loaded without being asked to, and saved again to the same bytes", async () => {
    const gpu = await testGpu();
    const source = golden(name);
    const model = await loadModel(gpu, source, { weights: "nf4", doubleQuant });
    const first = await saved(model, source);
    const { quantization_config: quantization, ...rest } = configOf(first.contents);
    expect(rest).toEqual(JSON.parse(readFileSync(`test/golden/${name}/config.json`, "utf8")));
    expect(quantization).toEqual({
      quant_method: "bitsandbytes",
      load_in_4bit: true,
      load_in_8bit: false,
      bnb_4bit_quant_type: "nf4",
      bnb_4bit_use_double_quant: doubleQuant,
      bnb_4bit_quant_storage: "uint8",
      bnb_4bit_compute_dtype: "float32",
    });
    for (const options of [{}, { weights: "stored" }] satisfies LoadOptions[]) {
      const again = await loadModel(gpu, first.directory, options);
      expect(again.packed.size).toBe(again.linears.size);
      expect(await logitsOf(again, again)).toEqual(await logitsOf(model, model));
      const second = await saved(again, first.directory);
      expect(second.dtypes).toEqual(first.dtypes);
      expect(second.requantizationError).toBeUndefined();
      expect(second.contents).toEqual(first.contents);
      expect(bitsPerWeight(await emptyModel(gpu, first.directory, options))).toEqual(bitsPerWeight(again));
      again.destroy();
    }
    model.destroy();
  });
});

test("config.json alone says what a plan takes; bits a weight count the scales", async () => {
  const gpu = await testGpu();
  const quantization_config = { load_in_4bit: true, bnb_4bit_quant_type: "nf4", bnb_4bit_use_double_quant: false };
  const config = JSON.parse(readFileSync("test/golden/models/qwen2/config.json", "utf8")) as object;
  const directory = memoryDirectory("q", { "config.json": JSON.stringify({ ...config, quantization_config }) });
  const model = await emptyModel(gpu, directory);
  const { linears, all } = bitsPerWeight(model);
  expect(linears).toBe(4.5);
  const sizes = [...model.weights.values(), ...model.packed.values()].map(({ shape }) => shape.reduce((a, b) => a * b));
  const packed = [...model.packed.values()].reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
  const size = sizes.reduce((a, b) => a + b);
  expect(all).toBeCloseTo((4.5 * packed + 32 * (size - packed)) / size, 10);
  model.destroy();
});

test("what is merged into NF4 is quantised again, or written in another type; the rest keeps its bits", async () => {
  const gpu = await testGpu();
  const source = golden("llama-bias");
  const base = await saved(await loadModel(gpu, source, { weights: "nf4" }), source);
  const model = await loadModel(gpu, base.directory);
  const before = await saved(model, base.directory);
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj", "down_proj"] });
  fill(adapter, 0.1);
  const wanted = await logitsOf(model, model);
  adapter.merge();
  const merged = await saved(model, base.directory);
  const wide = await saved(model, base.directory, { dtype: "F32" });

  expect(merged.requantizationError).toBeGreaterThan(0.01);
  expect(merged.requantizationError).toBeLessThan(0.15);
  expect(merged.dtypes).toEqual(before.dtypes);
  expect(configOf(merged.contents)).toEqual(configOf(base.contents));
  const again = await loadModel(gpu, merged.directory);
  let [changed, whole] = [0, 0];
  for (const [module, { weight }] of model.linears) {
    const found = again.linears.get(module)?.weight ?? expect.fail(module);
    expect(isPacked(found)).toBe(true);
    const values = await valuesOf(weight);
    if (!isPacked(weight)) {
      const [N = 0, K = 0] = weight.shape;
      const twin = packMatrix(gpu, values, [N, K], "nf4", { doubleQuant: true });
      const expected = await valuesOf(twin);
      expect(await valuesOf(found)).toEqual(expected);
      gpu.release(...tensorsIn(twin));
      changed += values.reduce((sum, x, i) => sum + (x - (expected[i] ?? Number.NaN)) ** 2, 0);
      whole += values.reduce((sum, x) => sum + x * x, 0);
    } else expect(await valuesOf(found)).toEqual(values);
  }
  expectClose([merged.requantizationError ?? Number.NaN], [Math.sqrt(changed / whole)], 1e-9, "error");

  const unquantised = await loadModel(gpu, wide.directory);
  expect(unquantised.packed.size).toBe(0);
  expect(wide.dtypes).toEqual(new Set(["F32"]));
  const { quantization_config: said, ...rest } = configOf(base.contents);
  expect(said).toBeDefined();
  expect(configOf(wide.contents)).toEqual({ ...rest, dtype: "float32" });
  expectClose(await logitsOf(unquantised, unquantised), wanted, 2e-4, "logits");

  adapter.unmerge();
  expect(await logitsOf(model, model)).toEqual(wanted);
  adapter.detach();
  expect((await saved(model, base.directory)).contents).toEqual(base.contents);
  for (const m of [model, again, unquantised]) m.destroy();
});

describe("what contradicts itself is refused, with nothing left on the device", () => {
  const MODULE = "model.layers.0.self_attn.q_proj.weight";
  const STATE = `${MODULE}.quant_state.bitsandbytes__nf4`;
  let contents: Record<string, Uint8Array>;
  let single: Record<string, Uint8Array>;

  beforeAll(async () => {
    const gpu = await testGpu();
    const source = golden("llama-bias");
    const of = async (doubleQuant: boolean) => {
      const model = await loadModel(gpu, source, { weights: "nf4", doubleQuant });
      const made = (await saved(model, source)).contents;
      model.destroy();
      return made;
    };
    contents = await of(true);
    single = await of(false);
  });

  const bytesOf = (values: ArrayBufferView): Uint8Array => new Uint8Array(values.buffer.slice(0) as ArrayBuffer);
  const made = (name: string, dtype: "U8" | "F32", shape: number[], bytes: Uint8Array): TensorToWrite => ({
    ...{ name, dtype, shape, sizeBytes: bytes.byteLength },
    data: async () => bytes,
  });

  /** The directory with some tensors changed, or left out. */
  async function edited(
    files: Record<string, Uint8Array>,
    edit: (name: string, tensor: TensorToWrite, bytes: Uint8Array) => TensorToWrite | undefined,
  ): Promise<Directory> {
    const content = files["model.safetensors"] ?? expect.fail("weights");
    const file = await openSafetensors(memorySource(content), "x");
    const tensors = [];
    for (const [name, info] of file.tensors) {
      const bytes = Uint8Array.from(await file.read(name));
      tensors.push(edit(name, { name, ...info, data: async () => bytes }, bytes) ?? []);
    }
    const pieces = [];
    for await (const piece of encodeSafetensors(tensors.flat())) pieces.push(piece);
    return memoryDirectory("m", { ...files, "model.safetensors": new Uint8Array(Buffer.concat(pieces)) });
  }

  const refused = async (directory: Directory, message: string, options?: LoadOptions): Promise<void> => {
    const gpu = await testGpu();
    const live = gpu.counters().bytesLive;
    await expect(loadModel(gpu, directory, options)).rejects.toThrow(new FormatError(message));
    expect(gpu.counters().bytesLive).toBe(live);
  };

  /** With another quant_state of one weight. */
  const stated = (changes: Record<string, unknown>): Promise<Directory> =>
    edited(contents, (name, t, bytes) => {
      if (name !== STATE) return t;
      const state = { ...(JSON.parse(new TextDecoder().decode(bytes)) as object), ...changes };
      const text = new TextEncoder().encode(JSON.stringify(state));
      return made(STATE, "U8", [text.length], text);
    });

  test.each([
    ["quant_type", "fp4", '"quant_type" must be "nf4", got "fp4"'],
    ["shape", [64, 60], '"shape" must be [32,32], got [64,60]'],
    ["shape", undefined, '"shape" must be [32,32], got undefined'],
    ["blocksize", 48, '"blocksize" must be a power of two from 32, got 48'],
    ["blocksize", "64", '"blocksize" must be a power of two from 32, got "64"'],
    ["nested_blocksize", 128, '"nested_blocksize" must be 256, got 128'],
    ["nested_blocksize", undefined, '"nested_blocksize" must be 256, got undefined'],
    ["nested_offset", "0.1", '"nested_offset" must be a finite f32, got "0.1"'],
    ["nested_offset", 1e300, '"nested_offset" must be a finite f32, got 1e+300'],
  ])("quant_state: %s %j", async (key, value, rule) => {
    await refused(await stated({ [key]: value }), `m/model.safetensors: tensor "${STATE}": ${rule}`);
  });

  test("a block size that does not fit the scales", async () => {
    await refused(
      await stated({ blocksize: 128 }),
      `m/model.safetensors: tensor "${MODULE}.absmax" must be U8 [8], got U8 [16]`,
    );
  });

  test.each([
    [STATE, ", as a part of an NF4 weight, got none"],
    [`${MODULE}.quant_map`, ", as a part of an NF4 weight, got none"],
    [`${MODULE}.absmax`, ", as a part of an NF4 weight, got none"],
    [`${MODULE}.nested_absmax`, ", as a part of an NF4 weight, got none"],
    [`${MODULE}.nested_quant_map`, ", as a part of an NF4 weight, got none"],
  ])("a missing part: %s", async (missing, rule) => {
    const directory = await edited(contents, (name, t) => (name === missing ? undefined : t));
    await refused(directory, `m/model.safetensors: tensor "${missing}" must be there${rule}`);
  });

  test.each([
    ["", "U8", [512, 1], new Uint8Array(256), [256, 1], "double"],
    [".absmax", "U8", [16], new Uint8Array(15), [15], "double"],
    [".absmax", "F32", [16], new Uint8Array(60), [15], "single"],
    [".nested_absmax", "F32", [1], new Uint8Array(8), [2], "double"],
    [".nested_quant_map", "F32", [256], new Uint8Array(1020), [255], "double"],
    [".quant_map", "F32", [16], new Uint8Array(60), [15], "single"],
  ] as const)("a wrong shape: weight%s", async (part, dtype, want, bytes, got, kind) => {
    const directory = await edited(kind === "double" ? contents : single, (name, t) =>
      name === `${MODULE}${part}` ? made(name, dtype, [...got], bytes) : t,
    );
    await refused(
      directory,
      `m/model.safetensors: tensor "${MODULE}${part}" must be ${dtype} [${want}], got ${dtype} [${got}]`,
    );
  });

  test.each([
    [".absmax", Number.NaN, 3, "single"],
    [".nested_absmax", Number.POSITIVE_INFINITY, 0, "double"],
    [".nested_quant_map", Number.NEGATIVE_INFINITY, 200, "double"],
  ] as const)("a number that is not finite: weight%s", async (part, value, at, kind) => {
    const directory = await edited(kind === "double" ? contents : single, (name, t, bytes) => {
      if (name !== `${MODULE}${part}`) return t;
      const values = new Float32Array(bytes.slice().buffer);
      values[at] = value;
      return made(name, "F32", [values.length], bytesOf(values));
    });
    await refused(directory, `m/model.safetensors: tensor "${MODULE}${part}" must be finite, got ${value} at ${at}`);
  });

  test("other levels than NF4's, FP4, and a file cut short", async () => {
    const levels = await edited(contents, (name, t) =>
      name === `${MODULE}.quant_map` ? made(name, "F32", [16], bytesOf(new Float32Array(16).fill(0.5))) : t,
    );
    await refused(
      levels,
      `m/model.safetensors: tensor "${MODULE}.quant_map" must be NF4's levels, got ${"0.5 ".repeat(14)}0...`,
    );
    const fp4 = await edited(contents, (name, t) => (name === STATE ? { ...t, name: STATE.replace("nf4", "fp4") } : t));
    await refused(
      fp4,
      `m/model.safetensors: weight "${MODULE}" must be in NF4 or floating point, got FP4. Get the model unquantised`,
    );
    const whole = contents["model.safetensors"] ?? expect.fail("weights");
    const cut = memoryDirectory("m", { ...contents, "model.safetensors": whole.subarray(0, whole.length - 8) });
    await expect(loadModel(await testGpu(), cut)).rejects.toThrow(
      /^m\/model\.safetensors: tensor ".*" must lie within/,
    );
  });

  test("NF4 is not kept as int8", async () => {
    await refused(
      memoryDirectory("m", contents),
      `m/model.safetensors: weights to be kept as int8 must be stored unquantised, got ${MODULE} in NF4. Keep them as they are`,
      { weights: "int8" },
    );
  });

  test.each([
    [{ quant_method: "gptq", bits: 4 }, "gptq"],
    [{ quant_method: "awq" }, "awq"],
    [{ quant_method: "bitsandbytes", load_in_8bit: true }, "bitsandbytes in 8 bits"],
    [{ quant_method: "bitsandbytes", load_in_4bit: true }, "bitsandbytes' fp4"],
    [{ load_in_4bit: true, bnb_4bit_quant_type: "fp4" }, "bitsandbytes' fp4"],
    ["nf4", '"nf4"'],
  ])("config.json: %j", async (quantization, got) => {
    const config = JSON.stringify({ ...configOf(contents), quantization_config: quantization });
    await refused(
      memoryDirectory("m", { ...contents, "config.json": new TextEncoder().encode(config) }),
      `m/config.json: weights must be unquantised, or in bitsandbytes' NF4, got ${got}. Get the model unquantised`,
    );
  });
});

test("LoRA on NF4 learns as LoRA on f32 does: losses within 2 %", async () => {
  const gpu = await testGpu();
  const file = "demo/data/pirate-train.jsonl";
  const lines = readFileSync(file, "utf8").split("\n").slice(0, 8);
  const directory = diskDirectory("demo/base");
  const { contextLength, vocabSize } = await readConfig(directory);
  const tokenizer = await loadTokenizer(directory);
  const { rows } = readRows(lines.join("\n"), file, tokenizer, { maxLength: 48, contextLength, vocabSize });
  const lossesOf = async (weights: "f32" | "nf4"): Promise<number[]> => {
    const model = await loadModel(gpu, directory, { weights });
    const adapter = attachLora(model, { r: 8, alpha: 16, targetModules: "all-linear" });
    const { parameters } = adapter;
    const losses = [];
    const options = { model, parameters, adapter, rows, steps: 8, batchSize: 8, learningRate: 3e-3 };
    for await (const { loss } of train(options)) losses.push(loss);
    adapter.detach();
    model.destroy();
    return losses;
  };
  const [of32, ofNf4] = [await lossesOf("f32"), await lossesOf("nf4")];
  expect(of32.at(-1)).toBeLessThan(0.5 * (of32[0] ?? 0));
  of32.forEach((loss, i) => {
    expect(
      Math.abs((ofNf4[i] ?? Number.NaN) / loss - 1),
      `step ${i + 1}: ${ofNf4[i]} on NF4, ${loss}`,
    ).toBeLessThanOrEqual(0.02);
  });
}, 240_000);
