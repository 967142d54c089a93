/** What the commands do alike: open the GPU, read model, adapter and data, speak. */
import { existsSync, statSync } from "node:fs";
import {
  CHATML,
  type ChatTemplate,
  type DataFile,
  type DataRecord,
  dataSplits,
  loadChatTemplate,
  readRecords,
} from "../data.ts";
import { type Gpu, type OpenGpuOptions, openGpu } from "../gpu/gpu.ts";
import { FormatError } from "../io/errors.ts";
import { diskDirectory, fileSource } from "../io/files.ts";
import { excerpt, utf8 } from "../io/json.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import type { HasLinears } from "../lora/parts.ts";
import type { CausalModel } from "../models/causal.ts";
import { type ModelConfig, readConfig } from "../models/config.ts";
import type { bitsPerWeight, WeightFormat } from "../models/weights.ts";
import { loadModelFrom, loadPeftFrom } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { splitRows } from "../train/data/split.ts";
import { type DataStats, PAIR_FORMS, type PreferencePair, pairsOf, type Row, RowMaker, rowsOf } from "../train/data.ts";
import { paddingShare } from "../train/packing.ts";
import type { RowArguments } from "./options.ts";

/** A line for people: on stderr, so that stdout holds only results. */
export const say = (line: string): void => {
  process.stderr.write(`${line}\n`);
};

export const result = (line: string): void => {
  process.stdout.write(`${line}\n`);
};

/** The exit status that an error gives: 2 for a file or place that cannot be used, 1 for all else. */
export const exitCode = (error: unknown): number => (error instanceof FormatError ? 2 : 1);

/** Runs a command on the GPU and frees it. Says so when it is a software adapter. */
export async function withGpu<T>(run: (gpu: Gpu) => Promise<T>, options?: OpenGpuOptions): Promise<T> {
  const gpu = await openGpu(options);
  try {
    if (gpu.isSoftware) say(softwareNotice(gpu));
    return await run(gpu);
  } finally {
    gpu.destroy();
  }
}

export function softwareNotice({ info }: Gpu): string {
  const name = /swiftshader/i.test(`${info.architecture} ${info.description}`) ? "SwiftShader" : deviceName(info);
  return process.env.LOWRANK_ADAPTER === "software"
    ? `LOWRANK_ADAPTER=software: running on a software adapter (${name}), right but slow`
    : `No GPU was found: running on a software adapter (${name}), right but slow`;
}

export const deviceName = ({ description, device, vendor, architecture }: GPUAdapterInfo): string =>
  description || device || `${vendor} ${architecture}`.trim() || "unnamed";

/** The model, with the adapter enabled if one is given. */
export async function openModel(gpu: Gpu, path: string, weights: WeightFormat, adapter?: string): Promise<CausalModel> {
  const model = await loadModelFrom(gpu, path, { weights });
  if (adapter !== undefined) await openPeft(model, adapter);
  return model;
}

/** The adapter on the model, enabled. Says what is strange in its files. */
export const openPeft = (model: HasLinears, path: string): Promise<LoraAdapter> =>
  loadPeftFrom(model, path, { onWarning: (text) => say(`warning: ${text}`) });

/** The text of a file, of any size that fits a string. */
export async function readTextFile(path: string): Promise<string> {
  const source = await fileSource(path);
  return utf8(await source.read(0, source.sizeBytes), path);
}

/** What has to be known of a model to turn text into rows for it. */
export interface Reader {
  readonly config: ModelConfig;
  readonly tokenizer: Tokenizer | undefined;
}

/** Reads the small files of a model: its configuration and, where it has one, its tokenizer. */
export async function openReader(path: string): Promise<Reader> {
  const directory = diskDirectory(path);
  const config = await readConfig(directory);
  const files = await Promise.all(["tokenizer.json", "vocab.json"].map((file) => directory.open(file)));
  return { config, tokenizer: files.some(Boolean) ? await loadTokenizer(directory) : undefined };
}

/** How `readData` reads. */
export interface ReadOptions extends RowArguments {
  /** Of a directory, the first of these splits that is there. */
  readonly splits?: readonly Split[];
  /** Share of the rows that is held out, drawn by `seed`. */
  readonly validSplit?: number | undefined;
  readonly seed?: number;
}

type Split = "train" | "valid" | "test";

export interface ReadData<R = Row> {
  readonly rows: readonly R[];
  readonly stats: DataStats;
  readonly maxLength: number;
  /** Held out, or the file `valid` beside `train`. */
  readonly valid: readonly R[] | undefined;
}

/** The rows of a file or a directory of data, cut to maxLength: 512 unless given, or the model's context if that is smaller. */
export const readData = (
  model: string,
  place: string,
  maxLength: number | undefined,
  options: ReadOptions = {},
): Promise<ReadData> => readAs({ of: rowsOf }, model, place, maxLength, options);

/** As `readData`, pairs. */
export const readPreferences = (
  model: string,
  place: string,
  maxLength: number | undefined,
  options: ReadOptions = {},
): Promise<ReadData<PreferencePair>> => readAs({ of: pairsOf, forms: PAIR_FORMS }, model, place, maxLength, options);

interface RowKind<R> {
  of(records: AsyncIterable<DataRecord>, maker: RowMaker): AsyncIterable<R>;
  /** That a record may have, for messages. */
  readonly forms?: string;
}

