import { Command, Option } from "commander";
import { readQuantization } from "../models/quantization.ts";
import { bitsPerWeight } from "../models/weights.ts";
import { diskDirectory, ensureWritableDirectory, loadModelFrom, saveModelTo } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { jsonOption, modelOption, revisionOption } from "./options.ts";
import { demandAnother, located } from "./places.ts";
import { bitsLine, result, withGpu } from "./session.ts";

interface QuantizeArguments {
  readonly model: string;
  readonly revision?: string;
  readonly format: "nf4";
  readonly doubleQuant: boolean;
  readonly out: string;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank quantize --model models/base --out models/base-nf4`;

export function quantizeCommand(): Command {
  return new Command("quantize")
    .description("write the model with its linear layers in 4 bits a weight, as transformers and bitsandbytes do")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(
      new Option("--format <format>", "nf4, in the layout of bitsandbytes").argParser(parseFormat).default("nf4"),
    )
    .option("--no-double-quant", "keep the scales in f32: 4.5 bits a weight, not 4.13")
    .requiredOption("--out <dir>", "directory of the quantised model")
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

function parseFormat(text: string): "nf4" {
  if (text !== "nf4")
    throw new ShapeError(
      `quantize: --format must be nf4, got ${text}. Other formats have no file that others read: use --quantize of the other commands`,
    );
  return text;
}

async function run(options: QuantizeArguments): Promise<void> {
  demandAnother("quantize", options);
  const { model: path, format, doubleQuant, out, json } = await located(options);
  if ((await readQuantization(diskDirectory(path))).doubleQuant !== undefined)
    throw new ShapeError(`quantize: --model must be unquantised, got ${path} in NF4`);
  await ensureWritableDirectory(out);
  await withGpu(async (gpu) => {
    const model = await loadModelFrom(gpu, path, { weights: format, doubleQuant });
    await saveModelTo(model, path, out);
    const bits = bitsPerWeight(model);
    if (json) result(JSON.stringify({ out, bits_per_weight: bits }));
    else result(`the quantised model is in ${out}, ${bitsLine(bits)}`);
  });
}
