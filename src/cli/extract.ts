import { Command, Option } from "commander";
import { diskDirectory, replaceFiles } from "../io/files.ts";
import { encodePeft } from "../lora/adapter-file.ts";
import { extractAdapter } from "../lora/extract.ts";
import { CONFIG } from "../lora/peft-config.ts";
import type { TargetModules } from "../lora/target-modules.ts";
import { readConfig } from "../models/config.ts";
import { isTurned, linearSizes } from "../models/load.ts";
import { openCheckpoint } from "../nn/checkpoint.ts";
import { checkOut } from "./convert.ts";
import { jsonOption, modelOption, parseTargets, revisionOption, whole } from "./options.ts";
import { find, located } from "./places.ts";
import { result, say } from "./session.ts";

interface ExtractArguments {
  readonly model: string;
  readonly revision?: string;
  readonly tuned: string;
  readonly rank: number;
  readonly targetModules: TargetModules;
  readonly seed: number;
  readonly out: string;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank extract --model models/base --tuned models/chat --rank 32 --out adapters/chat`;

export function extractCommand(): Command {
  return new Command("extract")
    .description("write what a full fine-tune changed as an adapter of its base, as far as the rank holds it")
    .addOption(modelOption())
    .addOption(revisionOption())
    .requiredOption("--tuned <place>", "the model that was fine-tuned, of the same shape")
    .addOption(whole("extract", "--rank <n>", "rank of the adapter", 1, 16))
    .addOption(
      new Option("--target-modules <which>", "all-linear, names separated by commas, or /regular expression/")
        .argParser(parseTargets)
        .default("all-linear"),
    )
    .addOption(whole("extract", "--seed <n>", "of the randomised SVD", 0, 0))
    .requiredOption("--out <dir>", "directory of the adapter, in PEFT's format")
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(given: ExtractArguments): Promise<void> {
  const { model, baseModel, tuned, rank, targetModules, seed, out, json } = await located(given);
  const base = diskDirectory(model);
  const other = diskDirectory((await find("--tuned", tuned)).directory);
  await checkOut("peft", out);
  const config = await readConfig(base);
  const { adapter, error, unchanged } = await extractAdapter(
    await openCheckpoint(base, "model"),
    await openCheckpoint(other, "model"),
    {
      ...{ rank, targetModules, seed, baseModel },
      linears: linearSizes(config),
      isTransposed: (name) => isTurned(config, name),
    },
  );
  await replaceFiles(out, encodePeft(adapter).files, CONFIG);
  if (unchanged.length > 0) say(`${unchanged.length} modules are the same in both and are left out`);
  if (json) result(JSON.stringify({ out, rank, modules: adapter.modules.size, unchanged: unchanged.length, error }));
  else
    result(
      `the adapter is in ${out}: rank ${rank} on ${adapter.modules.size} modules holds all but ${(100 * error).toFixed(1)} % of the change of their weights; other weights, biases and norms are as in --model`,
    );
}
