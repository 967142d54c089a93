import { Command } from "commander";
import { FormatError } from "../io/errors.ts";
import { encodeSafetensors } from "../io/safetensors.ts";
import { tensorToWrite } from "../nn/checkpoint.ts";
import { writeFileAtomic } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { tensor, view } from "../tensor/tensor.ts";
import { type Row, readRows } from "../train/data.ts";
import {
  adapterOption,
  dataOption,
  modelOption,
  quantizeOption,
  revisionOption,
  weightFormat,
  whole,
} from "./options.ts";
import { located } from "./places.ts";
import { openModel, openReader, readTextFile, result, say, withGpu } from "./session.ts";

interface LogitsArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly adapter?: string;
  readonly data: string;
  readonly row: number;
  readonly out: string;
}

const EXAMPLES = `
Examples:
  $ lowrank logits --model models/base --data valid.jsonl --row 0 --out logits.safetensors
  $ lowrank logits --model models/base --adapter adapters/pirate --data valid.jsonl --row 3 --out logits.safetensors`;

export function logitsCommand(): Command {
  return new Command("logits")
    .description("write the next-token logits of one row, as the tensor `logits` [tokens, vocabulary] in f32")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(adapterOption())
    .addOption(dataOption())
    .addOption(whole("logits", "--row <i>", "which row; the first is 0", 0).makeOptionMandatory())
    .requiredOption("--out <file>", "safetensors file to write")
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(options: LogitsArguments): Promise<void> {
  const { model: path, adapter, data, row, out } = await located(options);
  const { inputIds } = await readRow(path, data, row);
  await withGpu(async (gpu) => {
    const model = await openModel(gpu, path, weightFormat(options.quantize), adapter);
    const [T, V] = [inputIds.length, model.config.vocabSize];
    const logits = gpu.scope(() => view(model.logits(tensor(gpu, Int32Array.from(inputIds), [1, T])), [T, V]));
    await writeFileAtomic(out, encodeSafetensors([tensorToWrite("logits", logits)]));
    result(`logits [${T}, ${V}] of row ${row} are in ${out}`);
  });
}

/** The row at this index of the file, blank lines not counted. */
async function readRow(model: string, file: string, index: number): Promise<Row> {
  const { config, tokenizer } = await openReader(model);
  const { contextLength, vocabSize } = config;
  const lines = (await readTextFile(file)).split("\n");
  const filled = [...lines.keys()].filter((line) => lines[line]?.trim());
  const at = filled[index];
  if (filled.length > 0 && at === undefined)
    throw new ShapeError(`logits: --row must be from 0 to ${filled.length - 1}, the rows of ${file}, got ${index}`);
  // The lines before it go in as blank ones, so that an error names the right line.
  const alone = at === undefined ? "" : `${"\n".repeat(at)}${lines[at]}`;
  const { rows, stats } = readRows(alone, file, tokenizer, { maxLength: contextLength, contextLength, vocabSize });
  if (stats.truncated > 0) say(`row ${index} is longer than the model's context: cut to ${contextLength} tokens`);
  const [row] = rows;
  if (!row) throw new FormatError(`${file}: row ${index} must have tokens, got none`);
  return row;
}
