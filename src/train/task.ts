/** What a training step learns: the loss of batches of some kind. */
import type { Gpu } from "../gpu/gpu.ts";
import type { Uniform } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type Batch, collateRounded, largestBatch } from "./batches.ts";
import type { Row } from "./data.ts";
import { batchInputs, batchLoss, type LanguageModel, planEvaluation, shapeKey, writeInputs } from "./loss.ts";

/** Within a training step: what masks and noise are made from, the seed and the number of the batch. */
export interface TrainingMode {
  readonly seed: number;
  readonly step: Uniform;
}

/** A batch on the device. */
export interface Loaded<B> {
  /** All of it, to be released. */
  readonly tensors: readonly Tensor[];
  /** Puts another batch of the same shape in its place. What was dispatched before still sees the old one. */
  write(batch: B): void;
  /**
   * The losses of the batch that is there, each a sum times `scale`, shape []: in the order of the task's `weights`. Within a training step with
   * what its noise is made from.
   */
  losses(scale: Uniform, training?: TrainingMode): readonly Tensor[];
}

/** What is trained on is the sum of its losses, each times its weight. */
export interface Task<B> {
  readonly gpu: Gpu;
  /** By the name of each loss. */
  readonly weights: Readonly<Record<string, number>>;
  /** Batches with the same key have inputs of the same shapes. */
  key(batch: B): string;
  /** What the losses are the mean over, such as rows or tokens. */
  count(batch: B): number;
  /** With `room`, the tensors of a batch no smaller, in their memory, as far as it can. */
  load(batch: B, room?: readonly Tensor[]): Loaded<B>;
}

/** A task that makes its batches of rows, none longer than `most`. */
export interface RowTask<R, B> extends Task<B> {
  collate(rows: readonly R[], most: number): B;
  /** The largest batch that rows of a run may make. */
  largest(batchSize: number, most: number): B;
  /** Makes and frees what an evaluation needs whose largest batch is this one: how a plan knows. */
  evaluation?(largest: B): void;
  /** Tokens of a row that go through the model; as many as its inputIds unless given. */
  tokensOf?(row: R): number;
}

export interface LanguageSettings {
  /** Fills rows up to the longest of a batch; never seen by the loss. 0 unless given. */
  readonly padId?: number | undefined;
  /** ε: a target has 1 − ε of the weight, and all words of the vocabulary the rest, alike: see `CrossEntropyOptions`. 0 unless given. */
  readonly labelSmoothing?: number | undefined;
  /** α of noise on the embeddings, in training steps alone: see `EmbeddingNoise`. 0 unless given: no noise. */
  readonly neftuneAlpha?: number | undefined;
}

/**
 * Next tokens. `hasPacked` says that rows of the run are packed, which its largest batch has to know. Throws ShapeError for settings out of
 * range.
 */
export function languageTask(
  model: LanguageModel,
  { padId = 0, labelSmoothing = 0, neftuneAlpha: alpha = 0 }: LanguageSettings = {},
  hasPacked = false,
): RowTask<Row, Batch> {
  if (!(labelSmoothing >= 0 && labelSmoothing < 1))
    throw new ShapeError(`languageTask: labelSmoothing must be at least 0 and below 1, got ${labelSmoothing}`);
  if (!(alpha >= 0 && Number.isFinite(alpha)))
    throw new ShapeError(`languageTask: neftuneAlpha must be a number of at least 0, got ${alpha}`);
  return {
    gpu: model.gpu,
    weights: { loss: 1 },
    key: shapeKey,
    count: ({ tokens }) => tokens,
    load(batch, room) {
      const inputs = batchInputs(model.gpu, batch, room);
      return {
        tensors: inputs.tensors,
        write: (next) => writeInputs(inputs, next),
        losses(scale, training) {
          const noise = training && alpha > 0 ? { alpha, ...training } : undefined;
          return [batchLoss(model, inputs, scale, { labelSmoothing, noise })];
        },
      };
    },
    collate: (rows, most) => collateRounded(rows, padId, most),
    largest: (batchSize, most) => largestBatch(batchSize, most, hasPacked),
    evaluation: (largest) => planEvaluation(model, largest),
  };
}
