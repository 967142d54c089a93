import { defineKernel, type Uniform } from "../gpu/kernel.ts";
import type { Tensor } from "../tensor/tensor.ts";
import source from "./record-step.wgsl";

const kernel = defineKernel("record-step", source);

/** i32 elements of a ring of so many steps, to be made of zeros. */
export const ringSize = (slots: number): number => 4 * (1 + slots);

/**
 * Notes loss and gradient norm of a step in its slot of the ring, and whether its update is made: not if one of them is not finite, nor after
 * `mostBad` such steps in a row, until the ring is zeroed. `clip` [norm, factor] of `globalNorm` is changed so that `adamwStep` obeys.
 */
export function recordStep(loss: Tensor, clip: Tensor, ring: Tensor, slot: Uniform, mostBad: number): void {
  kernel(loss.gpu, { slot, most_bad: mostBad }, { loss, clip, ring }, [1]);
}
