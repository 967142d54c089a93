/** Rows with a class: their batches, loss and evaluation. */
import { crossEntropy } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Uniform } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { read, type Tensor, tensor } from "../tensor/tensor.ts";
import { roundedLength } from "./batches.ts";
import { type ClassificationMetrics, classificationMetrics } from "./metrics.ts";
import type { RowTask } from "./task.ts";

/** What rows have to keep to. */
export interface ClassifierLimits {
  readonly vocabSize: number;
  readonly tokenTypes: number;
  readonly padId: number;
  /** Names of the classes. */
  readonly labels: readonly string[];
}

/** Anything that sorts rows into classes, such as a model with or without an adapter. */
export interface Classifier {
  readonly gpu: Gpu;
  readonly config: ClassifierLimits;
  /** ids and tokenTypes i32 [B,T], of which lengths [B] count in each row → [B, classes]. */
  logits(ids: Tensor, rows: { readonly lengths: Tensor; readonly tokenTypes: Tensor }): Tensor;
}

export interface ClassificationRow {
  readonly inputIds: readonly number[];
  /** 0 unless given: of a pair of texts, BERT's second one has 1. */
  readonly tokenTypeIds?: readonly number[];
  /** 1 for each token and 0 for the padding behind them; all are tokens unless given. */
  readonly attentionMask?: readonly number[];
  /** Number of its class. */
  readonly label: number;
}

export interface ClassificationBatch {
  /** [B,T], padded on the right. */
  readonly ids: Int32Array;
  readonly tokenTypes: Int32Array;
  /** [B] */
  readonly lengths: Int32Array;
  readonly labels: Int32Array;
  readonly B: number;
  readonly T: number;
}

/**
 * Lays rows side by side, padded to the longest; with `most`, no less than any row has, to one of few lengths up to it. Throws ShapeError for
 * rows that the classifier cannot take.
 */
export function collateClassification(
  rows: readonly ClassificationRow[],
  limits: ClassifierLimits,
  most?: number,
): ClassificationBatch {
  const B = rows.length;
  if (B === 0) throw new ShapeError("collateClassification: a batch must have at least one row, got none");
  const lengths = Int32Array.from(rows, (row) => lengthOf(row, limits));
  const longest = lengths.reduce((a, b) => Math.max(a, b));
  const T = most === undefined ? longest : roundedLength(longest, most);
  const ids = new Int32Array(B * T).fill(limits.padId);
  const tokenTypes = new Int32Array(B * T);
  rows.forEach(({ inputIds, tokenTypeIds = [] }, b) => {
    ids.set(inputIds.slice(0, lengths[b]), b * T);
    tokenTypes.set(tokenTypeIds.slice(0, lengths[b]), b * T);
  });
  return { ids, tokenTypes, lengths, labels: Int32Array.from(rows, ({ label }) => label), B, T };
}

/** Tokens of a row that are no padding. */
function lengthOf(
  { inputIds, tokenTypeIds, attentionMask, label }: ClassificationRow,
  limits: ClassifierLimits,
): number {
  const fail = (rule: string, got: unknown, way = ""): never => {
    throw new ShapeError(`collateClassification: ${rule}, got ${got}${way}`);
  };
  const below = (name: string, values: readonly number[], limit: number): void => {
    const bad = values.find((value) => !Number.isInteger(value) || value < 0 || value >= limit);
    if (bad !== undefined) fail(`${name} must be whole numbers from 0 to ${limit - 1}`, bad);
  };
  for (const [name, list] of Object.entries({ tokenTypeIds, attentionMask }))
    if (list && list.length !== inputIds.length)
      fail(`${name} must be as many as inputIds, ${inputIds.length}`, list.length);
  const end = attentionMask?.indexOf(0) ?? -1;
  const length = end < 0 ? inputIds.length : end;
  if (attentionMask?.some((value, t) => value !== Number(t < length)))
    fail("attentionMask must be ones and then zeros", `[${attentionMask}]`, ". Only padding on the right is supported");
  if (length === 0) fail("a row must have at least one token", "none");
  const tokens = inputIds.slice(0, length);
  below("inputIds", tokens, limits.vocabSize);
  below("tokenTypeIds", tokenTypeIds ?? [], limits.tokenTypes);
  below("label", [label], limits.labels.length);
  if (tokens.includes(limits.padId))
    fail("padding must be left out, or be 0 in attentionMask", `its id ${limits.padId} among the tokens of a row`);
  return length;
}

