/** Adapters out of two checkpoints: of a base and of that base with an adapter merged into it. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory, ensureWritableDirectory, writeFileAtomic } from "../../src/io/files.ts";
import { readAdapter } from "../../src/lora/adapter-file.ts";
import { settingsOf } from "../../src/lora/config.ts";
import { extractAdapter } from "../../src/lora/extract.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import type { PlainAdapter } from "../../src/lora/plain-adapter.ts";
import { readConfig } from "../../src/models/config.ts";
import { isTurned, linearSizes, loadModel } from "../../src/models/load.ts";
import { saveModel } from "../../src/models/save.ts";
import { openCheckpoint } from "../../src/nn/checkpoint.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { matrix, multiply } from "../../src/tensor/linalg.ts";
import { lastJson, lowrank } from "../cli/run.ts";
import { expectClose, testGpu } from "../harness.ts";

const golden = (name: string): string => `test/golden/models/${name}`;
let home = "";
beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-extract-"));
  for (const name of ["qwen2", "gpt2"]) {
    const directory = diskDirectory(golden(name));
    const model = await loadModel(await testGpu(), directory);
    const adapter = await loadPeft(model, diskDirectory(`${golden(name)}/adapter`));
    adapter.merge();
    await ensureWritableDirectory(join(home, name));
    for (const [file, content] of (await saveModel(model, directory)).files)
      await writeFileAtomic(join(home, name, file), content);
    adapter.detach();
    model.destroy();
  }
});
afterAll(() => rm(home, { recursive: true, force: true }));

function update(adapter: PlainAdapter, name: string): Float64Array {
  const { A, B } = adapter.modules.get(name) ?? expect.fail(name);
  const { scale } = settingsOf(adapter.config, name);
  return multiply(matrix(B.rows, B.columns, B.values), matrix(A.rows, A.columns, A.values)).data.map((v) => scale * v);
}

async function extracted(name: string, rank: number, targetModules: string | string[] = "all-linear") {
  const config = await readConfig(diskDirectory(golden(name)));
  const [base, tuned] = [
    await openCheckpoint(diskDirectory(golden(name)), "model"),
    await openCheckpoint(diskDirectory(join(home, name)), "model"),
  ];
  const isTransposed = (key: string): boolean => isTurned(config, key);
  const of = { rank, targetModules, linears: linearSizes(config), isTransposed, baseModel: name };
  return { ...(await extractAdapter(base, tuned, of)), base, of };
}

test.each(["qwen2", "gpt2"])("of %s with an adapter merged into it, its rank gives its update back", async (name) => {
  const { adapter, error, unchanged } = await extracted(name, 4);
  const original = await readAdapter(diskDirectory(`${golden(name)}/adapter`));
  expect([...adapter.modules.keys()].sort()).toEqual([...original.modules.keys()].sort());
  for (const module of original.modules.keys())
    expectClose(update(adapter, module), update(original, module), 1e-5, module);
  expect(error).toBeLessThan(1e-3);
  expect(unchanged).toEqual([]);
  expect(adapter.config).toMatchObject({ r: 4, alpha: 4, fanInFanOut: name === "gpt2" });
});

test("a smaller rank leaves an error that it tells, a larger one nothing but rounding", async () => {
  const original = await readAdapter(diskDirectory(`${golden("qwen2")}/adapter`));
  const errors = [];
  for (const rank of [1, 2, 3, 20]) {
    const { adapter, error } = await extracted("qwen2", rank);
    let [missed, whole] = [0, 0];
    for (const module of original.modules.keys()) {
      const want = update(original, module);
      for (const [i, v] of update(adapter, module).entries()) missed += (v - (want[i] ?? 0)) ** 2;
      whole += want.reduce((sum, v) => sum + v * v, 0);
    }
    expect(Math.abs(Math.sqrt(missed / whole) - error)).toBeLessThan(1e-3);
    errors.push(error);
  }
  expect(errors).toEqual([...errors].sort((a, b) => b - a));
  expect(errors[0]).toBeGreaterThan(0.3);
});

describe("lowrank extract", () => {
  test("writes an adapter with which the base has the tuned model's loss", async () => {
    const out = join(home, "out");
    const args = ["extract", "--model", golden("qwen2"), "--tuned", join(home, "qwen2"), "--rank", "4", "--out", out];
    const ended = await lowrank([...args, "--json"]);
    expect(ended.code, ended.stderr).toBe(0);
    expect(lastJson(ended)).toMatchObject({ out, rank: 4, modules: 14, unchanged: 0 });
    const model = await loadModel(await testGpu(), diskDirectory(golden("qwen2")));
    const adapter = await loadPeft(model, diskDirectory(out));
    expect(adapter.pairs.size).toBe(14);
    adapter.detach();
    model.destroy();
  });

  test("leaves alone what did not change, and refuses two models that are the same or of other sizes", async () => {
    const { base, of } = await extracted("qwen2", 2, ["q_proj"]);
    await expect(extractAdapter(base, base, of)).rejects.toThrow(
      new ShapeError("extract: a module must have changed, got the same weights in 2 of 2. Are they two models?"),
    );
    await expect(extractAdapter(base, base, { ...of, rank: 0 })).rejects.toThrow(
      new ShapeError("extract: the rank must be a whole number of at least 1, got 0"),
    );
    const other = await openCheckpoint(diskDirectory(golden("qwen3")), "model");
    await expect(extractAdapter(base, other, of)).rejects.toThrow(
      new FormatError(
        `${golden("qwen3")}/model.safetensors: tensor "model.layers.0.self_attn.q_proj.weight" must be [32,32], got [48,32]`,
      ),
    );
  });
});
