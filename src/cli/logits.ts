import { Command } from "commander";
import { loadChatTemplate, readRecords } from "../data.ts";
import { FormatError } from "../io/errors.ts";
import { encodeSafetensors } from "../io/safetensors.ts";
import { tensorToWrite } from "../nn/checkpoint.ts";
import { diskDirectory, fileSource, writeFileAtomic } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { tensor, view } from "../tensor/tensor.ts";
import { type Row, RowMaker } from "../train/data.ts";
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
import { openModel, openReader, result, say, withGpu } from "./session.ts";

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

/** The row at this index of the file, whatever is to be learned of it. */
async function readRow(model: string, file: string, index: number): Promise<Row> {
  const { config, tokenizer } = await openReader(model);
  const { contextLength, vocabSize } = config;
  let count = 0;
  for await (const record of readRecords(await fileSource(file), file)) {
    if (count++ < index) continue;
    const chatTemplate = await loadChatTemplate(diskDirectory(model));
    const maker = new RowMaker(tokenizer, { maxLength: contextLength, contextLength, vocabSize, chatTemplate });
    const row = maker.row(record);
    if (maker.stats.truncated > 0)
      say(`row ${index} is longer than the model's context: cut to ${contextLength} tokens`);
    if (!row) throw new FormatError(`${record.where}: a row must leave a token to learn, got none`);
    return row;
  }
  throw new ShapeError(
    count === 0
      ? `logits: ${file} must have at least one row, got an empty file`
      : `logits: --row must be from 0 to ${count - 1}, the rows of ${file}, got ${index}`,
  );
}
