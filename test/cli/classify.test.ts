// Encoders with a classifier, through the real command: train, evaluate, and what Laplace's approximation makes of it.
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Command } from "commander";
import { afterAll, beforeAll, expect, test } from "vitest";
import { evalCommand } from "../../src/cli/eval.ts";
import { trainCommand } from "../../src/cli/train.ts";
import { FormatError } from "../../src/io/errors.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { lastJson, lowrank } from "./run.ts";

let home = "";
const at = (name: string): string => join(home, name);
const run = (command: Command, ...args: string[]): Promise<Command> => command.parseAsync(args, { from: "user" });

const TEXTS = ["the film was good", "i loved it !", "very fun and great", "the plot was bad", "i hated it .", "boring"];
const lines = (rows: readonly object[]): string => rows.map((row) => `${JSON.stringify(row)}\n`).join("");

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-classify-"));
  for (const folder of ["models/bert", "wordpiece"])
    for (const file of (await readdir(`test/golden/${folder}`)).filter((name) => /^(config|model|token)/.test(name)))
      await cp(`test/golden/${folder}/${file}`, at(`model/${file}`));
  await writeFile(at("rows.jsonl"), lines(TEXTS.map((text, i) => ({ text, label: Number(i < 3) }))));
});
afterAll(() => rm(home, { recursive: true, force: true }));

const modelArgs = (): string[] => ["--model", at("model"), "--num-labels", "2", "--data", at("rows.jsonl")];

test("a new classifier is trained", async () => {
  const settings = ["--rank", "2", "--alpha", "8", "--learning-rate", "0.01", "--epochs", "20", "--batch-size", "6"];
  const trained = await lowrank(["train", ...modelArgs(), "--out", at("adapter"), ...settings, "--json"]);
  expect(trained.code, trained.stderr).toBe(0);
  const outcome = lastJson(trained);
  expect(outcome).toMatchObject({ steps: 20, rows: 6, truncated: 0, tokens: 33, interrupted: false, skipped_steps: 0 });
  expect(Number(outcome.loss_last)).toBeLessThan(Number(outcome.loss_first) / 2);
  expect(trained.stderr).toContain("data: 6 rows (0 truncated to 32 tokens), 33 tokens; LABEL_0 3, LABEL_1 3");
  expect(trained.stderr).toContain("the classifier is new, for 2 classes: it has to be trained, and is saved with the");
  expect(trained.stderr).toContain(", and classifier whole: ");
  expect(trained.stderr).toContain(`the adapter of step 20 is saved in ${at("adapter")}`);
  const metrics = (await readFile(at("adapter/metrics.jsonl"), "utf8")).trimEnd().split("\n");
  expect(metrics).toHaveLength(20);
});

test("it is evaluated by its adapter, and made less sure by Laplace", async () => {
  const found = await lowrank([
    "eval",
    ...modelArgs(),
    "--adapter",
    at("adapter"),
    "--laplace",
    at("rows.jsonl"),
    "--samples",
    "50",
    "--json",
  ]);
  expect(found.code, found.stderr).toBe(0);
  const { loss, accuracy, f1, auc, macro_f1, rows, laplace } = lastJson(found);
  expect({ accuracy, f1, auc, macro_f1, rows }).toEqual({ accuracy: 1, f1: 1, auc: 1, macro_f1: 1, rows: 6 });
  expect(Number(loss)).toBeLessThan(Math.log(2) / 2);
  const { prior_precision, rank, before, after } = laplace as Record<string, Record<string, number>>;
  expect(Number(prior_precision)).toBeGreaterThan(0);
  expect(Number(rank)).toBeLessThanOrEqual(6);
  expect(before?.nll).toBeCloseTo(Number(loss), 5);
  expect(after?.nll).toBeGreaterThan(before?.nll ?? Number.NaN); // all were right: to be less sure of them costs
});

