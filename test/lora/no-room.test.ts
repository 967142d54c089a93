/** An adapter on a device without room: what cannot be done has not begun, and leaves nothing behind. */
import { expect, test } from "vitest";
import { type Directory, memoryDirectory } from "../../src/io/bytes.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { initLora } from "../../src/lora/init.ts";
import type { HasLinears } from "../../src/lora/parts.ts";
import { loadPeft, savePeft } from "../../src/lora/peft.ts";
import { loadModel } from "../../src/models/load.ts";
import { type Linear, linears } from "../../src/nn/linear.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import type { PackedFormat } from "../../src/tensor/packed.ts";
import { Random } from "../../src/tensor/random.ts";
import { readAll } from "../../src/tensor/tensor.ts";
import { collect } from "../collect.ts";
import { expectClose, freshSeed, randomNd, testGpu, upload } from "../harness.ts";
import { refusing } from "../refusing.ts";

/** q [8,64], k [6,64] and v [5,64] with biases, in these formats. */
async function layers(formats: readonly (PackedFormat | "f32")[] = ["f32", "f32", "f32"]) {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const layer = (N: number, format: PackedFormat | "f32" = "f32"): Linear => {
    const W = randomNd([N, 64], random);
    const weight = format === "f32" ? upload(gpu, W) : packMatrix(gpu, Float32Array.from(W.data), [N, 64], format);
    return { weight, bias: upload(gpu, randomNd([N], random)) };
  };
  const all = { q: layer(8, formats[0]), k: layer(6, formats[1]), v: layer(5, formats[2]) };
  const model: HasLinears = { linears: new Map(Object.entries(all)), groups: [["q", "k", "v"]] };
  const x = upload(gpu, randomNd([3, 64], random));
  const run = async (): Promise<number[]> =>
    (await readAll(gpu.scope(() => linears(Object.values(all), x)))).flatMap((y) => [...y]);
  const attach = (config: Partial<LoraConfig> = {}): LoraAdapter => {
    const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", ...config });
    for (const p of adapter.parameters) gpu.write(p, Float32Array.from(randomNd(p.shape, random, 0.3).data));
    return adapter;
  };
  const parameters = () => Object.values(all).map(({ weight, bias, trained }) => [weight, bias, trained]);
  return { gpu, run, attach, parameters };
}

test.each([
  ["enabled", {}],
  ["disabled", {}],
  ["enabled", { useDora: true, bias: "all", targetModules: ["q", "k"] }],
  ["disabled", { loraBias: true, bias: "lora_only" }],
  ["enabled", { targetModules: ["q", "v"], modulesToSave: ["k"] }],
] as const)("a merge without room leaves the adapter as it was, %s: %o", async (state, config) => {
  const { gpu, run, attach, parameters } = await layers(["nf4", "f32", "int8"]);
  const adapter = attach(config as Partial<LoraConfig>);
  const tuned = await run();
  if (state === "disabled") adapter.disable();
  const [before, output] = [parameters(), await run()];
  await refusing(
    gpu,
    () => adapter.merge(),
    async () => {
      expect(adapter.state).toBe(state);
      for (const [i, kept] of parameters().entries()) kept.forEach((one, j) => void expect(one).toBe(before[i]?.[j]));
      expect(await run()).toEqual(output);
    },
  );
  expectClose(await run(), tuned, 1e-4, "merged");
  adapter.unmerge();
  expect(await run()).toEqual(tuned);
  adapter.detach();
});

test.each([{}, { useDora: true }])(
  "a start from the base without room changes nothing, and may be tried again: %o",
  async (config) => {
    const { gpu, run, attach, parameters } = await layers();
    const adapter = attach(config);
    const [before, output] = [parameters(), await run()];
    await refusing(
      gpu,
      () => initLora(adapter, "olora"),
      async () => {
        expect(adapter.beginnings.size).toBe(0);
        for (const [i, kept] of parameters().entries()) expect(kept[0]).toBe(before[i]?.[0]);
        expect(await run()).toEqual(output);
      },
    );
    expect(adapter.beginnings.size).toBe(3);
    adapter.disable();
    for (const [i, kept] of parameters().entries()) expect(kept[0]).toBe(before[i]?.[0]);
    adapter.detach();
  },
);

test.each([
  ["DoRA", { useDora: true }],
  ["a start from the base", {}],
])("%s that cannot be enabled, as its weights changed meanwhile, stays disabled", async (name, config) => {
  const { gpu, run, attach } = await layers();
  const adapter = attach(config);
  if (name !== "DoRA") await initLora(adapter, "olora");
  adapter.disable();
  const other = attach();
  other.merge();
  other.detach();
  const output = await run();
  await refusing(
    gpu,
    () => adapter.enable(),
    async () => {
      expect(adapter.state).toBe("disabled");
      expect(await run()).toEqual(output);
    },
  );
  const enabled = await run();
  adapter.merge();
  expectClose(await run(), enabled, 1e-4, "merged");
  adapter.unmerge();
  adapter.disable();
  expect(await run()).toEqual(output);
  adapter.detach();
});

const MODEL = diskDirectory("test/golden/models/qwen2");
const ALL_KINDS: Partial<LoraConfig>[] = [
  { targetModules: ["q_proj", "k_proj"], useDora: true, bias: "all" },
  { targetModules: ["q_proj", "lm_head"], trainableTokenIndices: { embed_tokens: [3, 5] } },
  { targetModules: ["v_proj"], modulesToSave: ["embed_tokens", "norm"] },
];

test.each(ALL_KINDS)("what cannot be attached, fresh or from a file, leaves nothing behind: %o", async (config) => {
  const model = await loadModel(await testGpu(), MODEL);
  const { gpu } = model;
  const fresh = await refusing(gpu, () => attachLora(model, { r: 2, alpha: 4, targetModules: [], ...config }));
  const files = savePeft(fresh, "qwen2");
  const bytes = await collect(files["adapter_model.safetensors"]);
  const directory: Directory = memoryDirectory("a", { ...files, "adapter_model.safetensors": bytes });
  fresh.detach();
  const before = gpu.counters().buffersLive;
  (await refusing(gpu, () => loadPeft(model, directory))).detach();
  expect(gpu.counters().buffersLive).toBe(before);
  model.destroy();
});

test("copies of modules of which one cannot be trained leave nothing behind", async () => {
  const model = await loadModel(await testGpu(), MODEL, { weights: "nf4" });
  const { buffersLive } = model.gpu.counters();
  const config = { r: 2, alpha: 4, targetModules: ["q_proj"], modulesToSave: ["embed_tokens", "o_proj"] };
  expect(() => attachLora(model, config)).toThrow(
    new ShapeError("lora: modules_to_save are trained as f32, got one packed as nf4. Load it as f32"),
  );
  expect(model.gpu.counters().buffersLive).toBe(buffersLive);
  model.destroy();
});
