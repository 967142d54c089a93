import { Command, Option } from "commander";
import type { Gpu } from "../gpu/gpu.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import { attachLora } from "../lora/attach.ts";
import { initLora } from "../lora/init.ts";
import { attachEva } from "../lora/init-eva.ts";
import { initLoftq } from "../lora/init-loftq.ts";
import { initLoraGa } from "../lora/init-lora-ga.ts";
import { type LoraFa, loraFa } from "../lora/lora-fa.ts";
import { loadPeft } from "../lora/peft.ts";
import type { CausalModel } from "../models/causal.ts";
import { isClassifier } from "../models/config.ts";
import { openLinears } from "../models/load.ts";
import { diskDirectory, ensureWritableDirectory, loadModelFrom, type SavedCheckpoint, startAsIn } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { batchesPerEpoch, longest } from "../train/batches.ts";
import { calibrationBatches } from "../train/calibration.ts";
import type { Row } from "../train/data.ts";
import { evaluate } from "../train/loss.ts";
import { packRows } from "../train/packing.ts";
import type { Schedule } from "../train/schedule.ts";
import { languageTask } from "../train/task.ts";
import {
  amount,
  dataOption,
  jsonOption,
  keepsTwice,
  LORA_OPTIONS,
  type LoraArguments,
  loraConfig,
  loraOptions,
  maxLengthOption,
  modelOption,
  numeric,
  numLabelsOption,
  packingOption,
  plannedConfig,
  quantizeOption,
  type RowArguments,
  revisionOption,
  rowOptions,
  stepOptions,
  timeOption,
  validSplitOption,
  weightFormat,
  whole,
} from "./options.ts";
import { located, readAnyConfig } from "./places.ts";
import { budgetOption, demandFit } from "./plan.ts";
import { bitsLine, bytes, dataLine, number, openPeft, packingLine, readData, say, withGpu } from "./session.ts";
import { trainClassifier } from "./train-classifier.ts";
import { report } from "./train-report.ts";
import { begin, keptSettings } from "./train-resume.ts";
import { runTraining } from "./train-run.ts";
import { version } from "./version.ts";

export interface TrainArguments extends LoraArguments, RowArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly data: string;
  readonly out: string;
  readonly steps?: number;
  readonly epochs?: number;
  readonly batchSize: number;
  readonly gradAccumulation: number;
  readonly learningRate: number;
  readonly schedule: Schedule;
  readonly warmup: number;
  readonly weightDecay: number;
  readonly loraplusLrRatio?: number;
  readonly maxGradNorm: number;
  readonly maxLength?: number;
  readonly validSplit?: number;
  readonly packing?: boolean;
  readonly seed: number;
  readonly shuffle: boolean;
  readonly tune?: boolean;
  readonly initAdapter?: string;
  readonly checkpointing?: boolean;
  readonly budget?: number;
  readonly saveEvery?: number;
  readonly keep: number;
  readonly resume?: boolean;
  readonly validData?: string;
  readonly validEvery?: number;
  readonly patience?: number;
  readonly timeBudget?: number;
  readonly profile?: boolean;
  readonly json?: boolean;
  readonly numLabels?: number;
}

const EXAMPLES = `
Examples:
  $ lowrank train --model models/base --data train.jsonl --out adapters/pirate
  $ lowrank train --model HuggingFaceTB/SmolLM2-135M --data train.jsonl --out adapters/smol
  $ lowrank train --model models/base --data train.jsonl --out adapters/more --init-adapter adapters/pirate --steps 200
  $ lowrank train --model models/base --data train.jsonl --out adapters/qv --target-modules q_proj,v_proj --rank 8 --alpha 16
  $ lowrank train --model google-bert/bert-base-uncased --num-labels 2 --data rows.jsonl --out adapters/classes
  $ lowrank train --model models/base --data train.jsonl --out adapters/top --target-modules '/model\\.layers\\.[23]\\..*/'

  $ lowrank train --model models/base --data train.jsonl --out adapters/pirate --save-every 50 --resume
  $ lowrank train --model models/base --data train.jsonl --out adapters/pirate --valid-data valid.jsonl --patience 3

Ctrl-C ends training after the step in progress, saves the adapter and writes a checkpoint; a second one quits at once. The same command with
--resume goes on from the newest whole checkpoint in --out, bit for bit. Its settings must be the same; with --schedule constant, --steps
may be others. With --valid-data, --out has the adapter of the last step and --out/best that of the lowest validation loss.`;

