/** `train` for encoders with a classifier. */
import type { LoraAdapter } from "../lora/adapter.ts";
import { attachLora } from "../lora/attach.ts";
import { initLora, type LoraInit } from "../lora/init.ts";
import { loadPeft } from "../lora/peft.ts";
import type { BertClassifier } from "../models/bert.ts";
import { type SavedCheckpoint, startAsIn } from "../node.ts";
import { batchesPerEpoch } from "../train/batches.ts";
import { classificationTask, evaluateClassifier } from "../train/classify.ts";
import { openClassifier, readClassRows, refuse } from "./classifiers.ts";
import { keepsTwice, loraConfig } from "./options.ts";
import type { SaidCommand } from "./run-config.ts";
import { deviceName, number, openPeft, say, withGpu } from "./session.ts";
import type { TrainArguments } from "./train.ts";
import { writeDocuments } from "./train-documents.ts";
import { report, runFacts } from "./train-report.ts";
import { begin, keptSettings } from "./train-resume.ts";
import { runTraining } from "./train-run.ts";
import { version } from "./version.ts";

type Arguments = TrainArguments & { readonly baseModel: string };

export async function trainClassifier(options: Arguments, said: SaidCommand): Promise<void> {
  const { quantize, profile, budget, init, seed, batchSize } = options;
  const isByData = init === "eva" || init === "lora_ga" || init === "loftq";
  refuse("train", {
    ...{ "--quantize": quantize, "--profile": profile, "--budget": budget, "--lora-fa": options.loraFa },
    ...{ "--sample-prompt": options.samplePrompt, "--packing": options.packing, "--dry-run": options.dryRun },
    "--preference": options.preference,
    ...(isByData && { [`--init ${init}`]: init }),
  });
  const { rows, stats } = await readClassRows(options, options.data);
  const perEpoch = batchesPerEpoch({ rows: rows.length, batchSize });
  const steps = options.steps ?? Math.ceil(((options.epochs ?? 1) * perEpoch) / options.gradAccumulation);
  const warmupSteps = Math.ceil(options.warmup * steps);
  const valid = options.validData === undefined ? undefined : (await readClassRows(options, options.validData)).rows;
  const settings = await keptSettings(options, { steps, warmupSteps, rows });
  const saved = await begin(options.out, options.resume ?? false, settings, version());
  await withGpu(async (gpu) => {
    const started = performance.now();
    const model = await openClassifier(gpu, options, seed);
    model.checkpointing = options.checkpointing ?? false;
    const adapter = await startAdapter(model, options, saved);
    const { parameters } = adapter;
    const trainable = parameters.reduce((sum, p) => sum + p.size, 0);
    const whole = [...adapter.saved.keys()].join(", ");
    say(
      `adapter: rank ${adapter.config.r} on ${adapter.pairs.size} layers, and ${whole} whole: ${number(trainable)} parameters to train`,
    );
    const { first, last, interrupted, skipped } = await runTraining({
      ...options,
      ...{ task: classificationTask(model), parameters, adapter, rows, steps, warmupSteps, settings, saved },
      rates: options.loraplusLrRatio === undefined ? undefined : adapter.rates(options.loraplusLrRatio),
      shuffleSeed: options.shuffle ? seed : undefined,
      validation: valid && {
        every: options.validEvery ?? Math.ceil(steps / 10),
        evaluate: () => evaluateClassifier(model, valid, batchSize),
        patience: options.patience,
      },
    });
    if (interrupted) process.exitCode = 130;
    const seconds = (performance.now() - started) / 1000;
    await writeDocuments({
      ...{ out: options.out, adapter, baseModel: options.baseModel, said, tensorboard: options.tensorboard ?? false },
      facts: (metrics) => runFacts({ adapter, trainable, seconds, device: deviceName(gpu.info) }, metrics),
      tables: {
        Data: [
          ["rows", number(stats.rows)],
          ["tokens", number(stats.tokens)],
        ],
      },
    });
    report(gpu, options.json ?? false, {
      loss_valid: last?.validation?.loss ?? null,
      ...{ steps: last?.step ?? saved?.step ?? 0, loss_first: first?.loss ?? null, loss_last: last?.loss ?? null },
      ...{
        out: options.out,
        interrupted,
        rows: stats.rows,
        truncated: stats.truncated,
        dropped: 0,
        tokens: stats.tokens,
      },
      ...{ trainable_parameters: trainable, peak_bytes: gpu.counters().bytesPeak, skipped_steps: skipped },
      seconds,
    });
  });
}

/** As it begins; one that goes on gets the values of its parameters from the checkpoint's state. */
async function startAdapter(
  model: BertClassifier,
  options: Arguments,
  saved: SavedCheckpoint | undefined,
): Promise<LoraAdapter> {
  const { initAdapter, init, seed } = options;
  if (initAdapter !== undefined) return saved ? loadPeft(model, saved.directory) : openPeft(model, initAdapter);
  const adapter = attachLora(model, loraConfig(options), seed);
  if (saved && keepsTwice(options)) await startAsIn(saved, adapter);
  else if (init !== undefined) await initLora(adapter, init as LoraInit, seed);
  return adapter;
}
