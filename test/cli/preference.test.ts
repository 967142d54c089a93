// `train --preference`: pairs in, an adapter out that prefers what was chosen; and what it refuses.
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, expect, test, vi } from "vitest";
import { dataCommand } from "../../src/cli/data.ts";
import { evalCommand } from "../../src/cli/eval.ts";
import { planCommand } from "../../src/cli/plan.ts";
import { trainCommand } from "../../src/cli/train.ts";
import { Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { FormatError } from "../../src/io/errors.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { writeTinyModel } from "../tiny-model.ts";

vi.mock("../../src/gpu/gpu.ts", async (original) => (await import("./shared-gpu.ts")).sharedGpu(original));

let home = "";
let said = "";
let result = "";
const at = (name: string): string => join(home, name);
const PAIRS = ["cat", "dog", "sun", "sea"].map((word) =>
  JSON.stringify({ prompt: `The ${word}`, chosen: " was happy.", rejected: " was very sad today." }),
);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-preference-"));
  await writeTinyModel(at("model"), { tokenizer: true, config: { num_hidden_layers: 1 } });
  await writeFile(at("pairs.jsonl"), PAIRS.join("\n"));
  await writeFile(at("valid.jsonl"), '{"prompt":"The bird","chosen":" was happy.","rejected":" was very sad today."}');
  await writeFile(at("rows.jsonl"), '{"prompt":"The cat","completion":" was happy."}');
  vi.spyOn(Gpu.prototype, "destroy").mockReturnValue(undefined);
  vi.spyOn(process.stdout, "write").mockImplementation((line) => {
    result += line;
    return true;
  });
  vi.spyOn(process.stderr, "write").mockImplementation((line) => {
    said += line;
    return true;
  });
});
beforeEach(() => {
  said = "";
  result = "";
});
afterAll(async () => {
  vi.restoreAllMocks();
  (await openGpu()).destroy();
  await rm(home, { recursive: true, force: true });
});

async function train(out: string, ...more: string[]): Promise<void> {
  const places = ["--model", at("model"), "--data", at("pairs.jsonl"), "--out", at(out)];
  const size = ["--batch-size", "2", "--rank", "4", "--target-modules", "q_proj,down_proj"];
  await trainCommand()
    .exitOverride()
    .parseAsync([...places, ...size, "--learning-rate", "0.02", ...more], { from: "user" });
}
const DPO = ["--preference", "dpo"];
const adapterOf = (name: string): Promise<Buffer> => readFile(join(at(name), "adapter_model.safetensors"));
const metricsOf = async (name: string) =>
  (await readFile(join(at(name), "metrics.jsonl"), "utf8"))
    .trimEnd()
    .split("\n")
    .map((line) => ({ ...JSON.parse(line), tokens_per_second: 0 }));

test("the loss falls from ln 2, and pairs not trained on are told apart", async () => {
  await train("run", ...DPO, "--steps", "8", "--valid-data", at("valid.jsonl"), "--valid-every", "4", "--json");
  const metrics = await metricsOf("run");
  expect(Math.abs(metrics[0].loss - Math.LN2)).toBeLessThanOrEqual(1e-5);
  expect(metrics.at(-1).loss).toBeLessThan(0.4);
  expect(metrics[3].validation).toMatchObject({ pairs: 1, accuracy: 1, best: true });
  const outcome = JSON.parse(result);
  expect(outcome).toMatchObject({ steps: 8, rows: 4, truncated: 0, dropped: 0, accuracy_valid: 1 });
  expect(outcome.margin_valid).toBeGreaterThan(0);
  expect(outcome.loss_valid).toBeLessThan(Math.LN2);
  expect(said).toContain("data: 4 pairs (0 truncated to 64 tokens, 0 dropped with nothing to learn)");
  expect(said).toContain("of 1 pairs not trained on, in 100.0 % the chosen answer gained on the rejected one");
  const files = await readdir(at("run"));
  expect(files).toEqual(
    expect.arrayContaining(["README.md", "adapter_config.json", "best", "report.html", "run.yaml"]),
  );
  expect(await readFile(join(at("run"), "run.yaml"), "utf8")).toContain("preference: dpo\n");
});

test("a run that goes on has the bytes and metrics of one that was never cut off", async () => {
  const settings = [...DPO, "--beta", "0.3", "--schedule", "constant", "--init", "pissa"];
  await train("whole", ...settings, "--steps", "6");
  await train("parts", ...settings, "--steps", "3", "--save-every", "3");
  await train("parts", ...settings, "--steps", "6", "--resume");
  expect(await adapterOf("parts")).toEqual(await adapterOf("whole"));
  expect(await metricsOf("parts")).toEqual(await metricsOf("whole"));
  await expect(train("parts", ...settings, "--beta", "0.2", "--steps", "7", "--resume")).rejects.toThrow(
    "train: --resume must have the settings of the run, got --beta 0.2 in place of 0.3. Repeat the command that began it, or begin in another --out",
  );
});