test("--find-lr tries rates on rows with classes, too, and leaves a run in its place as it is", async () => {
  const before = await readdir(at("adapter"), { recursive: true });
  const metrics = await readFile(join(at("adapter"), "metrics.jsonl"), "utf8");
  const found = await lowrank(["train", ...modelArgs(), "--out", at("adapter"), "--find-lr", "--json"]);
  expect(found.code, found.stderr).toBe(0);
  const { points, suggestion } = lastJson(found) as { points: object[]; suggestion: number };
  expect(points.length).toBeGreaterThan(10);
  expect(suggestion).toBeGreaterThan(1e-7);
  expect(suggestion).toBeLessThan(1);
  expect((await readdir(at("adapter"), { recursive: true })).sort()).toEqual(
    [...before, "learning-rate.html", "learning-rate.json"].sort(),
  );
  expect(await readFile(join(at("adapter"), "metrics.jsonl"), "utf8")).toBe(metrics);
});

test("what does not go together is refused", async () => {
  const model = ["--model", at("model"), "--data", at("rows.jsonl")];
  const train = (...more: string[]) => run(trainCommand(), ...model, "--out", at("out"), ...more);
  const evaluate = (...more: string[]) => run(evalCommand(), ...model, ...more);
  await expect(train("--quantize", "nf4")).rejects.toThrow(
    new ShapeError("train: --quantize is for models that predict tokens. Leave it out"),
  );
  await expect(train("--profile")).rejects.toThrow(
    new ShapeError("train: --profile is for models that predict tokens. Leave it out"),
  );
  for (const [flag, ...value] of [
    ["--valid-split", "0.5"],
    ["--loss-on", "all"],
    ["--chat-template", "x"],
    ["--packing"],
    ["--label-smoothing", "0.1"],
    ["--neftune-alpha", "5"],
  ])
    await expect(train(flag as string, ...value)).rejects.toThrow(
      new ShapeError(`train: ${flag} is for models that predict tokens. Leave it out`),
    );
  await expect(train("--patience", "2")).rejects.toThrow(
    new ShapeError("train: --valid-every and --patience of a classifier need --valid-data, got none"),
  );
  await expect(evaluate("--loss-on", "all")).rejects.toThrow(
    new ShapeError("eval: --loss-on is for models that predict tokens. Leave it out"),
  );
  await expect(evaluate("--preference", "dpo")).rejects.toThrow(
    new ShapeError("eval: --preference is for models that predict tokens. Leave it out"),
  );
  await expect(evaluate("--num-labels", "2")).rejects.toThrow(
    new ShapeError("eval: --num-labels makes a new classifier, which an --adapter has to fill, got none. Give it"),
  );
  await expect(evaluate("--laplace", at("rows.jsonl"))).rejects.toThrow(
    new ShapeError("eval: --laplace is about an adapter's parameters, got no --adapter. Give it"),
  );
  await expect(evaluate("--prior-precision", "-1")).rejects.toThrow(
    new ShapeError("eval: --prior-precision must be auto or a number above 0, got -1"),
  );
  await writeFile(at("bad.jsonl"), lines([{ text: "a film", label: "good" }]));
  await expect(train("--data", at("bad.jsonl"))).rejects.toThrow(
    new FormatError(
      `${at("bad.jsonl")}:1: "label" must be a number from 0 to 2 or one of LABEL_0, LABEL_1, LABEL_2, got "good"`,
    ),
  );
  await writeTinyModel(at("llama"));
  await writeFile(at("ids.jsonl"), lines([{ input_ids: [1, 2] }]));
  const causal = ["--model", at("llama"), "--data", at("ids.jsonl"), "--num-labels", "2"];
  await expect(run(trainCommand(), ...causal, "--out", at("out"))).rejects.toThrow(
    new ShapeError("train: --num-labels is for encoders with a classifier. Leave it out"),
  );
  await expect(run(evalCommand(), ...causal)).rejects.toThrow(
    new ShapeError("eval: --num-labels is for encoders with a classifier. Leave it out"),
  );
});
