import { defineKernel, type Uniform } from "../gpu/kernel.ts";
import type { Tensor } from "../tensor/tensor.ts";
import source from "./record-step.wgsl";

const kernel = defineKernel("record-step", source);

/** i32 elements of a slot for so many losses. */
export const slotSize = (losses: number): number => 2 + losses;

/** i32 elements of a ring of so many slots, to be made of zeros. */
export const ringSize = (slots: number, losses: number): number => (1 + slots) * slotSize(losses);

/**
 * Notes losses [L] and gradient norm of a step in its slot of the ring, and whether its update is made: not if the first loss or the norm is
 * not finite, nor after `mostBad` such steps in a row, until the ring is zeroed; 0: not at all. `clip` [norm, factor] of `globalNorm` is changed so that
 * `adamwStep` obeys.
 */
export function recordStep(losses: Tensor, clip: Tensor, ring: Tensor, slot: Uniform, mostBad: Uniform): void {
  kernel(losses.gpu, { slot, most_bad: mostBad, L: losses.size }, { losses, clip, ring }, [1]);
}