test("--find-lr suggests a rate for pairs, at which the loss falls, and trains nothing", async () => {
  await train("rates", ...DPO, "--find-lr", "--json");
  const { points, suggestion } = JSON.parse(result);
  expect(Math.abs(points[0].loss - Math.LN2)).toBeLessThanOrEqual(1e-5);
  const at0 = points.findIndex((point: { learningRate: number }) => point.learningRate === suggestion);
  expect(points[at0 + 1].loss).toBeLessThan(points[at0 - 1].loss);
  expect(await readdir(at("rates"))).toEqual(["learning-rate.html", "learning-rate.json"]);
  await expect(train("rates", ...DPO, "--find-lr", "--dry-run")).rejects.toThrow("--find-lr");
});

test("a dry run reads everything and writes nothing", async () => {
  await train("dry", ...DPO, "--dry-run", "--lora-fa");
  expect(said).toContain("dry run: 2 steps of 2 pairs would follow. Nothing was written");
  expect(await readdir(at("dry"))).toEqual([]);
});

test.each([
  ["--packing", "--packing cannot go with --preference. Leave it out", ["--packing"]],
  ["--loss-on", "--loss-on cannot go with --preference. Leave it out", ["--loss-on", "all"]],
  ["--init eva", "--init eva cannot go with --preference. Leave it out", ["--init", "eva"]],
  ["beta of 0", "--beta must be a number above 0, got 0", ["--beta", "0"]],
  ["smoothing of a half", "--label-smoothing of pairs must be below 0.5, got 0.5", ["--label-smoothing", "0.5"]],
  ["noise", "--neftune-alpha cannot go with --preference. Leave it out", ["--neftune-alpha", "5"]],
])("%s is refused", async (_what, message, args) => {
  await expect(train("refused", ...DPO, ...args)).rejects.toThrow(new ShapeError(`train: ${message}`));
});

test("pairs want --preference, and --preference wants pairs", async () => {
  const forms =
    '{"messages"}, {"prompt","completion"}, {"text"}, {"instruction","output"}, {"conversations"}, {"segments"} or {"input_ids"}';
  await expect(train("refused")).rejects.toThrow(
    new FormatError(
      `${at("pairs.jsonl")}:1: a row must be ${forms}, got "prompt", "chosen", "rejected". Pairs are learned by train --preference dpo`,
    ),
  );
  await expect(train("refused", ...DPO, "--data", at("rows.jsonl"))).rejects.toThrow(
    new FormatError(
      `${at("rows.jsonl")}:1: a pair must be {"prompt","chosen","rejected"} or {"chosen","rejected"}, got "prompt", "completion". Other rows are learned without --preference`,
    ),
  );
  await expect(train("refused", "--beta", "0.2")).rejects.toThrow(
    new ShapeError("train: --beta goes with --preference. Add it, or leave it out"),
  );
  expect(await readdir(at("refused"))).toEqual([]);
});

const evaluate = (...more: string[]): Promise<unknown> =>
  evalCommand()
    .exitOverride()
    .parseAsync(["--model", at("model"), "--data", at("valid.jsonl"), ...DPO, ...more], { from: "user" });

test("eval says of an adapter what its training said after the last step", async () => {
  await evaluate("--adapter", at("run"), "--json");
  const found = JSON.parse(result);
  expect(said).toContain("data: 1 pairs (0 truncated to 64 tokens, 0 dropped with nothing to learn)");
  const { best, ...validation } = (await metricsOf("run")).at(-1).validation;
  expect(found).toEqual(validation);
  result = "";
  await evaluate("--adapter", at("run"));
  expect(result).toBe(
    `loss ${found.loss.toFixed(4)}, accuracy 100.0 %, margin ${found.margin.toFixed(4)} over 1 pairs\n`,
  );
  result = "";
  await evaluate("--adapter", at("run"), "--beta", "0.2", "--json");
  expect(Math.abs(JSON.parse(result).margin - 2 * found.margin)).toBeLessThanOrEqual(1e-5 * found.margin);
});

test.each([
  ["an adapter is needed", "--preference compares an --adapter with the model without it, got none. Give it", []],
  ["--laplace", "--laplace cannot go with --preference. Leave it out", ["--laplace", "rows.jsonl"]],
  ["--loss-on", "--loss-on cannot go with --preference. Leave it out", ["--loss-on", "all"]],
])("eval of pairs: %s", async (_what, message, args) => {
  await expect(evaluate(...args)).rejects.toThrow(new ShapeError(`eval: ${message}`));
});

