/** Several tensors in one buffer. */
import type { Gpu } from "../gpu/gpu.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { slice, type Tensor, tensor, VIEW_ALIGNMENT } from "../tensor/tensor.ts";

/** Elements between two places where a view may begin. */
export const STEP: number = VIEW_ALIGNMENT / 4;

export interface Flat {
  /** All of them, one behind the other; what is between them, for alignment, is zero. */
  readonly all: Tensor;
  /** Where one of them begins. */
  startOf(t: Tensor): number;
  /** Moves one of them into its place, which requires a gradient. */
  move(t: Tensor): Tensor;
}

/** A buffer for these tensors in this order; those that come again keep their first place. */
export function layOut(gpu: Gpu, tensors: readonly Tensor[]): Flat {
  const starts = new Map<Tensor, number>();
  let size = 0;
  for (const t of tensors) {
    if (starts.has(t)) continue;
    starts.set(t, size);
    size += Math.ceil(t.size / STEP) * STEP;
  }
  const all = tensor(gpu, new Float32Array(size), [size]);
  const startOf = (t: Tensor): number => starts.get(t) ?? 0;
  const move = (t: Tensor): Tensor => {
    const moved = slice(all, startOf(t), t.shape);
    copyTo(t, moved);
    gpu.release(t);
    moved.requiresGrad = true;
    return moved;
  };
  return { all, startOf, move };
}