export function trainCommand(): Command {
  const name = "train";
  const command = new Command(name)
    .description("fine-tune a LoRA adapter")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(dataOption())
    .requiredOption("--out <dir>", "where adapter_model.safetensors, adapter_config.json and metrics.jsonl go")
    .addOption(whole(name, "--steps <n>", "optimizer steps", 1).conflicts("epochs"))
    .addOption(whole(name, "--epochs <n>", "times to go through the data (default: 1)", 1))
    .addOption(amount(name, "--learning-rate <x>", "peak learning rate", 2e-4))
    .addOption(
      new Option("--schedule <name>", "course of the learning rate after warmup")
        .choices(["linear", "cosine", "constant"])
        .default("linear"),
    )
    .addOption(
      numeric(name, "--warmup <fraction>", "share of the steps over which the learning rate rises from 0", {
        rule: "a fraction from 0 to 1",
        holds: (x) => x >= 0 && x <= 1,
        preset: 0.03,
      }),
    )
    .addOption(amount(name, "--weight-decay <x>", "decoupled weight decay", 0))
    .addOption(
      numeric(name, "--loraplus-lr-ratio <x>", "B learns so many times as fast as A (LoRA+)", {
        rule: "a number above 0",
        holds: (x) => x > 0 && Number.isFinite(x),
      }),
    )
    .addOption(amount(name, "--max-grad-norm <x>", "scale gradients down to this norm; 0: never", 1))
    .addOption(maxLengthOption(name))
    .addOption(numLabelsOption(name))
    .addOption(whole(name, "--seed <n>", "seed of the adapter's start, of the order of the rows and of dropout", 0, 0))
    .option("--no-shuffle", "keep the order of the file")
    .option("--tune", "first time the kernels on this device and keep the fastest for all later runs")
    .addOption(
      new Option(
        "--init-adapter <place>",
        "go on from this adapter: a directory, or org/name[@revision] on the Hub",
      ).conflicts(LORA_OPTIONS),
    )
    .addOption(whole(name, "--save-every <n>", "save the adapter and a checkpoint after every so many steps, too", 1))
    .addOption(whole(name, "--keep <n>", "checkpoints that are kept", 1, 2))
    .option("--resume", "go on from the newest checkpoint in --out")
    .addOption(
      new Option("--valid-data <place>", "evaluate on these rows now and then, written as --data").conflicts(
        "validSplit",
      ),
    )
    .addOption(whole(name, "--valid-every <n>", "steps between evaluations (default: a tenth of the steps)", 1))
    .addOption(whole(name, "--patience <n>", "stop after so many evaluations in a row without a lower loss", 1))
    .addOption(timeOption(name, "--time-budget <time>", "stop and save after 90s, 20m or 1.5h"))
    .option(
      "--profile",
      "time the kernels of step 3 (or the last) and write profile.txt, .html and .trace.json to --out",
    )
    .addOption(jsonOption());
  for (const option of [...rowOptions(), validSplitOption(name), packingOption()]) command.addOption(option);
  for (const option of [...loraOptions(name), ...stepOptions(name), budgetOption(name)]) command.addOption(option);
  return command.addHelpText("after", EXAMPLES).action(run);
}

