/** What `train` and `eval` do alike where the model is an encoder with a classifier. */
import type { Gpu } from "../gpu/gpu.ts";
import { diskDirectory } from "../io/files.ts";
import { type BertClassifier, unnamed } from "../models/bert.ts";
import { readClassifierConfig } from "../models/config.ts";
import { loadClassifier } from "../models/load-classifier.ts";
import { ShapeError } from "../tensor/errors.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { type ClassificationStats, readClassificationRows } from "../train/classification-rows.ts";
import type { ClassificationRow } from "../train/classify.ts";
import { number, readTextFile, say } from "./session.ts";

export interface ClassifierArguments {
  readonly model: string;
  readonly maxLength?: number;
  readonly numLabels?: number;
}

/** Throws ShapeError where one of these options, which classifiers do not know, is given. */
export function refuse(command: string, options: Readonly<Record<string, unknown>>): void {
  for (const [flag, value] of Object.entries(options))
    if (value !== undefined)
      throw new ShapeError(`${command}: ${flag} is for models that predict tokens. Leave it out`);
}

/** The rows of a data file for a classifier, cut to --max-length: 512 unless given, or the model's context if that is smaller. Says what they are. */
export async function readClassRows(
  { model, maxLength, numLabels }: ClassifierArguments,
  file: string,
): Promise<{ readonly rows: readonly ClassificationRow[]; readonly stats: ClassificationStats }> {
  const directory = diskDirectory(model);
  const config = await readClassifierConfig(directory);
  const labels = numLabels === undefined ? config.labels : unnamed(numLabels);
  const files = await Promise.all(["tokenizer.json", "vocab.json"].map((name) => directory.open(name)));
  const tokenizer = files.some(Boolean) ? await loadTokenizer(directory) : undefined;
  const limits = { ...config, labels, maxLength: maxLength ?? Math.min(512, config.contextLength) };
  const found = readClassificationRows(await readTextFile(file), file, tokenizer, limits);
  const { rows, truncated, tokens, counts } = found.stats;
  const classes = labels.map((label, c) => `${label} ${number(counts[c] ?? 0)}`).join(", ");
  say(
    `data: ${number(rows)} rows (${number(truncated)} truncated to ${limits.maxLength} tokens), ${number(tokens)} tokens; ${classes}`,
  );
  return found;
}

/** The classifier; with --num-labels with a new head, as transformers makes where a model has none. Says so. */
export async function openClassifier(
  gpu: Gpu,
  { model, numLabels }: ClassifierArguments,
  seed: number,
): Promise<BertClassifier> {
  if (numLabels === undefined) return loadClassifier(gpu, diskDirectory(model));
  say(`the classifier is new, for ${numLabels} classes: it has to be trained, and is saved with the adapter`);
  return loadClassifier(gpu, diskDirectory(model), { newClasses: numLabels, seed });
}
