/** What a training step learns: the loss of batches of some kind. */
import type { Gpu } from "../gpu/gpu.ts";
import type { Uniform } from "../gpu/kernel.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type Batch, collateRounded, largestBatch } from "./batches.ts";
import type { Row } from "./data.ts";
import { batchInputs, batchLoss, type LanguageModel, planEvaluation, shapeKey, writeInputs } from "./loss.ts";

/** A batch on the device. */
export interface Loaded<B> {
  /** All of it, to be released. */
  readonly tensors: readonly Tensor[];
  /** Puts another batch of the same shape in its place. What was dispatched before still sees the old one. */
  write(batch: B): void;
  /** The losses of the batch that is there, each a sum times `scale`, shape []: in the order of the task's `weights`. */
  losses(scale: Uniform): readonly Tensor[];
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
  load(batch: B): Loaded<B>;
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

/**
 * Next tokens. `padId` fills rows up to the longest of a batch and is never seen by the loss; `hasPacked` says that rows of the run are packed,
 * which its largest batch has to know.
 */
export function languageTask(model: LanguageModel, padId = 0, hasPacked = false): RowTask<Row, Batch> {
  return {
    gpu: model.gpu,
    weights: { loss: 1 },
    key: shapeKey,
    count: ({ tokens }) => tokens,
    load(batch) {
      const inputs = batchInputs(model.gpu, batch);
      return {
        tensors: inputs.tensors,
        write: (next) => writeInputs(inputs, next),
        losses: (scale) => [batchLoss(model, inputs, scale)],
      };
    },
    collate: (rows, most) => collateRounded(rows, padId, most),
    largest: (batchSize, most) => largestBatch(batchSize, most, hasPacked),
    evaluation: (largest) => planEvaluation(model, largest),
  };
}
