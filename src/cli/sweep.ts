import { join } from "node:path";
import { Command } from "commander";
import { FormatError } from "../io/errors.ts";
import { wantedOf } from "../lora/attach.ts";
import { ensureWritableDirectory, loadModelFrom, writeFileAtomic } from "../node.ts";
import { isPacked, longest } from "../train/batches.ts";
import type { Row } from "../train/data.ts";
import { gridPoints, type SearchPoint } from "../train/search.ts";
import { sweep } from "../train/sweep.ts";
import { jsonOption, parseTargets, whole } from "./options.ts";
import { located } from "./places.ts";
import { budgetOf, budgetOption, fitTogether } from "./plan.ts";
import { dataLine, readData, readTextFile, result, say, withGpu } from "./session.ts";
import { readSweepConfig, type SweepConfig } from "./sweep-config.ts";
import { addTrial, bestOf, byValue, candidate, type FinishedTrial, openSweep, settle } from "./sweep-files.ts";
import { sweepPage, sweepTable } from "./sweep-page.ts";
import { groupsOf, runTrial, runTrialsTogether, type TrialBench } from "./sweep-trial.ts";

interface SweepArguments {
  readonly config: string;
  readonly out: string;
  readonly together?: number;
  readonly budget?: number;
  readonly json?: boolean;
}

const HELP = `
A configuration:
  model: models/base                 # as --model of lowrank train
  data: train.jsonl
  valid-data: valid.jsonl            # or valid-split: 0.1, or none where data is a directory with a valid file
  strategy: bayes                    # or random, grid (of a range three values)
  trials: 20
  together: 2                        # trials proposed and trained at once; 4 for random and grid
  steps: 200                         # of each trial, which is evaluated 5 times (evaluations)
  alpha: 32                          # fixed; batch-size, max-length and seed go here, too
  space:
    rank: [4, 8, 16]
    learning-rate: {min: 1e-5, max: 1e-3, log: true}
    target-modules: [all-linear, "q_proj,v_proj"]
    dropout: {min: 0, max: 0.2}

Settings of a space, or fixed: rank, alpha, learning-rate, target-modules, dropout, warmup, weight-decay. A trial that is behind the median of the
others ends early. Trials without dropout that have the same target-modules train in one batch on the same base, as many as fit into --budget, or into
the machine's memory on a software adapter; on a GPU without --budget they train one by one. The same command goes on after the trials that are in --out; trials may be raised.`;

export function sweepCommand(): Command {
  return new Command("sweep")
    .description("train with many settings and find those with the lowest validation loss")
    .requiredOption("--config <file>", "YAML file of what is run and of the settings to look among")
    .requiredOption("--out <dir>", "where sweep.jsonl, sweep.html and the best adapter go")
    .addOption(whole("sweep", "--together <n>", "trials to propose and train at once, in place of the file's", 1))
    .addOption(budgetOption("sweep"))
    .addOption(jsonOption())
    .addHelpText("after", HELP)
    .action(run);
}

async function run({ config: path, out, together, budget, json = false }: SweepArguments): Promise<void> {
  const config = readSweepConfig(path, await readTextFile(path), together);
  const { model: directory, baseModel } = await located({ model: config.model });
  const { rows, valid } = await readRows(config, directory, path);
  await ensureWritableDirectory(out);
  const done = await openSweep(out, config);
  if (done.length > 0) say(`going on after ${done.length} trials`);
  const stop = new AbortController();
  const onInterrupt = (): void => {
    say("stopping after the step in progress, whose trial is dropped; Ctrl-C again quits at once");
    stop.abort();
  };
  process.once("SIGINT", onInterrupt);
  try {
    if (done.length < trialCount(config))
      await withGpu(async (gpu) => {
        const model = await loadModelFrom(gpu, directory, { weights: "stored" });
        const bench = { model, baseModel, config, rows, valid, signal: stop.signal };
        await runTrials(bench, out, done, await fitting(bench, directory, budget));
      });
  } finally {
    process.off("SIGINT", onInterrupt);
  }
  await settle(out, done);
  await writeFileAtomic(join(out, "sweep.html"), sweepPage(config, done));
  report(config, out, done, json);
  if (stop.signal.aborted && done.length < trialCount(config)) process.exitCode = 130;
}

