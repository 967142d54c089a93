import { Command, Option } from "commander";
import type { Tokenizer } from "../io/tokenizer.ts";
import { ShapeError } from "../tensor/errors.ts";
import { trainedCount } from "../train/data/row.ts";
import { IGNORED, type Row } from "../train/data.ts";
import { packRows, paddingShare } from "../train/packing.ts";
import {
  jsonOption,
  maxLengthOption,
  modelOption,
  preferenceOption,
  type RowArguments,
  revisionOption,
  rowOptions,
  whole,
} from "./options.ts";
import { located } from "./places.ts";
import { dataLine, number, openReader, packingLine, readData, readPreferences, result } from "./session.ts";

interface DataArguments extends RowArguments {
  readonly model: string;
  readonly revision?: string;
  readonly split: "train" | "valid" | "test";
  readonly rows: number;
  readonly batchSize: number;
  readonly maxLength?: number;
  readonly json?: boolean;
  readonly preference?: "dpo";
}

const HELP = `
Files: .jsonl (or .ndjson), .json (a list, or JSON Lines), .csv and .tsv (the first line names the columns), .parquet, and .txt (documents
with blank lines between them; with --prompt-separator a prompt, which keeps the separator, and a completion a line). A directory has
train, valid (or validation) and test with one of these endings.

Rows, told by their keys; others are ignored:
  {"messages", "tools"?}                                     role, content, tool_calls, as OpenAI and Hugging Face have them
  {"prompt", "completion"}                                   texts, or lists of messages
  {"text"}
  {"instruction", "output", "input"?, "system"?, "history"?} Alpaca
  {"conversations", "system"?, "tools"?}                     ShareGPT: from, value
  {"segments"}                                               label, text: those with label true are learned
  {"input_ids", "labels"?}
with --preference, pairs of answers:
  {"prompt", "chosen", "rejected"}                           texts, or lists of messages
  {"chosen", "rejected"}                                     which begin with the same prompt

Examples:
  $ lowrank data train.jsonl --model models/base
  $ lowrank data data/chat --model Qwen/Qwen2.5-0.5B-Instruct --split valid --rows 10 --loss-on last
  $ lowrank data e2e/train.txt --model models/gpt2 --prompt-separator '||' --json

What is not learned is dim, or what is learned stands between ⟦ and ⟧ where there are no colours (NO_COLOR, or no terminal).`;

export function dataCommand(): Command {
  const command = new Command("data")
    .description("show rows as a model will see them, and what is learned of them")
    .argument("<place>", "file or directory of data")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(
      new Option("--split <name>", "which file of a directory").choices(["train", "valid", "test"]).default("train"),
    )
    .addOption(whole("data", "--rows <n>", "show so many rows", 0, 3))
    .addOption(whole("data", "--batch-size <n>", "rows of a forward pass, for the share of padding", 1, 4))
    .addOption(maxLengthOption("data"));
  for (const option of [...rowOptions(), preferenceOption(), jsonOption()]) command.addOption(option);
  return command.addHelpText("after", HELP).action(run);
}

