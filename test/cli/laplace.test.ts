// Laplace's approximation for a language model, through the real command.
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { evalCommand } from "../../src/cli/eval.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModelFrom, savePeftTo } from "../../src/node.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { lastJson, lowrank } from "./run.ts";

let home = "";
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-laplace-"));
  await writeTinyModel(at("model"), { config: { num_hidden_layers: 1 } });
  const model = await loadModelFrom(await testGpu(), at("model"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj", "v_proj"] }, 1);
  const random = new Random(4);
  for (const { B } of adapter.pairs.values())
    model.gpu.write(
      B,
      Float32Array.from({ length: B.size }, () => random.normal(0, 0.3)),
    );
  await savePeftTo(adapter, at("adapter"), "base");
  const rows = [3, 17, 40].map((first) => ({ input_ids: [first, first + 1, first + 2, first + 3, first + 4] }));
  await writeFile(at("rows.jsonl"), rows.map((row) => `${JSON.stringify(row)}\n`).join(""));
  await writeFile(at("one.jsonl"), `${JSON.stringify(rows[0])}\n`);
});
afterAll(() => rm(home, { recursive: true, force: true }));

test("calibration is measured on every second row, where the others choose the prior's precision", async () => {
  const files = ["--model", at("model"), "--adapter", at("adapter"), "--data", at("rows.jsonl")];
  const found = await lowrank(["eval", ...files, "--laplace", at("rows.jsonl"), "--samples", "2", "--json"]);
  expect(found.code, found.stderr).toBe(0);
  const { tokens, laplace } = lastJson(found) as { tokens: number; laplace: Record<string, unknown> };
  expect(tokens).toBe(12);
  expect(laplace).toMatchObject({ cases: 8, before: { nll: expect.any(Number) } });
  expect(laplace.rank).toBeLessThanOrEqual(128);
  expect(laplace.prior_precision).toBeGreaterThan(0);
  expect((laplace.after as { ece: number }).ece).toBeGreaterThanOrEqual(0);
});

test("one row cannot choose the prior's precision and be measured", async () => {
  const files = ["--model", at("model"), "--adapter", at("adapter"), "--data", at("one.jsonl")];
  await expect(evalCommand().parseAsync([...files, "--laplace", at("rows.jsonl")], { from: "user" })).rejects.toThrow(
    new ShapeError("eval: --prior-precision auto needs two rows of --data, got one. Give a number"),
  );
});
