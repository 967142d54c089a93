import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { mergeCommand } from "../../src/cli/merge.ts";
import { quantizeCommand } from "../../src/cli/quantize.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModelFrom, savePeftTo } from "../../src/node.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { writeTinyModel } from "../tiny-model.ts";

let home = "";
let out = "";

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-merge-"));
  vi.spyOn(process.stderr, "write").mockReturnValue(true);
  vi.spyOn(process.stdout, "write").mockImplementation((text) => {
    out += text;
    return true;
  });
});
afterAll(async () => {
  vi.restoreAllMocks();
  await rm(home, { recursive: true, force: true });
});

test.each(["F16", "BF16"] as const)(
  "a model stored in %s is merged into the same type, and what was not adapted keeps its bits",
  async (dtype) => {
    const [model, adapter, merged] = ["model", "adapter", "merged"].map((name) => join(home, dtype, name)) as [
      string,
      string,
      string,
    ];
    await writeTinyModel(model, { dtype });
    await writeFile(join(model, "chat_template.jinja"), "{{ messages }}\n");
    const gpu = await openGpu();
    const lora = attachLora(await loadModelFrom(gpu, model), {
      r: 2,
      alpha: 2,
      targetModules: ["q_proj", "down_proj"],
    });
    const random = new Random(3);
    for (const { B } of lora.pairs.values())
      gpu.write(
        B,
        Float32Array.from({ length: B.size }, () => random.normal(0, 0.3)),
      );
    await savePeftTo(lora, adapter, model);
    gpu.destroy();

    out = "";
    await mergeCommand().parseAsync(["--model", model, "--adapter", adapter, "--out", merged, "--json"], {
      from: "user",
    });
    const report = JSON.parse(out);
    expect(report).toMatchObject({ out: merged, dtypes: [dtype] });
    expect(report.max_difference).toBeGreaterThan(0);
    expect(report.max_difference).toBeLessThanOrEqual(report.tolerance);

    expect(await readFile(join(merged, "chat_template.jinja"), "utf8")).toBe("{{ messages }}\n");
    const [before, after] = await Promise.all(
      [model, merged].map(async (path) => openSafetensors(await fileSource(join(path, "model.safetensors")), path)),
    );
    expect([...(after?.tensors ?? [])]).toEqual([...(before?.tensors ?? [])]);
    for (const name of before?.tensors.keys() ?? []) {
      const same =
        Buffer.compare((await before?.read(name)) ?? Buffer.alloc(0), (await after?.read(name)) ?? Buffer.alloc(1)) ===
        0;
      expect(same, name).toBe(!/\.(q|down)_proj\.weight$/.test(name));
    }
  },
);

test("a base in NF4 gives a model in NF4, checked against the adapter, or with --dtype in floating point", async () => {
  const at = (name: string): string => join(home, "nf4", name);
  await writeTinyModel(at("model"), { dtype: "F16" });
  out = "";
  const from = { from: "user" } as const;
  await quantizeCommand().parseAsync(["--model", at("model"), "--out", at("base"), "--json"], from);
  expect(JSON.parse(out)).toMatchObject({ out: at("base") });
  await expect(quantizeCommand().parseAsync(["--model", at("base"), "--out", at("x")], from)).rejects.toThrow(
    new ShapeError(`quantize: --model must be unquantised, got ${at("base")} in NF4`),
  );
  await expect(
    quantizeCommand().parseAsync(["--model", at("model"), "--out", at("x"), "--format", "int8"], from),
  ).rejects.toThrow(
    new ShapeError(
      "quantize: --format must be nf4, got int8. Other formats have no file that others read: use --quantize of the other commands",
    ),
  );
  const gpu = await openGpu();
  const lora = attachLora(await loadModelFrom(gpu, at("base")), { r: 2, alpha: 2, targetModules: ["q_proj"] });
  const random = new Random(4);
  for (const { B } of lora.pairs.values())
    gpu.write(
      B,
      Float32Array.from({ length: B.size }, () => random.normal(0, 0.3)),
    );
  await savePeftTo(lora, at("adapter"), at("base"));

  const merge = async (...more: string[]) => {
    out = "";
    const args = ["--model", at("base"), "--adapter", at("adapter"), "--out", at("merged"), "--json", ...more];
    await mergeCommand().parseAsync(args, from);
    const model = await loadModelFrom(gpu, at("merged"));
    const packed = model.packed.size;
    model.destroy();
    return { report: JSON.parse(out), packed, config: JSON.parse(await readFile(at("merged/config.json"), "utf8")) };
  };
  const again = await merge();
  expect(new Set(again.report.dtypes)).toEqual(new Set(["F16", "NF4"]));
  expect(again.report.requantization_error).toBeGreaterThan(0.01);
  expect(again.report.requantization_error).toBeLessThan(0.15);
  expect(again.report.max_difference).toBeLessThanOrEqual(again.report.tolerance);
  expect(again.packed).toBe(14);
  expect(again.config.quantization_config).toMatchObject({ bnb_4bit_quant_type: "nf4" });

  const wide = await merge("--dtype", "f32");
  expect(wide.report).toEqual({
    ...{ out: at("merged"), dtypes: ["F32"] },
    ...{ max_difference: wide.report.max_difference, tolerance: wide.report.tolerance },
  });
  expect(wide.report.max_difference).toBeLessThan(again.report.max_difference);
  expect(wide.packed).toBe(0);
  expect(wide.config).toEqual({ ...JSON.parse(await readFile(at("model/config.json"), "utf8")), dtype: "float32" });
  gpu.destroy();
});

test("an adapter that is lost in merging is found before anything is written, also where it is small", async () => {
  const at = (name: string): string => join(home, "lost", name);
  await writeTinyModel(at("base"));
  const gpu = await openGpu();
  const lora = attachLora(await loadModelFrom(gpu, at("base")), { r: 2, alpha: 2, targetModules: ["q_proj"] });
  const random = new Random(4);
  for (const { B } of lora.pairs.values())
    gpu.write(
      B,
      Float32Array.from({ length: B.size }, () => random.normal(0, 0.05)),
    );
  await savePeftTo(lora, at("adapter"), "base");
  gpu.destroy();
  const lost = vi.spyOn(LoraAdapter.prototype, "merge").mockImplementation(function (this: LoraAdapter) {
    this.disable();
  });
  const args = ["--model", at("base"), "--adapter", at("adapter"), "--out", at("merged")];
  await expect(mergeCommand().parseAsync(args, { from: "user" })).rejects.toThrow(
    /^merge: logits of the merged weights must be within [\d.e-]+ of the adapter's, got a difference of [\d.]+\. Nothing was written$/,
  );
  lost.mockRestore();
  expect(await readdir(at("merged"))).toEqual([]);
}, 120_000);