async function run(place: string, given: DataArguments): Promise<void> {
  const options = await located(given, false);
  const { model, batchSize, split } = options;
  if (options.preference && options.lossOn)
    throw new ShapeError("data: --loss-on cannot go with --preference. Leave it out");
  const { tokenizer } = await openReader(model);
  const names = options.preference ? (["chosen", "rejected"] as const) : undefined;
  const read = names ? readPreferences : readData;
  const { rows: all, stats, maxLength } = await read(model, place, options.maxLength, { ...options, splits: [split] });
  const examples = all.map((one) => ("chosen" in one ? [one.chosen, one.rejected] : [one]));
  const rows = examples.flat();
  const shown = examples.slice(0, options.rows);
  const packed = packRows(rows, maxLength);
  const lengths = rows.map(({ inputIds }) => inputIds.length).sort((a, b) => a - b);
  const bars = histogram(lengths);
  if (options.json) {
    const { trainedTokens: learned_tokens, unclearBoundaries: unclear, ignoredKeys: ignored_keys, ...counts } = stats;
    const summary = {
      ...{ ...counts, learned_tokens, unclear, ignored_keys, max_length: maxLength, lengths: quantiles(lengths) },
      histogram: bars,
      padding: { batch_size: batchSize, share: paddingShare(rows, (names?.length ?? 1) * batchSize) },
      ...(!names && { packed: { rows: packed.length, share: paddingShare(packed, batchSize) } }),
      examples: shown.map((example) => {
        const parts = example.map((row) => ({ ids: row.inputIds, parts: partsOf(row, tokenizer) }));
        return names ? Object.fromEntries(parts.map((part, i) => [names[i], part])) : parts[0];
      }),
    };
    result(JSON.stringify(summary));
    return;
  }
  const mark = marker(process.stdout.isTTY && !process.env.NO_COLOR);
  for (const [i, example] of shown.entries())
    for (const [j, row] of example.entries()) {
      const which = names ? `pair ${i + 1}, ${names[j]}` : `row ${i + 1}`;
      result(`${which}: ${number(row.inputIds.length)} tokens, ${number(trainedCount(row))} to learn`);
      result(`${partsOf(row, tokenizer).map(mark).join("")}\n`);
    }
  result(dataLine(stats, maxLength, names ? "pairs" : "rows"));
  const forms = Object.entries(stats.forms).map(([form, count]) => `${form} ${number(count)}`);
  result(`forms: ${forms.join(", ")}`);
  const { min, median, mean, p95, max } = quantiles(lengths);
  result(`lengths: ${min} to ${max} tokens, mean ${number(mean, 1)}, median ${median}, 95 % up to ${p95}`);
  const most = Math.max(...bars.map((bar) => bar.rows));
  for (const bar of bars) {
    const range = `${bar.from} to ${bar.to}`.padStart(16);
    result(`${range} ${number(bar.rows).padStart(9)} ${"#".repeat(Math.ceil((40 * bar.rows) / most))}`);
  }
  if (!names) result(packingLine(rows, packed, batchSize));
}

interface Part {
  readonly text: string;
  readonly learned: boolean;
}

/** The text of a row in parts that are learned or not; ids where there is no tokenizer. */
function partsOf({ inputIds, labels }: Row, tokenizer: Tokenizer | undefined): Part[] {
  const parts: Part[] = [];
  let before = "";
  for (let start = 0, end = 0; start < inputIds.length; start = end) {
    const isLearned = (t: number): boolean => t > 0 && labels[t] !== IGNORED;
    for (end = start + 1; end < inputIds.length && isLearned(end) === isLearned(start); ) end++;
    const ids = inputIds.slice(start, end);
    const text = (some: readonly number[]): string =>
      tokenizer ? tokenizer.decode(some, { skipSpecialTokens: false }) : some.map((id) => `${id} `).join("");
    const upTo = text(inputIds.slice(0, end)); // a decoder may drop a space at the start of a text
    parts.push({ text: upTo.startsWith(before) ? upTo.slice(before.length) : text(ids), learned: isLearned(start) });
    before = upTo;
  }
  return parts;
}

/** Text from a file may hold what a terminal takes for orders: control characters are shown as their codes. */
const printable = (text: string): string =>
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what is looked for
  text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);

const marker =
  (hasColour: boolean) =>
  ({ text, learned }: Part): string => {
    if (hasColour) return learned ? printable(text) : `\x1b[2m${printable(text)}\x1b[22m`;
    return learned ? `⟦${printable(text)}⟧` : printable(text);
  };

interface Quantiles {
  readonly min: number;
  readonly median: number;
  readonly mean: number;
  readonly p95: number;
  readonly max: number;
}

/** Of sorted lengths. */
function quantiles(sorted: readonly number[]): Quantiles {
  const at = (share: number): number => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? 0;
  const mean = sorted.reduce((a, b) => a + b, 0) / sorted.length;
  return { min: at(0), median: at(0.5), mean, p95: at(0.95), max: at(1) };
}

/** Up to ten ranges of equal width. */
function histogram(sorted: readonly number[]): { readonly from: number; readonly to: number; rows: number }[] {
  const [least = 0, most = 0] = [sorted[0], sorted.at(-1)];
  const width = Math.max(1, Math.ceil((most - least + 1) / 10));
  const count = Math.ceil((most - least + 1) / width);
  const bars = Array.from({ length: count }, (_, i) => {
    const from = least + i * width;
    return { from, to: from + width - 1, rows: 0 };
  });
  for (const length of sorted) {
    const bar = bars[Math.floor((length - least) / width)];
    if (bar) bar.rows++;
  }
  return bars;
}
