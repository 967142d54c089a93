/** What all kinds of training have in common: how long they go, and what is said and left at their end. */
import { join } from "node:path";
import type { Gpu } from "../gpu/gpu.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import type { LoraFa } from "../lora/lora-fa.ts";
import { type RunSettings, type SavedCheckpoint, writeFileAtomic } from "../node.ts";
import { batchesPerEpoch } from "../train/batches.ts";
import type { Row } from "../train/data.ts";
import type { RowTask } from "../train/task.ts";
import type { Evaluated } from "../train/validation.ts";
import { demandRate, findRate } from "./find-rate.ts";
import type { Fact } from "./report-page.ts";
import type { SaidCommand } from "./run-config.ts";
import { bytes, deviceName, result } from "./session.ts";
import type { TrainArguments } from "./train.ts";
import { writeDocuments } from "./train-documents.ts";
import { type Outcome, report, runFacts } from "./train-report.ts";
import { FOUND_RATE } from "./train-resume.ts";
import { runTraining, type Sample } from "./train-run.ts";

export type LocatedArguments = TrainArguments & { readonly baseModel: string };

/** What is trained of an adapter, and how. */
export type TrainedParts = Pick<LoraFa, "parameters"> & Partial<LoraFa>;

/** Steps in all, and those of the warmup. */
export function stepsOf(
  { steps: asked, epochs = 1, batchSize, gradAccumulation, warmup }: TrainArguments,
  rows: number,
): { readonly steps: number; readonly warmupSteps: number } {
  const steps = asked ?? Math.ceil((epochs * batchesPerEpoch({ rows, batchSize })) / gradAccumulation);
  return { steps, warmupSteps: Math.ceil(warmup * steps) };
}

interface Course<R extends Pick<Row, "inputIds">, B> {
  readonly options: LocatedArguments;
  readonly said: SaidCommand;
  readonly gpu: Gpu;
  /** By `performance.now()`. */
  readonly started: number;
  readonly task: RowTask<R, B>;
  readonly rows: readonly R[];
  readonly adapter: LoraAdapter;
  readonly trained: TrainedParts;
  readonly steps: number;
  readonly warmupSteps: number;
  readonly settings: RunSettings;
  readonly saved: SavedCheckpoint | undefined;
  /** Where there are rows to evaluate on. */
  readonly evaluate?: (() => Promise<Evaluated>) | undefined;
  readonly sample?: Sample | undefined;
  readonly stats: Pick<Outcome, "rows" | "truncated" | "dropped" | "tokens">;
  readonly data: readonly Fact[];
  /** Bytes planned, where they were. */
  readonly planned?: number;
  readonly memory?: readonly Fact[];
}

/** Trains, leaves the documents of the run and says what came of it, with `more` of the outcome, told whether the last step was evaluated. */
export async function follow<R extends Pick<Row, "inputIds">, B>(
  course: Course<R, B>,
  more: (isOfLast: boolean) => Partial<Outcome> = () => ({}),
): Promise<void> {
  const { options, said, gpu, started, adapter, trained, steps, saved, evaluate, planned, stats } = course;
  const { out, baseModel, seed, loraplusLrRatio, tensorboard = false } = options;
  const learned = {
    ...{ ...options, ...trained, task: course.task, adapter, rows: course.rows },
    maxLength: undefined, // rows were cut to it; memory and batches go by the longest that there is
    rates: loraplusLrRatio === undefined ? undefined : adapter.rates(loraplusLrRatio),
    shuffleSeed: options.shuffle ? seed : undefined,
  };
  const { learningRate: asked, steps: _, ...sweeping } = learned;
  if (options.findLr) {
    const { points, suggestion = null } = await findRate(sweeping, out);
    if (options.json) result(JSON.stringify({ points, suggestion }));
    else result(suggestion === null ? "the loss falls at no rate" : `learning rate ${suggestion.toExponential(2)}`);
    return;
  }
  await writeFileAtomic(join(out, "run.yaml"), said.config);
  const before = saved?.settings[FOUND_RATE];
  const learningRate = asked === "auto" ? Number(before ?? demandRate(await findRate(sweeping, out))) : asked;
  const { first, last, interrupted, skipped } = await runTraining({
    ...learned,
    ...{ learningRate, steps, saved, warmupSteps: course.warmupSteps, sample: course.sample },
    settings: { ...course.settings, ...(asked === "auto" && { [FOUND_RATE]: learningRate }) },
    validation: evaluate && {
      every: options.validEvery ?? Math.ceil(steps / 10),
      evaluate,
      patience: options.patience,
    },
  });
  if (interrupted) process.exitCode = 130;
  const peak = gpu.counters().bytesPeak;
  const seconds = (performance.now() - started) / 1000;
  const trainable = trained.parameters.reduce((sum, p) => sum + p.size, 0);
  const plan: Fact[] = planned === undefined ? [] : [["planned at most", bytes(planned)]];
  await writeDocuments({
    ...{ out, adapter, baseModel, said, tensorboard },
    facts: (metrics) => runFacts({ adapter, trainable, seconds, device: deviceName(gpu.info) }, metrics),
    tables: { Data: course.data, "GPU memory": [...plan, ["peak", bytes(peak)], ...(course.memory ?? [])] },
  });
  report(gpu, options.json ?? false, {
    ...{ steps: last?.step ?? saved?.step ?? 0, loss_first: first?.loss ?? null, loss_last: last?.loss ?? null },
    loss_valid: last?.validation?.loss ?? null,
    ...(last?.validation?.accuracy !== undefined && { accuracy_valid: last.validation.accuracy }),
    ...{ ...more(last?.validation !== undefined), out, interrupted },
    ...{ rows: stats.rows, truncated: stats.truncated, dropped: stats.dropped, tokens: stats.tokens },
    ...{ trainable_parameters: trainable, peak_bytes: peak, ...(planned !== undefined && { planned_bytes: planned }) },
    ...{ skipped_steps: skipped, seconds },
  });
}
