/** `train` for encoders with a classifier. */
import { join } from "node:path";
import type { Gpu } from "../gpu/gpu.ts";
import { attachLora, type LoraAdapter } from "../lora/adapter.ts";
import { initLora, type LoraInit } from "../lora/init.ts";
import type { BertClassifier } from "../models/bert.ts";
import { appendLine, loadPeftFrom, savePeftTo, writeFileAtomic } from "../node.ts";
import { batchesPerEpoch } from "../train/batches.ts";
import { classificationTask } from "../train/classify.ts";
import type { StepMetrics } from "../train/step-metrics.ts";
import { trainTask } from "../train/trainer.ts";
import { openClassifier, readClassRows, refuse } from "./classifiers.ts";
import { loraConfig } from "./options.ts";
import { Progress } from "./progress.ts";
import { bytes, deviceName, number, result, say, withGpu } from "./session.ts";
import type { TrainArguments } from "./train.ts";

type Arguments = TrainArguments & { readonly baseModel: string };

export async function trainClassifier(options: Arguments): Promise<void> {
  const { quantize, profile, budget, init } = options;
  const isByData = init === "eva" || init === "lora_ga" || init === "loftq";
  refuse("train", {
    ...{ "--quantize": quantize, "--profile": profile, "--budget": budget, "--lora-fa": options.loraFa },
    ...(isByData && { [`--init ${init}`]: init }),
  });
  const { rows, stats } = await readClassRows(options, options.data);
  const perEpoch = batchesPerEpoch({ rows: rows.length, batchSize: options.batchSize });
  const steps = options.steps ?? Math.ceil(((options.epochs ?? 1) * perEpoch) / options.gradAccumulation);
  await withGpu(async (gpu) => {
    const model = await openClassifier(gpu, options, options.seed);
    model.checkpointing = options.checkpointing ?? false;
    const adapter = await startAdapter(model, options);
    const trainable = adapter.parameters.reduce((sum, p) => sum + p.size, 0);
    const saved = [...adapter.saved.keys()].join(", ");
    say(
      `adapter: rank ${adapter.config.r} on ${adapter.pairs.size} layers, and ${saved} whole: ${number(trainable)} parameters to train`,
    );
    const started = performance.now();
    const all = await runTraining(model, adapter, rows, steps, options);
    const [first, last] = [all[0], all.at(-1)];
    const interrupted = all.length < steps;
    if (interrupted) process.exitCode = 130;
    report(gpu, options, {
      ...{ steps: all.length, loss_first: first?.loss ?? null, loss_last: last?.loss ?? null, out: options.out },
      ...{ interrupted, rows: stats.rows, truncated: stats.truncated, tokens: stats.tokens },
      ...{ trainable_parameters: trainable, peak_bytes: gpu.counters().bytesPeak },
      skipped_steps: all.filter(({ skipped }) => skipped).length,
      seconds: (performance.now() - started) / 1000,
    });
  });
}

async function startAdapter(model: BertClassifier, options: Arguments): Promise<LoraAdapter> {
  const { initAdapter, init, seed } = options;
  if (initAdapter !== undefined) return loadPeftFrom(model, initAdapter);
  const adapter = attachLora(model, loraConfig(options), seed);
  if (init !== undefined) await initLora(adapter, init as LoraInit, seed);
  return adapter;
}

/** Trains and saves, also where it is interrupted or fails, and gives the metrics of the steps that were done. */
async function runTraining(
  model: BertClassifier,
  adapter: LoraAdapter,
  rows: Awaited<ReturnType<typeof readClassRows>>["rows"],
  steps: number,
  options: Arguments,
): Promise<StepMetrics[]> {
  const { out, baseModel, saveEvery, seed, loraplusLrRatio } = options;
  const metricsFile = join(out, "metrics.jsonl");
  await writeFileAtomic(metricsFile, "");
  const progress = new Progress(steps);
  const stop = new AbortController();
  // Once: a second Ctrl-C finds the default again, which quits.
  const onInterrupt = (): void => {
    progress.end();
    say("stopping after the step in progress; Ctrl-C again quits at once without saving");
    stop.abort();
  };
  process.once("SIGINT", onInterrupt);
  const done: StepMetrics[] = [];
  try {
    const training = trainTask({
      ...{ task: classificationTask(model), parameters: adapter.parameters, adapter, seed, rows, steps },
      ...{ batchSize: options.batchSize, gradAccumulation: options.gradAccumulation },
      ...{ learningRate: options.learningRate, schedule: options.schedule, weightDecay: options.weightDecay },
      warmupSteps: Math.ceil(options.warmup * steps),
      maxGradNorm: options.maxGradNorm,
      rates: loraplusLrRatio === undefined ? undefined : adapter.rates(loraplusLrRatio),
      shuffleSeed: options.shuffle ? seed : undefined,
      ...{ signal: stop.signal, pauseEvery: saveEvery, tune: options.tune ?? false },
    });
    for await (const metrics of training) {
      done.push(metrics);
      await appendLine(metricsFile, JSON.stringify(metrics));
      progress.show(metrics);
      if (saveEvery && metrics.step % saveEvery === 0) await savePeftTo(adapter, out, baseModel);
    }
  } finally {
    progress.end();
    process.off("SIGINT", onInterrupt);
    if (done.some(({ skipped }) => !skipped)) {
      await savePeftTo(adapter, out, baseModel);
      say(`the adapter of step ${done.at(-1)?.step} is saved in ${out}`);
    } else say("no step is known to be done: no adapter was saved");
  }
  return done;
}

interface Outcome {
  readonly steps: number;
  readonly loss_first: number | null;
  readonly loss_last: number | null;
  readonly peak_bytes: number;
  readonly seconds: number;
}

function report<T extends Outcome>(gpu: Gpu, { json }: Arguments, outcome: T): void {
  if (json) {
    result(JSON.stringify({ ...outcome, device: deviceName(gpu.info), software: gpu.isSoftware }));
    return;
  }
  const { steps, loss_first, loss_last, seconds, peak_bytes } = outcome;
  const course = `loss ${loss_first?.toFixed(4) ?? "none"} → ${loss_last?.toFixed(4) ?? "none"}`;
  result(`${number(steps)} steps in ${number(seconds, 1)} s, ${course}, at most ${bytes(peak_bytes)} of GPU memory`);
}
