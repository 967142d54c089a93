/** Data that an adapter's start is fitted to, as the adapter sees it. */
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** A batch on the device: see `calibrationBatches` in `train`. */
export interface CalibrationBatch {
  /** Positions b·T + t whose own token is one to learn. */
  readonly positions: Int32Array;
  /** The forward pass up to the output projection: all layers see their inputs. */
  forward(): Tensor;
  /** The mean loss over the targets, one number. */
  loss(): Tensor;
}

/** What is kept of a pass over the data at a time, in bytes of the device's memory: a larger model takes more passes. */
const KEPT_BYTES = 256 * 2 ** 20;

/** The items in runs that add up to at most `KEPT_BYTES`, each of at least one. */
export function inRuns<T>(items: readonly T[], bytesOf: (item: T) => number): T[][] {
  const runs: T[][] = [];
  let bytes = Number.POSITIVE_INFINITY;
  for (const item of items) {
    bytes += bytesOf(item);
    if (bytes <= KEPT_BYTES) runs.at(-1)?.push(item);
    else {
      runs.push([item]);
      bytes = bytesOf(item);
    }
  }
  return runs;
}

/** Throws ShapeError where there is no batch. */
export function demandBatches(start: string, batches: readonly CalibrationBatch[]): void {
  if (batches.length === 0) throw new ShapeError(`${start}: at least one batch of data is needed, got none`);
}