async function readAs<R>(
  kind: RowKind<R>,
  model: string,
  place: string,
  maxLength: number | undefined,
  { splits = ["train"], validSplit, seed = 0, ...options }: ReadOptions,
): Promise<ReadData<R>> {
  const { config, tokenizer } = await openReader(model);
  const { contextLength, vocabSize } = config;
  const length = maxLength ?? Math.min(512, contextLength);
  const chatTemplate = await openTemplate(model, options.chatTemplate);
  const limits = { maxLength: length, contextLength, vocabSize, chatTemplate, lossOn: options.lossOn };
  const rowsOfFile = async ({ name, source }: DataFile): Promise<{ rows: R[]; stats: DataStats }> => {
    const maker = new RowMaker(tokenizer, limits);
    const rows: R[] = [];
    const records = readRecords(source, name, { separator: options.promptSeparator });
    for await (const row of kind.of(records, maker)) rows.push(row);
    maker.demandRows(name, kind.forms);
    return { rows, stats: maker.stats };
  };
  const found = await findData(place, splits);
  const { rows, stats } = await rowsOfFile(found.file);
  if (validSplit === undefined) {
    const valid = found.valid && (await rowsOfFile(found.valid)).rows;
    return { rows, stats, maxLength: length, valid };
  }
  if (found.valid)
    throw new ShapeError(`--valid-split: must go with data of one file, got ${place}, which has ${found.valid.name}`);
  const { train, valid } = splitRows(rows, validSplit, seed);
  return { rows: train, stats, maxLength: length, valid };
}

/** The template of a model's directory, or what a --chat-template says in its place. */
export async function openTemplate(model: string, given: string | undefined): Promise<ChatTemplate | undefined> {
  const directory = diskDirectory(model);
  if (given === undefined) return loadChatTemplate(directory);
  const text = given === "chatml" ? CHATML : await readTextFile(given);
  return loadChatTemplate(directory, { name: given, text });
}

/** The file itself, or the first split that a directory has. */
async function findData(
  place: string,
  splits: readonly Split[],
): Promise<{ readonly file: DataFile; readonly valid?: DataFile | undefined }> {
  if (!(existsSync(place) && statSync(place).isDirectory()))
    return { file: { name: place, source: await fileSource(place) } };
  const files = await dataSplits(diskDirectory(place));
  const split = splits.find((name) => files[name]);
  const file = split && files[split];
  if (!file) throw new FormatError(`${place}: must have a file of ${splits.join(" or ")}, got none`);
  return { file, valid: split === "train" ? files.valid : undefined };
}

/** "data: 160 rows (3 truncated to 128 tokens, 0 dropped with nothing to learn), 9,120 tokens, 4,210 of them to learn", and what is odd. */
export function dataLine(stats: DataStats, maxLength: number, what = "rows"): string {
  const { rows, truncated, dropped, tokens, trainedTokens, unclearBoundaries, firstUnclear, ignoredKeys } = stats;
  const line = `data: ${number(rows)} ${what} (${number(truncated)} truncated to ${maxLength} tokens, ${number(dropped)} dropped with nothing to learn), ${number(tokens)} tokens, ${number(trainedTokens)} of them to learn`;
  const unclear = `warning: in ${number(unclearBoundaries)} ${what}, first at ${firstUnclear}, what comes before an answer does not end at a token of its own: learning starts where the two part`;
  const ignored = `keys that are not used: ${ignoredKeys.map((key) => JSON.stringify(excerpt(key))).join(", ")}`;
  return [line, ...(unclearBoundaries > 0 ? [unclear] : []), ...(ignoredKeys.length > 0 ? [ignored] : [])].join("\n");
}

/** "packing: 160 rows in 41; of the positions of a batch 31.2 % were padding, 2.0 % are" */
export function packingLine(rows: readonly Row[], packed: readonly Row[], batchSize: number): string {
  const [before, after] = [rows, packed].map((all) => `${number(100 * paddingShare(all, batchSize), 1)} %`);
  return `packing: ${number(rows.length)} rows in ${number(packed.length)}; of the positions of a batch ${before} were padding, ${after} are`;
}

export const number = (value: number, digits = 0): string =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** "1.5 GiB" */
export function bytes(count: number): string {
  const step = Math.min(3, Math.floor(Math.log2(Math.max(1, count)) / 10));
  return `${number(count / 1024 ** step, step === 0 ? 0 : 1)} ${["B", "KiB", "MiB", "GiB"][step]}`;
}

/** "4.13 bits a weight in the linear layers, 9.86 in the whole model" */
export const bitsLine = ({ linears, all }: ReturnType<typeof bitsPerWeight>): string =>
  `${number(linears, 2)} bits a weight in the linear layers, ${number(all, 2)} in the whole model`;

/** "2h 05m", "3m 20s" or "12s" */
export function duration(seconds: number): string {
  const whole = Math.round(seconds);
  const pad = (n: number): string => String(n).padStart(2, "0");
  if (whole >= 3600) return `${Math.floor(whole / 3600)}h ${pad(Math.floor((whole % 3600) / 60))}m`;
  return whole >= 60 ? `${Math.floor(whole / 60)}m ${pad(whole % 60)}s` : `${whole}s`;
}
