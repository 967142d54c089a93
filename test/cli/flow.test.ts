// The whole way of a user, through the real command: train, evaluate, generate, merge, and what is in the files.
import { access, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { decodeFloats } from "../../src/io/dtype.ts";
import { fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { lastJson, lowrank, start } from "./run.ts";

let home = "";
const at = (name: string): string => join(home, name);
const SOFTWARE = /^.*: running on a software adapter \(.+\), right but slow$/m;

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-cli-"));
  await writeTinyModel(at("model"), { tokenizer: true });
  const rows = (await readFile("demo/data/pirate-train.jsonl", "utf8")).split("\n").slice(0, 12);
  await writeFile(at("data.jsonl"), `${rows.join("\n")}\n`);
});
afterAll(() => rm(home, { recursive: true, force: true }));

const trainArgs = (out: string, ...more: string[]): string[] => [
  "train",
  "--model",
  at("model"),
  "--data",
  at("data.jsonl"),
  "--out",
  at(out),
  "--learning-rate",
  "0.02",
  ...more,
];

async function logitsOf(...args: string[]): Promise<Float32Array> {
  const ended = await lowrank([
    "logits",
    "--data",
    at("data.jsonl"),
    "--row",
    "1",
    "--out",
    at("logits.safetensors"),
    ...args,
  ]);
  expect(ended).toMatchObject({ code: 0, stdout: `logits [64, 512] of row 1 are in ${at("logits.safetensors")}\n` });
  const file = await openSafetensors(await fileSource(at("logits.safetensors")), "logits");
  expect(file.tensors.get("logits")).toMatchObject({ dtype: "F32", shape: [64, 512] });
  return decodeFloats("F32", await file.read("logits"));
}

test("a model is fine-tuned, evaluated, asked for text and merged", async () => {
  const trained = await lowrank(trainArgs("adapter", "--epochs", "2", "--rank", "4", "--alpha", "8", "--json"));
  expect(trained.code, trained.stderr).toBe(0);
  const outcome = lastJson(trained);
  expect(outcome).toMatchObject({
    steps: 6,
    out: at("adapter"),
    interrupted: false,
    rows: 12,
    truncated: 12,
    dropped: 0,
    tokens: 768,
    trainable_parameters: 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80),
  });
  expect(Number(outcome.loss_last)).toBeLessThan(Number(outcome.loss_first));
  expect(Number(outcome.peak_bytes)).toBeGreaterThan(0);
  expect(trained.stderr).toContain(
    "data: 12 rows (12 truncated to 64 tokens, 0 dropped with nothing to learn), 768 tokens, ",
  );
  expect(trained.stderr).toContain(`the adapter of step 6 is saved in ${at("adapter")}`);
  if (outcome.software) expect(trained.stderr.match(SOFTWARE)).toHaveLength(1);

  const metrics = (await readFile(at("adapter/metrics.jsonl"), "utf8"))
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line));
  expect(metrics.map(({ step }) => step)).toEqual([1, 2, 3, 4, 5, 6]);
  expect(Object.keys(metrics[0])).toEqual([
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "skipped",
  ]);
  expect(metrics.map(({ learning_rate }) => Number(learning_rate.toFixed(9)))).toEqual([
    0, 0.02, 0.016, 0.012, 0.008, 0.004,
  ]);
  const config = JSON.parse(await readFile(at("adapter/adapter_config.json"), "utf8"));
  expect(config).toMatchObject({ peft_type: "LORA", r: 4, lora_alpha: 8, base_model_name_or_path: at("model") });

  const data = ["--data", at("data.jsonl"), "--json"];
  const base = lastJson(await lowrank(["eval", "--model", at("model"), ...data]));
  const tuned = lastJson(await lowrank(["eval", "--model", at("model"), "--adapter", at("adapter"), ...data]));
  expect(Object.keys(tuned)).toEqual(["loss", "perplexity", "accuracy", "tokens", "bits_per_weight"]);
  expect(Number(tuned.loss)).toBeLessThan(Number(base.loss) - 0.1);

  const ask = [
    "generate",
    "--model",
    at("model"),
    "--adapter",
    at("adapter"),
    "--prompt",
    "Once an owl",
    "--max-tokens",
    "12",
  ];
  const told = lastJson(await lowrank([...ask, "--json"]));
  expect(Object.keys(told)).toEqual(["prompt", "text", "prompt_ids", "ids"]);
  expect(told).toMatchObject({ prompt: "Once an owl" });
  expect(await lowrank(ask)).toMatchObject({ code: 0, stdout: `${told.text}\n` });

  const merged = await lowrank([
    "merge",
    "--model",
    at("model"),
    "--adapter",
    at("adapter"),
    "--out",
    at("merged"),
    "--json",
  ]);
  expect(merged.code, merged.stderr).toBe(0);
  expect(lastJson(merged)).toMatchObject({ out: at("merged"), dtypes: ["F32"] });
  for (const file of ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
    expect(await readFile(join(at("merged"), file))).toEqual(await readFile(join(at("model"), file)));

  const [withAdapter, inMerged, inBase] = [
    await logitsOf("--model", at("model"), "--adapter", at("adapter")),
    await logitsOf("--model", at("merged")),
    await logitsOf("--model", at("model")),
  ];
  const difference = (a: Float32Array): number =>
    a.reduce((most, x, i) => Math.max(most, Math.abs(x - (withAdapter[i] ?? Number.NaN))), 0);
  expect(difference(inMerged)).toBeLessThanOrEqual(1e-4);
  expect(difference(inBase)).toBeGreaterThan(0.1);
});

