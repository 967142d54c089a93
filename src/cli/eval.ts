import { Command } from "commander";
import { evaluate } from "../train/loss.ts";
import {
  adapterOption,
  dataOption,
  jsonOption,
  maxLengthOption,
  modelOption,
  quantizeOption,
  revisionOption,
  weightFormat,
  whole,
} from "./options.ts";
import { located } from "./places.ts";
import { dataLine, number, openModel, readData, result, say, withGpu } from "./session.ts";

interface EvalArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly adapter?: string;
  readonly data: string;
  readonly batchSize: number;
  readonly maxLength?: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank eval --model models/base --data valid.jsonl
  $ lowrank eval --model models/base --adapter adapters/pirate --data valid.jsonl --json`;

export function evalCommand(): Command {
  return new Command("eval")
    .description("mean loss and perplexity over the tokens to learn of a data file")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(adapterOption())
    .addOption(dataOption())
    .addOption(whole("eval", "--batch-size <n>", "rows of one forward pass", 1, 4))
    .addOption(maxLengthOption("eval"))
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(options: EvalArguments): Promise<void> {
  const { model: path, adapter, data, batchSize, maxLength: limit, json } = await located(options);
  const { rows, stats, maxLength } = await readData(path, data, limit);
  say(dataLine(stats, maxLength));
  await withGpu(async (gpu) => {
    const { loss, perplexity, tokens } = await evaluate(
      await openModel(gpu, path, weightFormat(options.quantize), adapter),
      rows,
      batchSize,
    );
    if (json) result(JSON.stringify({ loss, perplexity, tokens }));
    else result(`loss ${loss.toFixed(4)}, perplexity ${perplexity.toFixed(3)} over ${number(tokens)} tokens`);
  });
}
