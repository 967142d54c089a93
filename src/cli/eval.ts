import { Command } from "commander";
import { bitsPerWeight, type WeightFormat } from "../models/weights.ts";
import { ShapeError } from "../tensor/errors.ts";
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
import { bitsLine, dataLine, number, openModel, readData, result, say, withGpu } from "./session.ts";

interface EvalArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly againstF32?: boolean;
  readonly adapter?: string;
  readonly data: string;
  readonly batchSize: number;
  readonly maxLength?: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank eval --model models/base --data valid.jsonl
  $ lowrank eval --model models/base --adapter adapters/pirate --data valid.jsonl --json
  $ lowrank eval --model models/base --data valid.jsonl --quantize nf4 --against-f32`;

export function evalCommand(): Command {
  return new Command("eval")
    .description("mean loss and perplexity over the tokens to learn of a data file")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .option("--against-f32", "beside the loss of quantised weights, that of the same weights unquantised")
    .addOption(adapterOption())
    .addOption(dataOption())
    .addOption(whole("eval", "--batch-size <n>", "rows of one forward pass", 1, 4))
    .addOption(maxLengthOption("eval"))
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(options: EvalArguments): Promise<void> {
  const { quantize, againstF32 = false } = options;
  if (againstF32 && !quantize)
    throw new ShapeError("eval: --against-f32 must go with --quantize, got none. There is nothing to compare");
  const { model: path, adapter, data, batchSize, maxLength: limit, json } = await located(options);
  const { rows, stats, maxLength } = await readData(path, data, limit);
  say(dataLine(stats, maxLength));
  await withGpu(async (gpu) => {
    const lossOf = async (weights: WeightFormat) => {
      const model = await openModel(gpu, path, weights, adapter);
      const measured = { ...(await evaluate(model, rows, batchSize)), bits: bitsPerWeight(model) };
      model.destroy();
      return measured;
    };
    const { loss, perplexity, tokens, bits } = await lossOf(weightFormat(quantize));
    const unquantized = againstF32 ? (await lossOf("stored")).loss : undefined;
    if (json) {
      const unquantized_loss = unquantized !== undefined && { unquantized_loss: unquantized };
      result(JSON.stringify({ loss, perplexity, tokens, bits_per_weight: bits, ...unquantized_loss }));
      return;
    }
    say(`weights: ${bitsLine(bits)}`);
    result(`loss ${loss.toFixed(4)}, perplexity ${perplexity.toFixed(3)} over ${number(tokens)} tokens`);
    if (unquantized !== undefined)
      result(`loss ${unquantized.toFixed(4)} unquantised: quantising adds ${(loss - unquantized).toFixed(4)}`);
  });
}
