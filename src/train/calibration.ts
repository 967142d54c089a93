/** Batches of rows that an adapter's start is fitted to. */
import type { Tensor } from "../tensor/tensor.ts";
import { collate } from "./batches.ts";
import { IGNORED, type Row } from "./data.ts";
import { batchInputs, batchLoss, type LanguageModel } from "./loss.ts";

/** What `attachEva` and `initLoraGa` take. */
interface LoadedBatch {
  readonly positions: Int32Array;
  forward(): Tensor;
  loss(): Tensor;
  /** Frees it. */
  destroy(): void;
}

export interface CalibrationOptions {
  /** Rows of one forward pass. */
  readonly batchSize: number;
  /** At most so many batches, from the first row on. */
  readonly batches: number;
  /** Fills rows up to the longest of a batch. */
  readonly padId?: number;
}

/** The first rows in batches, on the device. */
export function calibrationBatches(
  model: LanguageModel,
  rows: readonly Row[],
  { batchSize, batches, padId = 0 }: CalibrationOptions,
): LoadedBatch[] {
  const count = Math.min(batches, Math.ceil(rows.length / batchSize));
  return Array.from({ length: count }, (_, i) => {
    const chosen = rows.slice(i * batchSize, (i + 1) * batchSize);
    const batch = collate(chosen, padId);
    const inputs = batchInputs(model.gpu, batch);
    return {
      positions: Int32Array.from(chosen.flatMap(({ labels }, b) => learned(labels).map((t) => b * batch.T + t))),
      forward: () => model.hidden(inputs.ids, inputs.packing && { packing: inputs.packing }),
      loss: () => batchLoss(model, inputs, 1 / batch.tokens),
      destroy: () => model.gpu.release(...inputs.tensors),
    };
  });
}

const learned = (labels: readonly number[]): number[] => labels.flatMap((label, t) => (label === IGNORED ? [] : [t]));
