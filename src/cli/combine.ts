import { Command, Option } from "commander";
import { replaceFiles } from "../io/files.ts";
import { encodePeft } from "../lora/adapter-file.ts";
import { COMBINATIONS, type Combination, combineAdapters } from "../lora/combine.ts";
import { CONFIG } from "../lora/peft-config.ts";
import { ShapeError } from "../tensor/errors.ts";
import { adapterPath, checkOut, openAdapter } from "./convert.ts";
import { numeric, whole } from "./options.ts";
import { result, say } from "./session.ts";

interface CombineArguments {
  readonly adapter: readonly string[];
  readonly weights?: readonly number[];
  readonly method: Combination;
  readonly rank?: number;
  readonly density?: number;
  readonly seed: number;
  readonly out: string;
}

const EXAMPLES = `
Examples:
  $ lowrank combine --adapter adapters/pirate --adapter adapters/letter --weights 0.5,0.5 --out adapters/both
  $ lowrank combine --adapter a --adapter b --weights 1,-1 --method svd --rank 8 --out adapters/difference
  $ lowrank combine --adapter a --adapter b --method ties --density 0.5 --out adapters/ties`;

export function combineCommand(): Command {
  return new Command("combine")
    .description("make one adapter out of several on the same model")
    .requiredOption("--adapter <place...>", "adapters of PEFT or mlx-lm, once or more often")
    .option("--weights <list>", "a weight for each of them, such as 0.7,-0.3 (default: 1 each)", parseWeights)
    .addOption(
      new Option("--method <name>", "cat is exact and adds up ranks; svd cuts that to --rank; the others are PEFT's")
        .choices(COMBINATIONS)
        .default("cat"),
    )
    .addOption(whole("combine", "--rank <n>", "svd: rank of the result (default: the largest there is)", 1))
    .addOption(
      numeric("combine", "--density <x>", "ties, magnitude_prune, dare_…: share of the elements that are kept", {
        rule: "a number above 0 and at most 1",
        holds: (x) => x > 0 && x <= 1,
      }),
    )
    .addOption(whole("combine", "--seed <n>", "of what dare_… keeps", 0, 0))
    .requiredOption("--out <dir>", "directory of the adapter, in PEFT's format")
    .addHelpText("after", EXAMPLES)
    .action(run);
}

function parseWeights(text: string): number[] {
  const weights = text.split(",").map((part) => (part.trim() === "" ? Number.NaN : Number(part)));
  if (weights.some((weight) => !Number.isFinite(weight)))
    throw new ShapeError(`combine: --weights must be numbers separated by commas, got ${text}`);
  return weights;
}

async function run({ adapter: places, weights, out, ...options }: CombineArguments): Promise<void> {
  if (weights && weights.length !== places.length)
    throw new ShapeError(`combine: --weights must be one for each of ${places.length} adapters, got ${weights.length}`);
  const adapters = [];
  for (const [i, place] of places.entries())
    adapters.push({ adapter: await openAdapter(await adapterPath("--adapter", place)), weight: weights?.[i] ?? 1 });
  await checkOut("peft", out);
  const combined = combineAdapters(adapters, options);
  await replaceFiles(out, encodePeft(combined).files, CONFIG);
  const bases = new Set(adapters.map(({ adapter }) => adapter.baseModel).filter(Boolean));
  if (bases.size > 1) say(`note: the adapters name different models: ${[...bases].join(", ")}`);
  result(`the adapter is in ${out}: rank ${combined.config.r} on ${combined.modules.size} modules`);
}