/** Of the whole sweep: a grid may have fewer points than there may be trials. */
const trialCount = ({ strategy, trials, space }: SweepConfig): number =>
  strategy === "grid" ? Math.min(trials, gridPoints(space).length) : trials;

const settingsLine = (point: SearchPoint): string =>
  Object.entries(point)
    .map(([name, value]) => `${name} ${value}`)
    .join(", ");

async function readRows(
  { data, validData, validSplit, maxLength, seed }: SweepConfig,
  model: string,
  path: string,
): Promise<{ readonly rows: readonly Row[]; readonly valid: readonly Row[] }> {
  const read = await readData(model, data, maxLength, { validSplit, seed });
  say(dataLine(read.stats, read.maxLength));
  const valid = validData
    ? (await readData(model, validData, maxLength, { splits: ["valid", "test"] })).rows
    : read.valid;
  if (!valid)
    throw new FormatError(`${path}: must have "valid-data", "valid-split" or a directory with a valid file, got none`);
  return { rows: read.rows, valid };
}

type Fits = Parameters<typeof groupsOf>[2];

/** Whether adapters can train at once within the budget. */
async function fitting({ model, config, rows, valid }: TrialBench, directory: string, asked?: number): Promise<Fits> {
  const { gpu } = model;
  const budget = budgetOf(gpu, asked);
  if (budget === undefined) {
    if (config.together > 1) say("trials train one by one: to know how many fit at once, give --budget");
    return async () => false;
  }
  const { batchSize } = config;
  const size = {
    ...{ weights: "stored" as const, batchSize, maxLength: longest(rows), packing: isPacked(rows) },
    evaluation: { batchSize, maxLength: longest(valid) },
  };
  return (configs) => fitTogether(gpu, directory, configs, size, budget);
}

/** Runs what is left, and adds each trial to `done` once it is kept. Throws ShapeError first where targets match nothing. */
async function runTrials(bench: TrialBench, out: string, done: FinishedTrial[], fits: Fits): Promise<void> {
  const { model, config, signal } = bench;
  const { space, strategy, trials, together, seed, fixed } = config;
  const which = space["target-modules"] ?? { values: [fixed["target-modules"] ?? ""] };
  for (const targets of "values" in which ? which.values : [])
    wantedOf({ r: 1, alpha: 1, targetModules: parseTargets(String(targets)) }, model);
  const started = new Map<number, number>();
  const announce = (trial: number, point: SearchPoint): void => {
    started.set(trial, performance.now());
    say(`trial ${trial} of ${trialCount(config)}: ${settingsLine(point)}`);
  };
  const toBeat = (): number => bestOf(done)?.value ?? Number.POSITIVE_INFINITY;
  const left = sweep({
    ...{ space, strategy, trials, seed, done, signal },
    run: (point, trial) => {
      announce(trial, point);
      return runTrial(bench, point, candidate(out, trial), toBeat());
    },
    together: {
      most: together,
      groups: (points) => groupsOf(bench, points, fits),
      run: (chosen) => {
        for (const { trial, point } of chosen) announce(trial, point);
        return runTrialsTogether(bench, chosen, (trial) => candidate(out, trial), toBeat());
      },
    },
  });
  for await (const trial of left) {
    const seconds = (performance.now() - (started.get(trial.trial) ?? Number.NaN)) / 1000;
    done.push({ ...trial, seconds });
    await addTrial(out, done);
    say(`trial ${trial.trial}: validation loss ${trial.value.toFixed(4)}${trial.stopped ? ", ended early" : ""}`);
  }
}

function report({ space }: SweepConfig, out: string, done: readonly FinishedTrial[], json: boolean): void {
  const best = bestOf(done);
  const lines = sweepTable(Object.keys(space), byValue(done));
  const widths = (lines[0] ?? []).map((_, i) => Math.max(...lines.map((line) => line[i]?.length ?? 0)));
  for (const line of lines) result(line.map((text, i) => text.padStart(widths[i] ?? 0)).join("  "));
  if (best)
    say(
      `the best adapter, of trial ${best.trial}, is in ${join(out, "best")}, the sweep's page in ${join(out, "sweep.html")}`,
    );
  if (json) result(JSON.stringify({ trials: byValue(done), best: best?.trial ?? null, out }));
}
