// Ways to begin that the command offers beside PEFT's usual start: by the data, on a quantised base, with A frozen.
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { trainCommand } from "../../src/cli/train.ts";
import { Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { loadModelFrom, loadPeftFrom } from "../../src/node.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { read } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";

vi.mock("../../src/gpu/gpu.ts", async (original) => (await import("./shared-gpu.ts")).sharedGpu(original));

let home = "";
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-starts-"));
  await writeTinyModel(at("model"), { config: { num_hidden_layers: 1 } });
  await writeFile(
    at("ids.jsonl"),
    '{"input_ids":[1,2,3,7,9,11]}\n{"input_ids":[4,5,6,7,1]}\n{"input_ids":[8,9,3,2,5]}',
  );
  vi.spyOn(Gpu.prototype, "destroy").mockReturnValue(undefined);
  vi.spyOn(process.stdout, "write").mockReturnValue(true);
  vi.spyOn(process.stderr, "write").mockReturnValue(true);
});
afterAll(async () => {
  vi.restoreAllMocks();
  (await openGpu()).destroy();
  await rm(home, { recursive: true, force: true });
});

const run = async (out: string, ...more: string[]): Promise<void> => {
  const places = ["--model", at("model"), "--data", at("ids.jsonl"), "--out", at(out)];
  await trainCommand()
    .exitOverride()
    .configureOutput({ writeErr: () => {} })
    .parseAsync([...places, "--batch-size", "2", "--learning-rate", "0.02", ...more], { from: "user" });
};
const train = (out: string, ...more: string[]): Promise<void> =>
  run(out, "--rank", "2", "--target-modules", "k_proj,down_proj", "--steps", "2", ...more);

const adapterOf = (name: string): Promise<Buffer[]> =>
  Promise.all(["adapter_model.safetensors", "adapter_config.json"].map((file) => readFile(join(at(name), file))));

test.each([
  ["eva", ["--init", "eva"]],
  ["lora_ga", ["--init", "lora_ga"]],
  ["loftq", ["--init", "loftq", "--quantize", "nf4"]],
  ["LoRA-FA", ["--lora-fa"]],
])("%s trains, and what is saved loads, A and B other than zero", async (name, options) => {
  await train(name, ...options);
  const model = await loadModelFrom(await testGpu(), at("model"));
  const adapter = await loadPeftFrom(model, at(name), {
    onWarning: (text) => expect.fail(text),
  });
  expect([...adapter.pairs.keys()]).toEqual(["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"]);
  for (const { A, B } of adapter.pairs.values())
    for (const values of [await read(A), await read(B)]) expect(values.some((value) => value !== 0)).toBe(true);
  adapter.detach();
  model.destroy();
});

test.each(["pissa", "lora_ga"])("%s takes its part from the f32 of a model that is stored in 16 bits", async (init) => {
  await writeTinyModel(at("half"), { config: { num_hidden_layers: 1 }, dtype: "F16" });
  const name = `half-${init}`;
  await train(name, "--init", init, "--model", at("half"));
  const model = await loadModelFrom(await testGpu(), at("half"), { weights: "stored" });
  const adapter = await loadPeftFrom(model, at(name));
  expect([...adapter.pairs.values()][0]?.A.shape[0], "what it has learned has twice the rank").toBe(4);
  adapter.detach();
  model.destroy();
});

/** Takes back the last step, as if the run had been cut off after the first. */
async function cutAfterFirst(name: string): Promise<void> {
  await rm(at(`${name}/checkpoints/step-000002`), { recursive: true });
  expect(await readdir(at(`${name}/checkpoints`))).toEqual(["step-000001"]);
  for (const file of ["adapter_model.safetensors", "adapter_config.json"]) await rm(at(`${name}/${file}`));
}

test.each(["eva", "lora_ga"])("--resume after step 1 of 2 ends with the adapter of the whole run: %s", async (init) => {
  const [whole, cut] = [`${init}-whole`, `${init}-cut`];
  const options = ["--init", init, "--save-every", "1"];
  await train(whole, ...options);
  await cp(at(whole), at(cut), { recursive: true });
  await cutAfterFirst(cut);
  await train(cut, ...options, "--resume");
  expect(await adapterOf(cut)).toEqual(await adapterOf(whole));
});

test.each([
  [
    ["--init", "best"],
    'train: --init must be one of gaussian, orthogonal, pissa, pissa_niter_N, olora, eva, lora_ga, loftq, got "best". Leave it out for PEFT\'s usual start',
  ],
  [["--init", "loftq"], "train: --init loftq needs a quantised base, got no --quantize. Give it"],
  [
    ["--init", "lora_ga", "--quantize", "nf4"],
    "lora_ga: gradients are taken of f32 weights, got nf4. Load the model as f32",
  ],
])("train %s is refused, and nothing is written", async (options, message) => {
  await expect(train("refused", ...options)).rejects.toThrow(new ShapeError(message));
  expect(await readdir(at("refused")).catch(() => [])).toEqual([]);
});

test.each(["eva", "lora_ga", "loftq"])("--init-adapter with --init %s is refused", async (init) => {
  await expect(run("refused", "--init-adapter", at("eva"), "--init", init)).rejects.toThrow(
    "error: option '--init-adapter <place>' cannot be used with option '--init <start>'",
  );
});
