/** What a training run leaves for people beside its adapter: README.md, report.html and, if asked for, TensorBoard's events. */
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { LoraAdapter } from "../lora/adapter.ts";
import { concatenated } from "../lora/combine.ts";
import { type Matrix, norms } from "../lora/plain-adapter.ts";
import { writeFileAtomic } from "../node.ts";
import { readAll } from "../tensor/tensor.ts";
import type { RateSweep } from "../train/find-learning-rate.ts";
import type { StepMetrics } from "../train/step-metrics.ts";
import { eventFileHeader, eventFileName, scalarEvent } from "../train/tensorboard.ts";
import { RATES } from "./find-rate.ts";
import { modelCard } from "./model-card.ts";
import { type Fact, reportPage } from "./report-page.ts";
import type { SaidCommand } from "./run-config.ts";
import { say } from "./session.ts";

interface RunDocuments {
  readonly out: string;
  readonly adapter: LoraAdapter;
  readonly baseModel: string;
  readonly said: SaidCommand;
  /** What the run was and came to, by the metrics of all its steps. */
  readonly facts: (metrics: readonly StepMetrics[]) => readonly Fact[];
  readonly tables: Readonly<Record<string, readonly Fact[]>>;
  readonly tensorboard: boolean;
}

/** Puts the documents into `out`, out of metrics.jsonl and samples.jsonl there. */
export async function writeDocuments(run: RunDocuments): Promise<void> {
  const { out, adapter, baseModel, tables } = run;
  const { line: command, config } = run.said;
  const metrics = await linesOf(join(out, "metrics.jsonl"));
  const facts = run.facts(metrics as unknown as readonly StepMetrics[]);
  const validation = metrics.flatMap(({ step, validation: found }) => (found ? [{ step, ...(found as object) }] : []));
  const samples = await linesOf(join(out, "samples.jsonl"));
  const rates = await textOf(join(out, RATES));
  const texts = { Configuration: config, Command: command, Profile: await textOf(join(out, "profile.txt")) };
  const page = {
    ...{ title: `LoRA of ${baseModel}`, facts, metrics, validation, tables, texts },
    samples: samples as unknown as readonly { step: number; prompt: string; text: string }[],
    norms: await updateNorms(adapter),
    rates: rates === "" ? undefined : (JSON.parse(rates) as RateSweep).points,
  };
  await writeFileAtomic(join(out, "report.html"), await reportPage(page));
  const { taskType = "CAUSAL_LM" } = adapter.config;
  await writeFileAtomic(
    join(out, "README.md"),
    modelCard({ baseModel, isOnHub: !existsSync(baseModel), taskType, facts, command }),
  );
  if (run.tensorboard) await writeEvents(out, metrics);
  say(`the run's report is ${join(out, "report.html")}`);
}

async function writeEvents(out: string, metrics: readonly Line[]): Promise<void> {
  const now = Date.now() / 1000;
  const events = metrics.map(({ step, validation, ...rest }) => {
    const named = (group: string, numbers: object): [string, number][] =>
      Object.entries(numbers).flatMap(([name, x]) => (typeof x === "number" ? [[`${group}/${name}`, x]] : []));
    const values = Object.fromEntries([...named("train", rest), ...named("validation", (validation ?? {}) as object)]);
    return scalarEvent({ step: Number(step), time: now, values });
  });
  await writeFileAtomic(join(out, eventFileName(now)), Buffer.concat([eventFileHeader(now), ...events]));
}

/** ‖s·(B·A − B₀·A₀)‖ of each module, where B₀ and A₀ are what it took from the base, if anything. */
async function updateNorms(adapter: LoraAdapter): Promise<{ module: string; norm: number }[]> {
  const { pairs, beginnings } = adapter;
  const factors = [...pairs].map(([module, { A, B, scale }]) => {
    const beginning = beginnings.get(module);
    return { module, scale, tensors: [A, B, ...(beginning ? [beginning.A, beginning.B] : [])] };
  });
  const values = await readAll(factors.flatMap(({ tensors }) => tensors));
  return factors.map(({ module, scale, tensors }) => {
    const [A, B, A0, B0] = tensors.map(({ shape: [rows = 0, columns = 0] }) => ({
      ...{ rows, columns, values: values.shift() as Float32Array },
    })) as [Matrix, Matrix, Matrix?, Matrix?];
    const begun = A0 && B0 ? [{ A: A0, B: B0, factor: -1 }] : [];
    return { module, norm: norms(concatenated([{ A, B, factor: 1 }, ...begun]), scale).BA };
  });
}

type Line = Readonly<Record<string, unknown>>;

/** The objects of a JSONL file of ours; none where there is no file. */
async function linesOf(path: string): Promise<Line[]> {
  const text = await textOf(path);
  return text.split("\n").flatMap((line) => (line === "" ? [] : [JSON.parse(line) as Line]));
}

const textOf = (path: string): Promise<string> => readFile(path, "utf8").catch(() => "");
