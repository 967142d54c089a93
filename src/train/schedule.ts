import { ShapeError } from "../tensor/errors.ts";

export type Schedule = "constant" | "linear" | "cosine";

/**
 * The factor on the learning rate at step k = 0, 1, … of `steps`, as transformers' `get_*_schedule_with_warmup`:
 * k / warmup at first, then 1 (constant), (steps − k) / (steps − warmup) (linear) or ½(1 + cos πp) (cosine), p from 0 to 1.
 */
export function scheduleFactor(schedule: Schedule, k: number, steps: number, warmup: number): number {
  if (k < warmup) return k / warmup;
  const progress = (k - warmup) / Math.max(1, steps - warmup);
  switch (schedule) {
    case "constant":
      return 1;
    case "linear":
      return Math.max(0, 1 - progress);
    case "cosine":
      return Math.max(0, 0.5 * (1 + Math.cos(Math.PI * progress)));
    default:
      throw new ShapeError(`schedule: must be constant, linear or cosine, got ${String(schedule)}`);
  }
}
