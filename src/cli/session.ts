/** What the commands do alike: open the GPU, read model, adapter and data, speak. */

import { type Gpu, type OpenGpuOptions, openGpu } from "../gpu/gpu.ts";
import { diskDirectory, fileSource } from "../io/files.ts";
import { utf8 } from "../io/json.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import type { HasLinears } from "../lora/parts.ts";
import type { CausalModel } from "../models/causal.ts";
import { type ModelConfig, readConfig } from "../models/config.ts";
import type { bitsPerWeight, WeightFormat } from "../models/weights.ts";
import { loadModelFrom, loadPeftFrom } from "../node.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { type DataStats, type Row, readRows } from "../train/data.ts";

/** A line for people: on stderr, so that stdout holds only results. */
export const say = (line: string): void => {
  process.stderr.write(`${line}\n`);
};

export const result = (line: string): void => {
  process.stdout.write(`${line}\n`);
};

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

/** The rows of a data file, cut to maxLength: 512 unless given, or the model's context if that is smaller. */
export async function readData(
  model: string,
  file: string,
  maxLength: number | undefined,
): Promise<{ readonly rows: readonly Row[]; readonly stats: DataStats; readonly maxLength: number }> {
  const { config, tokenizer } = await openReader(model);
  const { contextLength, vocabSize } = config;
  const length = maxLength ?? Math.min(512, contextLength);
  const read = readRows(await readTextFile(file), file, tokenizer, { maxLength: length, contextLength, vocabSize });
  return { ...read, maxLength: length };
}

/** "160 rows (3 cut to 128 tokens, 0 without a token to learn left out), 9,120 tokens, 4,210 to learn" */
export function dataLine(
  { rows, truncated, dropped, tokens, trainedTokens, unclearBoundaries }: DataStats,
  maxLength: number,
): string {
  const unclear =
    unclearBoundaries > 0 ? `; in ${number(unclearBoundaries)} the end of the prompt falls inside a token` : "";
  return `data: ${number(rows)} rows (${number(truncated)} truncated to ${maxLength} tokens, ${number(dropped)} dropped with nothing to learn), ${number(tokens)} tokens, ${number(trainedTokens)} of them to learn${unclear}`;
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
