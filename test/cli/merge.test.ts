import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { mergeCommand } from "../../src/cli/merge.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { attachLora } from "../../src/lora/adapter.ts";
import { loadModelFrom, savePeftTo } from "../../src/node.ts";
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