async function run(given: TrainArguments): Promise<void> {
  await ensureWritableDirectory(given.out);
  const options = await located(given, true, readAnyConfig);
  if (await isClassifier(diskDirectory(options.model))) return trainClassifier(options);
  if (options.numLabels !== undefined)
    throw new ShapeError("train: --num-labels is for encoders with a classifier. Leave it out");
  const { batchSize, gradAccumulation, seed, checkpointing = false, packing = false } = options;
  const read = await readData(options.model, options.data, options.maxLength, options);
  const { stats, maxLength } = read;
  say(dataLine(stats, maxLength));
  const rows = packing ? packRows(read.rows, maxLength) : read.rows;
  if (packing) say(packingLine(read.rows, rows, batchSize));
  const perEpoch = batchesPerEpoch({ rows: rows.length, batchSize });
  const steps = options.steps ?? Math.ceil(((options.epochs ?? 1) * perEpoch) / gradAccumulation);
  const warmupSteps = Math.ceil(options.warmup * steps);
  const valid = await readValidation(options, read.valid, maxLength);
  const settings = await keptSettings(options, { steps, warmupSteps, rows });
  const saved = await begin(options.out, options.resume ?? false, settings, version());
  const size = {
    batchSize: Math.min(batchSize, rows.length),
    gradAccumulation,
    checkpointing,
    takesFromBase: keepsTwice(options),
    loraFa: options.loraFa ?? false,
    weights: weightFormat(options.quantize),
    maxLength: longest(rows),
    packing,
  };

  const work = async (gpu: Gpu): Promise<void> => {
    const started = performance.now();
    const plan = await demandFit(
      gpu,
      options.model,
      options.initAdapter ?? plannedConfig(options),
      size,
      options.budget,
    );
    say(
      `memory: at most ${bytes(plan.peak)} of the GPU's, ${bytes(plan.weights)} of it weights, ${bitsLine(plan.bits)}`,
    );
    const model = await loadModelFrom(gpu, options.model, { weights: size.weights });
    model.checkpointing = checkpointing;
    const adapter = await startAdapter(model, options, rows, saved);
    const trained: TrainedParts = options.loraFa ? await loraFa(adapter) : { parameters: adapter.parameters };
    const trainable = trained.parameters.reduce((sum, p) => sum + p.size, 0);
    say(
      `adapter: rank ${adapter.config.r} on ${adapter.pairs.size + adapter.tables.size} layers, ${number(trainable)} parameters to train`,
    );
    const { first, last, interrupted, skipped } = await runTraining({
      ...options,
      ...{ ...trained, task: languageTask(model, 0, packing), adapter, rows, steps, warmupSteps, settings, saved },
      rates: options.loraplusLrRatio === undefined ? undefined : adapter.rates(options.loraplusLrRatio),
      shuffleSeed: options.shuffle ? seed : undefined,
      validation: valid && {
        every: options.validEvery ?? Math.ceil(steps / 10),
        evaluate: () => evaluate(model, valid, batchSize),
        patience: options.patience,
      },
    });
    if (interrupted) process.exitCode = 130;
    report(gpu, options.json ?? false, {
      steps: last?.step ?? saved?.step ?? 0,
      loss_first: first?.loss ?? null,
      loss_last: last?.loss ?? null,
      loss_valid: last?.validation?.loss ?? null,
      out: options.out,
      interrupted,
      rows: stats.rows,
      truncated: stats.truncated,
      dropped: stats.dropped,
      tokens: stats.tokens,
      trainable_parameters: trainable,
      peak_bytes: gpu.counters().bytesPeak,
      planned_bytes: plan.peak,
      skipped_steps: skipped,
      seconds: (performance.now() - started) / 1000,
    });
  };
  await withGpu(work, options.budget === undefined ? {} : { budgetBytes: options.budget });
}

async function readValidation(
  options: TrainArguments,
  held: readonly Row[] | undefined,
  maxLength: number,
): Promise<readonly Row[] | undefined> {
  const { model, validData, validEvery, patience } = options;
  if (validData !== undefined) {
    const { validSplit, ...others } = options;
    return (await readData(model, validData, maxLength, { ...others, splits: ["valid", "test"] })).rows;
  }
  if (!held && (validEvery !== undefined || patience !== undefined))
    throw new ShapeError(
      "train: --valid-every and --patience need --valid-data, --valid-split or a directory with a valid file, got none",
    );
  return held;
}

type TrainedParts = Pick<LoraFa, "parameters"> & Partial<LoraFa>;

/** As it begins; one that goes on gets the values of its parameters from the checkpoint's state. */
async function startAdapter(
  model: CausalModel,
  options: TrainArguments,
  rows: readonly Row[],
  saved: SavedCheckpoint | undefined,
): Promise<LoraAdapter> {
  const { initAdapter, init, seed } = options;
  const isGiven = initAdapter !== undefined || init === "eva" || init === "loftq"; // by the file alone
  if (saved && isGiven) return loadPeft(model, saved.directory);
  if (initAdapter !== undefined) return openPeft(model, initAdapter);
  if (!saved && (init === "eva" || init === "lora_ga")) return startByData(model, options, rows);
  const adapter = attachLora(model, loraConfig(options), seed);
  if (saved && keepsTwice(options)) await startAsIn(saved, adapter);
  else if (init === "loftq") await initLoftq(adapter, await openLinears(diskDirectory(options.model)), { seed });
  else if (init !== undefined && init !== "eva" && init !== "lora_ga") await initLora(adapter, init, seed);
  return adapter;
}

async function startByData(model: CausalModel, options: TrainArguments, rows: readonly Row[]): Promise<LoraAdapter> {
  const { init, seed, batchSize, initBatches } = options;
  const batches = calibrationBatches(model, rows, { batchSize, batches: initBatches });
  try {
    if (init === "eva") return await attachEva(model, loraConfig(options), batches, { seed });
    const adapter = attachLora(model, loraConfig(options), seed);
    await initLoraGa(adapter, batches, { seed });
    return adapter;
  } finally {
    for (const batch of batches) batch.destroy();
  }
}