test("the settings of an adapter arrive in it, and it can be gone on from and merged", async () => {
  const settings = ["--use-dora", "--use-rslora", "--exclude-modules", "o_proj", "--loraplus-lr-ratio", "4"];
  const which = ["--target-modules", "q_proj,o_proj,down_proj", "--layers-to-transform", "0-1"];
  const trained = await lowrank(trainArgs("dora", "--steps", "2", "--rank", "4", ...settings, ...which));
  expect(trained.code, trained.stderr).toBe(0);
  expect(JSON.parse(await readFile(at("dora/adapter_config.json"), "utf8"))).toMatchObject({
    ...{ use_dora: true, use_rslora: true, exclude_modules: ["o_proj"], layers_to_transform: [0, 1] },
    target_modules: ["q_proj", "o_proj", "down_proj"],
  });
  const more = await lowrank(trainArgs("more", "--steps", "1", "--init-adapter", at("dora")));
  expect(more.code, more.stderr).toBe(0);
  const merged = await lowrank(["merge", "--model", at("model"), "--adapter", at("more"), "--out", at("merged-dora")]);
  expect(merged.code, merged.stderr).toBe(0);
  const planned = await lowrank(["plan", "--model", at("model"), ...settings.slice(0, 4), ...which, "--json"]);
  expect(planned.code, planned.stderr).toBe(0);
  expect(lastJson(planned)).toMatchObject({
    weights: expect.any(Number),
    weight_format: "stored",
    fits: expect.any(Boolean),
  });
  const large = await lowrank(["plan", "--model", at("model"), "--batch-size", "100000", "--json"]);
  expect([large.code, large.stderr.includes("error:")]).toEqual([1, false]);
  expect(lastJson(large)).toMatchObject({
    ...{ fits: false, weight_format: "stored", advice: expect.stringMatching(/^Use --checkpointing --batch-size \d+/) },
    reason: expect.stringMatching(/at most \d+ /),
  });
  const begun = await lowrank(trainArgs("pissa", "--steps", "1", "--init", "pissa_niter_4", "--json"));
  expect(begun.code, begun.stderr).toBe(0);
  const memory = lastJson(begun) as { peak_bytes: number; planned_bytes: number };
  expect(Math.abs(memory.peak_bytes / memory.planned_bytes - 1)).toBeLessThan(0.05);
  const wrong = await lowrank(trainArgs("wrong", "--layers-to-transform", "3-1"));
  expect(wrong).toMatchObject({
    code: 1,
    stderr: "error: train: --layers-to-transform must be numbers and ranges such as 0,4-7, got 3-1",
  });
  const both = await lowrank(trainArgs("both", "--init-adapter", at("dora"), "--use-dora"));
  expect(both.stderr).toContain("option '--init-adapter <place>' cannot be used with option '--use-dora'");
});

test("Ctrl-C ends training after the step in progress and saves the adapter", async () => {
  const run = start(trainArgs("stopped", "--steps", "100000", "--json"));
  await run.saw("step 1/100000");
  run.child.kill("SIGINT");
  const ended = await run.ended;
  expect(ended.code, ended.stderr).toBe(130);
  const { steps, interrupted } = lastJson(ended);
  expect(interrupted).toBe(true);
  expect(ended.stderr).toContain(`the adapter of step ${steps} is saved in ${at("stopped")}`);
  expect((await readFile(at("stopped/metrics.jsonl"), "utf8")).trimEnd().split("\n")).toHaveLength(Number(steps));
  await access(at("stopped/adapter_config.json"));
  const file = await openSafetensors(await fileSource(at("stopped/adapter_model.safetensors")), "adapter");
  expect(file.tensors.size).toBe(28);
});

