import { Command, Option } from "commander";
import { isClassifier } from "../models/config.ts";
import { diskDirectory, ensureWritableDirectory } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Schedule } from "../train/schedule.ts";
import {
  ABOVE_0,
  amount,
  dataOption,
  jsonOption,
  LORA_OPTIONS,
  type LoraArguments,
  loraOptions,
  lossOptions,
  maxLengthOption,
  modelOption,
  numeric,
  numLabelsOption,
  packingOption,
  preferenceOptions,
  quantizeOption,
  type RowArguments,
  rateOption,
  revisionOption,
  rowOptions,
  stepOptions,
  timeOption,
  validSplitOption,
  whole,
} from "./options.ts";
import { located, readAnyConfig } from "./places.ts";
import { budgetOption } from "./plan.ts";
import { configOption, saidCommand } from "./run-config.ts";
import { trainClassifier } from "./train-classifier.ts";
import { trainLanguage } from "./train-language.ts";
import { trainPreference } from "./train-preference.ts";

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
  readonly learningRate: number | "auto";
  readonly findLr?: boolean;
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
  readonly samplePrompt?: readonly string[];
  readonly tensorboard?: boolean;
  readonly dryRun?: boolean;
  readonly preference?: "dpo";
  readonly beta?: number;
  readonly labelSmoothing?: number;
  readonly neftuneAlpha?: number;
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
  $ lowrank train --model models/base --data pairs.jsonl --out adapters/kind --preference dpo --learning-rate 5e-5
  $ lowrank train --model models/base --data train.jsonl --out adapters/pirate --find-lr
  $ lowrank train --config adapters/pirate/run.yaml --out adapters/again --seed 1

Ctrl-C ends training after the step in progress, saves the adapter and writes a checkpoint; a second one quits at once. The same command with
--resume goes on from the newest whole checkpoint in --out, bit for bit. Its settings must be the same; with --schedule constant and --warmup 0,
--steps may be others. With --valid-data, --out has the adapter of the last step and --out/best that of the lowest validation loss.`;

export function trainCommand(): Command {
  const name = "train";
  const command = new Command(name)
    .description("fine-tune a LoRA adapter")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(dataOption())
    .requiredOption("--out <dir>", "where the adapter, metrics.jsonl, run.yaml and report.html go")
    .addOption(whole(name, "--steps <n>", "optimizer steps", 1).conflicts("epochs"))
    .addOption(whole(name, "--epochs <n>", "times to go through the data (default: 1)", 1))
    .addOption(rateOption(name))
    .addOption(
      new Option(
        "--find-lr",
        "try ever higher learning rates for up to 100 steps, say where the loss falls most steeply, and train nothing",
      ).conflicts(["resume", "dryRun"]),
    )
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
    .addOption(numeric(name, "--loraplus-lr-ratio <x>", "B learns so many times as fast as A (LoRA+)", ABOVE_0))
    .addOption(amount(name, "--max-grad-norm <x>", "scale gradients down to this norm; 0: never", 1))
    .addOption(maxLengthOption(name))
    .addOption(numLabelsOption(name))
    .addOption(
      whole(name, "--seed <n>", "seed of the adapter's start, of the order of the rows, of dropout and of noise", 0, 0),
    )
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
    .option(
      "--sample-prompt <text...>",
      "continue these texts after each evaluation and at the end, into samples.jsonl",
    )
    .option("--tensorboard", "write TensorBoard's event file, too")
    .option("--dry-run", "do everything but the steps, and write nothing")
    .addOption(configOption())
    .addOption(jsonOption());
  for (const option of [
    ...rowOptions(),
    validSplitOption(name),
    packingOption(),
    ...preferenceOptions(name),
    ...lossOptions(name),
  ])
    command.addOption(option);
  for (const option of [...loraOptions(name), ...stepOptions(name), budgetOption(name)]) command.addOption(option);
  return command.addHelpText("after", EXAMPLES).action(run);
}

async function run(given: TrainArguments, command: Command): Promise<void> {
  if (given.init === "loftq" && given.quantize === undefined)
    throw new ShapeError("train: --init loftq needs a quantised base, got no --quantize. Give it");
  await ensureWritableDirectory(given.out);
  const options = await located(given, true, readAnyConfig);
  const said = saidCommand(command);
  if (options.preference === undefined && options.beta !== undefined)
    throw new ShapeError("train: --beta goes with --preference. Add it, or leave it out");
  if (await isClassifier(diskDirectory(options.model))) return trainClassifier(options, said);
  if (options.numLabels !== undefined)
    throw new ShapeError("train: --num-labels is for encoders with a classifier. Leave it out");
  return options.preference ? trainPreference(options, said) : trainLanguage(options, said);
}
