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
  /** What one of them is there: a view, which requires a gradient. */
  placeOf(t: Tensor): Tensor;
}

/** Moves these tensors into a buffer, in this order; those that come again keep their first place. Where there is no room they stay. */
export function layOut(gpu: Gpu, tensors: readonly Tensor[]): Flat {
  const starts = new Map<Tensor, number>();
  let size = 0;
  for (const t of tensors) {
    if (starts.has(t)) continue;
    starts.set(t, size);
    size += Math.ceil(t.size / STEP) * STEP;
  }
  const all = tensor(gpu, new Float32Array(size), [size]);
  for (const [t, start] of starts) copyTo(t, slice(all, start, t.shape));
  gpu.release(...starts.keys());
  const startOf = (t: Tensor): number => starts.get(t) ?? 0;
  const placeOf = (t: Tensor): Tensor => {
    const view = slice(all, startOf(t), t.shape);
    view.requiresGrad = true;
    return view;
  };
  return { all, startOf, placeOf };
}