test("five steps in a row that are not finite end training with the adapter of the last good one", async () => {
  const run = ["--steps", "9", "--learning-rate", "1e30", "--max-grad-norm", "0", "--warmup", "0", "--no-shuffle"];
  const ended = await lowrank(trainArgs("burst", ...run));
  expect(ended).toMatchObject({ code: 1, stdout: "" });
  expect(ended.stderr.trimEnd().split("\n").slice(-2)).toEqual([
    `the adapter of step 1 is saved in ${at("burst")}`,
    "error: train: loss and gradient norm must stay finite, got NaN and NaN at step 6, the last of 5 such steps in a row. The parameters are those of step 1. Use a lower learning rate or a maxGradNorm",
  ]);
  await access(at("burst/adapter_model.safetensors"));
  expect(await readFile(at("burst/run.yaml"), "utf8"), "is there before the first step").toContain("steps: 9\n");
});

test("a run that ends while its losses are not finite leaves its documents, and says that there is no loss", async () => {
  const run = ["--steps", "5", "--learning-rate", "1e30", "--max-grad-norm", "0", "--warmup", "0", "--no-shuffle"];
  const ended = await lowrank(trainArgs("lost", ...run, "--json"));
  expect(ended.code, ended.stderr).toBe(0);
  expect(lastJson(ended)).toMatchObject({
    steps: 5,
    loss_first: expect.any(Number),
    loss_last: null,
    skipped_steps: 4,
  });
  expect(await readFile(at("lost/README.md"), "utf8")).toMatch(/training loss.*\d → none/);
  await access(at("lost/report.html"));
});

test("what rows may have at most does not count in memory, only what they have", async () => {
  await writeFile(at("short.jsonl"), '{"input_ids":[1,2,3]}\n{"input_ids":[4,5,6,7]}\n');
  const args = ["--model", at("model"), "--data", at("short.jsonl"), "--out", at("short"), "--max-length", "64"];
  const ended = await lowrank(["train", ...args, "--steps", "2", "--json"]);
  expect(ended.code, ended.stderr).toBe(0);
  const { peak_bytes: peak, planned_bytes: planned } = lastJson(ended);
  expect(Number(peak)).toBeLessThanOrEqual(Number(planned));
});

test("doctor says what there is, and where there is no hardware adapter every command says so", async () => {
  const doctor = await lowrank(["doctor", "--json"]);
  expect(doctor.code).toBe(0);
  expect(lastJson(doctor)).toMatchObject({ ok: true, error: null, packages: { webgpu: expect.any(String) } });

  const hardware = { LOWRANK_ADAPTER: "hardware" };
  const found = await lowrank(["doctor", "--json"], hardware);
  const { adapter, error } = lastJson(found);
  const ended = await lowrank(["eval", "--model", at("model"), "--data", at("data.jsonl")], hardware);
  if (adapter === null) {
    expect(error).toBe(
      "openGpu: no hardware adapter was found and LOWRANK_ADAPTER=hardware forbids the software one. Install a Vulkan, Metal or D3D12 driver",
    );
    expect(found.code).toBe(1);
    expect(ended).toMatchObject({ code: 1, stdout: "" });
    expect(ended.stderr.trimEnd().split("\n").at(-1)).toBe(`error: ${error}`);
  } else {
    expect(found.code).toBe(0);
    expect(ended.code).toBe(0);
    expect(ended.stderr).not.toMatch(SOFTWARE);
  }
});

test("an error is one line, and LOWRANK_DEBUG=1 shows where it arose", async () => {
  const args = ["eval", "--model", at("nowhere"), "--data", at("data.jsonl")];
  const line = `error: --model: must be a directory, or org/name of a model on the Hugging Face Hub, got ${at("nowhere")}, which is neither. Check the path; relative paths start at ${process.cwd()}`;
  expect(await lowrank(args)).toEqual({ code: 2, stdout: "", stderr: line });
  const debug = await lowrank(args, { LOWRANK_DEBUG: "1" });
  expect(debug.stderr.startsWith(`${line}\nFormatError: --model: `)).toBe(true);
  expect(debug.stderr).toMatch(/ {4}at /);
});