/** What a loss is made of. */
export interface ClassifierOutputs {
  /** [B, classes] */
  readonly logits: Tensor;
  /** i32 [B] */
  readonly labels: Tensor;
  /** What sums over the rows are multiplied by to be means over those of a step. */
  readonly scale: Uniform;
}

/** Cross-entropy of the classes: scale·Σ −log softmax(logits)[label], shape []. */
export const classificationLoss = ({ logits, labels, scale }: ClassifierOutputs): Tensor =>
  crossEntropy(logits, labels, scale);

/** A part of what is trained on: weight·value. The value is a sum over the rows, times `scale`, shape []. */
export interface WeightedLoss {
  readonly weight: number;
  readonly value: (outputs: ClassifierOutputs) => Tensor;
}

/** To sort rows into classes, for `trainTask` or a `TrainingStep`. Trained on is the sum of `losses`, each times its weight. */
export function classificationTask(
  model: Classifier,
  losses: Readonly<Record<string, WeightedLoss>> = { classification: { weight: 1, value: classificationLoss } },
): RowTask<ClassificationRow, ClassificationBatch> {
  const { gpu, config } = model;
  return {
    gpu,
    weights: Object.fromEntries(Object.entries(losses).map(([name, { weight }]) => [name, weight])),
    key: ({ B, T }) => `${B}×${T}`,
    count: ({ B }) => B,
    load(batch) {
      const inputs = onDevice(gpu, batch);
      return {
        tensors: Object.values(inputs),
        write({ ids, tokenTypes, lengths, labels }) {
          for (const [name, values] of Object.entries({ ids, tokenTypes, lengths, labels }))
            gpu.write(inputs[name as keyof typeof inputs], values);
        },
        losses(scale) {
          const logits = model.logits(inputs.ids, inputs);
          return Object.values(losses).map(({ value }) => value({ logits, labels: inputs.labels, scale }));
        },
      };
    },
    collate: (rows, most) => collateClassification(rows, config, most),
    largest: (B, T) => ({
      ...{ ids: new Int32Array(B * T), tokenTypes: new Int32Array(B * T), labels: new Int32Array(B), B, T },
      lengths: new Int32Array(B).fill(T),
    }),
  };
}

function onDevice(gpu: Gpu, { ids, tokenTypes, lengths, labels, B, T }: ClassificationBatch) {
  return {
    ids: tensor(gpu, ids, [B, T]),
    tokenTypes: tensor(gpu, tokenTypes, [B, T]),
    lengths: tensor(gpu, lengths, [B]),
    labels: tensor(gpu, labels, [B]),
  };
}

/** Logits of the rows, one behind the other, rows × classes. Throws ShapeError as `collateClassification`, and the reason of the signal. */
export async function classifierLogits(
  model: Classifier,
  rows: readonly ClassificationRow[],
  batchSize: number,
  signal?: AbortSignal,
): Promise<number[]> {
  if (!Number.isInteger(batchSize) || batchSize < 1)
    throw new ShapeError(`evaluateClassifier: batchSize must be a whole number of at least 1, got ${batchSize}`);
  const { gpu } = model;
  const logits: number[] = [];
  for (let at = 0; at < rows.length; at += batchSize) {
    signal?.throwIfAborted();
    const found = gpu.scope(() => batchLogits(model, rows.slice(at, at + batchSize)));
    logits.push(...(await read(found)));
    gpu.release(found);
  }
  return logits;
}

/** Logits [B, classes] of these rows as one batch, on the device. */
export function batchLogits(model: Classifier, rows: readonly ClassificationRow[]): Tensor {
  const inputs = onDevice(model.gpu, collateClassification(rows, model.config));
  return model.logits(inputs.ids, inputs);
}

/** How well the classifier does on these rows: see `classificationMetrics`. Throws as `classifierLogits`. */
export async function evaluateClassifier(
  model: Classifier,
  rows: readonly ClassificationRow[],
  batchSize: number,
  signal?: AbortSignal,
): Promise<ClassificationMetrics> {
  const logits = await classifierLogits(model, rows, batchSize, signal);
  const labels = rows.map(({ label }) => label);
  return classificationMetrics(logits, labels, model.config.labels.length);
}