test("data shows both answers of a pair, and counts", async () => {
  const show = (...more: string[]): Promise<unknown> =>
    dataCommand().parseAsync([at("pairs.jsonl"), "--model", at("model"), ...DPO, ...more], { from: "user" });
  await show("--rows", "1");
  expect(result).toMatch(/^pair 1, chosen: \d+ tokens, \d+ to learn\n.*The cat⟦ was happy\..*⟧\n\npair 1, rejected: /);
  expect(result).toContain("⟦ was very sad today.");
  expect(result).toContain("data: 4 pairs (0 truncated to 64 tokens, 0 dropped with nothing to learn)");
  expect(result).not.toContain("packing");
  result = "";
  await show("--rows", "2", "--json");
  const { rows, dropped, examples, forms, packed } = JSON.parse(result);
  expect({ rows, dropped, forms, packed }).toEqual({ rows: 4, dropped: 0, forms: { preference: 4 } });
  expect(examples).toHaveLength(2);
  expect(Object.keys(examples[0])).toEqual(["chosen", "rejected"]);
  expect(examples[1].chosen.parts.map(({ learned }: { learned: boolean }) => learned)).toEqual([false, true]);
  await expect(show("--loss-on", "all")).rejects.toThrow(
    new ShapeError("data: --loss-on cannot go with --preference. Leave it out"),
  );
});

/** A run in which all batches have one shape: what it took, and what was planned. */
async function peakOf(
  out: string,
  data: readonly string[],
  ...more: string[]
): Promise<{ peak: number; plan: number }> {
  await writeFile(at(`${out}.jsonl`), data.join("\n"));
  const gpu = await openGpu(); // with what other runs of this file left on it
  const { bytesLive } = gpu.counters();
  gpu.resetCounters();
  result = "";
  await train(out, "--data", at(`${out}.jsonl`), "--steps", "2", "--json", ...more);
  const { peak_bytes: peak, planned_bytes: plan } = JSON.parse(result);

  return { peak: peak - bytesLive, plan };
}

const LONG = ["--sample-prompt", "The cat was happy and the dog was very sad today, for the sun was not there."];
const PAIR = '{"prompt":"The","chosen":" cat was happy.","rejected":" dog was sad."}';
const ROW = '{"text":"The cat was happy and the dog was sad, as it rained."}';
const VALID = ["--valid-every", "1"];

test("a plan for pairs is that of the run, its evaluations and samples", async () => {
  await writeFile(
    at("long.jsonl"),
    PAIR.replace("dog", "dog in the garden of the old house by the sea").replaceAll("\n", ""),
  );
  const evaluated = [...DPO, "--valid-data", at("long.jsonl"), ...VALID];
  const alone = await peakOf("pairs", [PAIR, PAIR], ...DPO);
  const both = await peakOf("pairs-both", [PAIR, PAIR], ...evaluated, ...LONG);
  for (const { peak, plan } of [alone, both]) {
    expect(peak).toBeLessThanOrEqual(plan);
    expect(plan).toBeLessThan(1.1 * peak);
  }
  expect(both.plan).toBeGreaterThan(alone.plan);
  result = "";
  const size = [
    "--batch-size",
    "2",
    "--rank",
    "4",
    "--target-modules",
    "q_proj,down_proj",
    "--max-length",
    "8",
    "--json",
  ];
  await planCommand().parseAsync(["--model", at("model"), ...DPO, ...size], { from: "user" });
  const { peak, preference } = JSON.parse(result);
  result = "";
  await planCommand().parseAsync(["--model", at("model"), ...size], { from: "user" });
  expect(preference).toBe(true);
  expect(peak).toBeGreaterThan(JSON.parse(result).peak);
});

test.each([
  ["language", [], ["a", "a fox", "a fox in the garden of the old house", "a fox in the old house", "rain"]],
  [
    "pairs",
    DPO,
    ["sad", "sad today", "sad today, as it rained on the old house", "sad today for the sun was gone", "so"],
  ],
])("rows of many lengths take no more than the longest, but for constants: %s", async (what, args, words) => {
  const rows = words.map((text) =>
    JSON.stringify(what === "pairs" ? { prompt: "I", chosen: text, rejected: "no" } : { text }),
  );
  const valid = ["--valid-data", at(`many-${what}.jsonl`), ...VALID];
  const { peak, plan } = await peakOf(`many-${what}`, rows, ...args, ...valid, "--steps", "6");
  expect(peak - plan).toBeLessThanOrEqual(10 * 256); // each shape has a constant of its own, the gradient's seed
});

test.each([
  ["evaluations and samples", ["--valid-split", "0.5", ...VALID, ...LONG]],
  [
    "samples of more tokens than a batch",
    ["--batch-size", "1", "--checkpointing", "--valid-split", "0.25", ...VALID, ...LONG],
  ],
  ["a start by EVA", ["--init", "eva", "--init-batches", "1"]],
  ["a start by LoRA-GA", ["--init", "lora_ga", "--init-batches", "1"]],
  ["noise on embeddings", ["--neftune-alpha", "5"]],
])("what a run takes with %s is at most what was planned", async (what, args) => {
  const { peak, plan } = await peakOf(what.replaceAll(" ", "-"), [ROW, ROW, ROW, ROW], ...args);
  expect(peak).toBeLessThanOrEqual(plan);
  expect(plan).toBeLessThan(1.6 * peak);
});
