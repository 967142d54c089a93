/** `train` for encoders with a classifier. */
import type { LoraAdapter } from "../lora/adapter.ts";
import { attachLora } from "../lora/attach.ts";
import { initLora, type LoraInit } from "../lora/init.ts";
import { loadPeft } from "../lora/peft.ts";
import type { BertClassifier } from "../models/bert.ts";
import { type SavedCheckpoint, startAsIn } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { classificationTask, evaluateClassifier } from "../train/classify.ts";
import { openClassifier, readClassRows, refuse } from "./classifiers.ts";
import { keepsTwice, loraConfig } from "./options.ts";
import type { SaidCommand } from "./run-config.ts";
import { number, openPeft, say, withGpu } from "./session.ts";
import { follow, type LocatedArguments, stepsOf } from "./train-course.ts";
import { begin, keptSettings } from "./train-resume.ts";
import { version } from "./version.ts";

export async function trainClassifier(options: LocatedArguments, said: SaidCommand): Promise<void> {
  const { quantize, profile, budget, init, seed, batchSize } = options;
  const isByData = init === "eva" || init === "lora_ga" || init === "loftq";
  refuse("train", {
    ...{ "--quantize": quantize, "--profile": profile, "--budget": budget, "--lora-fa": options.loraFa },
    ...{ "--sample-prompt": options.samplePrompt, "--packing": options.packing, "--dry-run": options.dryRun },
    ...{
      "--preference": options.preference,
      "--label-smoothing": options.labelSmoothing,
      "--valid-split": options.validSplit,
      "--loss-on": options.lossOn,
    },
    ...{ "--chat-template": options.chatTemplate, "--prompt-separator": options.promptSeparator },
    "--neftune-alpha": options.neftuneAlpha,
    ...(isByData && { [`--init ${init}`]: init }),
  });
  const { rows, stats } = await readClassRows(options, options.data);
  const { steps, warmupSteps } = stepsOf(options, rows.length);
  const valid = options.validData === undefined ? undefined : (await readClassRows(options, options.validData)).rows;
  if (!valid && (options.validEvery !== undefined || options.patience !== undefined))
    throw new ShapeError("train: --valid-every and --patience of a classifier need --valid-data, got none");
  const settings = await keptSettings(options, { steps, warmupSteps, rows });
  const saved = await begin(options, settings, version());
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
    await follow({
      ...{ options, said, gpu, started, adapter, trained: { parameters }, task: classificationTask(model) },
      ...{ rows, steps, warmupSteps, settings, saved, stats: { ...stats, dropped: 0 } },
      evaluate: valid && (() => evaluateClassifier(model, valid, batchSize)),
      data: [
        ["rows", number(stats.rows)],
        ["truncated", number(stats.truncated)],
        ["tokens", number(stats.tokens)],
      ],
    });
  });
}

/** As it begins; one that goes on gets the values of its parameters from the checkpoint's state. */
async function startAdapter(
  model: BertClassifier,
  options: LocatedArguments,
  saved: SavedCheckpoint | undefined,
): Promise<LoraAdapter> {
  const { initAdapter, init, seed } = options;
  if (initAdapter !== undefined) return saved ? loadPeft(model, saved.directory) : openPeft(model, initAdapter);
  const adapter = attachLora(model, loraConfig(options), seed);
  if (saved && keepsTwice(options)) await startAsIn(saved, adapter);
  else if (init !== undefined) await initLora(adapter, init as LoraInit, seed);
  return adapter;
}
