// What a training run leaves beside its adapter. In this process: SwiftShader compiles its kernels once.
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseHTML } from "linkedom";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { parse } from "yaml";
import { sparkline } from "../../src/cli/progress.ts";
import { withConfig } from "../../src/cli/run-config.ts";
import { trainCommand } from "../../src/cli/train.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { writeTinyModel } from "../tiny-model.ts";

let home = "";
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-documents-"));
  await writeTinyModel(at("model"), { tokenizer: true });
  await writeFile(at("rows.jsonl"), '{"text":"Once there was a fox."}\n{"text":"One day it rained."}\n');
});
afterAll(() => rm(home, { recursive: true, force: true }));

async function train(...args: string[]): Promise<void> {
  const command = trainCommand();
  await command.parseAsync(await withConfig(command, args), { from: "user" });
}

const lines = async (file: string): Promise<Record<string, unknown>[]> =>
  (await readFile(at(file), "utf8"))
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line) as Record<string, unknown>);

test("a run leaves its configuration, card, report, samples and events, and its configuration makes the same run", async () => {
  await train(
    ...["--model", at("model"), "--data", at("rows.jsonl"), "--valid-data", at("rows.jsonl"), "--out", at("first")],
    ...["--steps", "2", "--rank", "2", "--valid-every", "1", "--sample-prompt", "Once", "--tensorboard"],
    ...["--label-smoothing", "0.1", "--neftune-alpha", "5"],
  );
  const files = (await readdir(at("first"))).map((file) => file.replace(/\d{10}/, "N")).sort();
  expect(files).toEqual([
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "best",
    "events.out.tfevents.N.lowrank",
    "metrics.jsonl",
    "report.html",
    "run.yaml",
    "samples.jsonl",
  ]);
  expect((await lines("first/samples.jsonl")).map(({ step, prompt }) => ({ step, prompt }))).toEqual([
    { step: 1, prompt: "Once" },
    { step: 2, prompt: "Once" },
  ]);
  const { document } = parseHTML(await readFile(at("first/report.html"), "utf8"));
  const [{ accuracy } = {}] = (await lines("first/metrics.jsonl")).map(
    ({ validation }) => validation as { accuracy?: number },
  );
  expect(accuracy).toBeGreaterThanOrEqual(0);
  expect(accuracy).toBeLessThanOrEqual(1);
  const facts = Object.fromEntries(
    [...document.querySelectorAll("tr")].map((tr) => [...tr.children].map((cell) => cell.textContent)),
  );
  expect(facts.validation).toMatch(/^loss \d\.\d{4}, accuracy \d+\.\d %$/);
  expect(document.querySelectorAll(".bar").length).toBe(14);
  expect([...document.querySelectorAll("h2")].map((heading) => heading.textContent)).toEqual([
    "Norm of the update, by module",
    "Samples",
    "Data",
    "GPU memory",
    "Configuration",
    "Command",
  ]);
  expect(await readFile(at("first/README.md"), "utf8")).toContain(`lowrank train --model ${at("model")}`);
  expect(parse(await readFile(at("first/run.yaml"), "utf8"))).toMatchObject({
    rank: 2,
    steps: 2,
    "label-smoothing": 0.1,
    "neftune-alpha": 5,
    "sample-prompt": ["Once"],
  });

  await train("--config", at("first/run.yaml"), "--out", at("second"));
  expect(await readFile(at("second/adapter_model.safetensors"))).toEqual(
    await readFile(at("first/adapter_model.safetensors")),
  );
}, 240_000);

test("a run that stops early has each sample once, and the update of one that learned nothing from its start is none", async () => {
  await train(
    ...["--model", at("model"), "--data", at("rows.jsonl"), "--valid-data", at("rows.jsonl"), "--out", at("still")],
    ...["--steps", "9", "--valid-every", "1", "--patience", "1", "--sample-prompt", "Once", "--rank", "2"],
    ...["--learning-rate", "0", "--init", "pissa"],
  );
  expect((await lines("still/samples.jsonl")).map(({ step }) => step)).toEqual([1, 2]);
  const { document } = parseHTML(await readFile(at("still/report.html"), "utf8"));
  const norms = [...document.querySelectorAll(".bar span:last-child")].map((span) => Number(span.textContent));
  expect(norms).toHaveLength(14);
  expect(Math.max(...norms)).toBeLessThanOrEqual(1e-6);
}, 240_000);

test("a dry run writes nothing", async () => {
  await train("--config", at("first/run.yaml"), "--out", at("dry"), "--dry-run");
  expect(await readdir(at("dry"))).toEqual([]);
}, 120_000);

test("a sparkline has the course of the losses in few bars", () => {
  expect(sparkline([8, 7, 6, 5, 4, 3, 2, 1])).toBe("█▇▆▅▄▃▂▁");
  expect(sparkline([1, 1, 4, 4], 2)).toBe("▁█");
  expect(sparkline([2, 2])).toBe("▁▁");
  expect(sparkline([])).toBe("");
});

test("--find-lr leaves the curve and its suggestion and trains nothing; --learning-rate auto trains with it, and goes on with it", async () => {
  const places = [
    "--model",
    at("model"),
    "--data",
    at("rows.jsonl"),
    "--rank",
    "2",
    "--no-shuffle",
    "--batch-size",
    "2",
  ];
  const printed: string[] = [];
  const stdout = vi.spyOn(process.stdout, "write").mockImplementation((line) => printed.push(String(line)) > 0);
  await train(...places, "--out", at("rates"), "--find-lr", "--json");
  stdout.mockRestore();
  expect((await readdir(at("rates"))).sort()).toEqual(["learning-rate.html", "learning-rate.json"]);
  const found = JSON.parse(await readFile(at("rates/learning-rate.json"), "utf8"));
  expect(JSON.parse(printed.at(-1) ?? "")).toEqual(found);
  const { points, suggestion } = found as { points: { learningRate: number; loss: number }[]; suggestion: number };
  expect(points[0]?.learningRate).toBe(1e-7);
  expect(points.map(({ learningRate }) => learningRate)).toContain(suggestion);
  const { document } = parseHTML(await readFile(at("rates/learning-rate.html"), "utf8"));
  expect([...document.querySelectorAll("figcaption")].map((e) => e.textContent)).toEqual(["Loss over learning rates"]);

  const auto = [...places, "--learning-rate", "auto", "--schedule", "constant", "--warmup", "0"];
  const plain = [...places, "--learning-rate", String(suggestion), "--schedule", "constant", "--warmup", "0"];
  await train(...plain, "--out", at("plain"), "--steps", "3");
  await train(...auto, "--out", at("auto"), "--steps", "2", "--save-every", "2");
  await train(...auto, "--out", at("auto"), "--steps", "3", "--resume");
  expect((await lines("auto/metrics.jsonl")).map((step) => step.learning_rate)).toEqual([
    suggestion,
    suggestion,
    suggestion,
  ]);
  expect(await readFile(at("auto/adapter_model.safetensors"))).toEqual(
    await readFile(at("plain/adapter_model.safetensors")),
  );
  expect(parse(await readFile(at("auto/run.yaml"), "utf8"))).toMatchObject({ "learning-rate": "auto" });
  expect(await readFile(at("auto/report.html"), "utf8")).toContain("Loss over learning rates");
  expect(await readFile(at("plain/report.html"), "utf8")).not.toContain("Loss over learning rates");
  await expect(train(...places, "--out", at("none"), "--learning-rate", "fast")).rejects.toThrow(
    new ShapeError("train: --learning-rate must be a number of at least 0, got fast"),
  );
}, 240_000);
