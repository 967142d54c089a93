import type { Gpu } from "../gpu/gpu.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";

/** How a model turns positions into angles. `theta` is the base of the geometric series of frequencies. */
export type RopeSettings = { readonly theta: number } & (
  | { readonly type: "default" }
  | {
      readonly type: "llama3";
      readonly factor: number;
      readonly lowFreqFactor: number;
      readonly highFreqFactor: number;
      /** Context length of the pre-training that the factors refer to. */
      readonly originalLength: number;
    }
);

/**
 * The angle per position of each of the D/2 rotated pairs: θ^(−2i/D).        RoFormer, arXiv:2104.09864 §3.2.2
 *
 * "llama3" divides the slow ones by `factor`, keeps the fast ones, and blends between (Llama 3.1's published rule).
 */
export function inverseFrequencies(headDim: number, rope: RopeSettings): Float64Array {
  return Float64Array.from({ length: headDim / 2 }, (_, i) => {
    const frequency = rope.theta ** ((-2 * i) / headDim);
    if (rope.type === "default") return frequency;
    const turns = (rope.originalLength * frequency) / (2 * Math.PI); // full turns within the original context
    const blend = (turns - rope.lowFreqFactor) / (rope.highFreqFactor - rope.lowFreqFactor);
    const kept = Math.min(1, Math.max(0, blend));
    return kept * frequency + ((1 - kept) * frequency) / rope.factor;
  });
}

/** cos and sin of every angle: two tensors [positions, D/2]. Made on the host: WGSL promises little of sin at large angles. */
export function ropeTables(
  gpu: Gpu,
  headDim: number,
  positions: number,
  rope: RopeSettings,
): { cos: Tensor; sin: Tensor } {
  const frequencies = inverseFrequencies(headDim, rope).map(Math.fround);
  const angles = Array.from({ length: positions }, (_, p) => Array.from(frequencies, (f) => Math.fround(p * f))).flat();
  const shape = [positions, headDim / 2];
  return { cos: tensor(gpu, angles.map(Math.cos), shape), sin: tensor(gpu, angles.map(Math.sin), shape) };
}
