import type { Gpu } from "../gpu/gpu.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";

/** How a model turns positions into angles. `theta` is the base of the geometric series of frequencies. */
export type RopeSettings = { readonly theta: number } & (
  | { readonly type: "default" }
  /** Positions are divided by `factor`. */
  | { readonly type: "linear"; readonly factor: number }
  /** The base grows with rows longer than `originalLength`. */
  | { readonly type: "dynamic"; readonly factor: number; readonly originalLength: number }
  | {
      readonly type: "llama3";
      readonly factor: number;
      readonly lowFreqFactor: number;
      readonly highFreqFactor: number;
      /** Context length of the pre-training that the factors refer to. */
      readonly originalLength: number;
    }
  | {
      readonly type: "yarn";
      readonly factor: number;
      /** Full turns within the original context from which on a frequency is kept, and up to which it is divided. */
      readonly betaFast: number;
      readonly betaSlow: number;
      /** Whether the borders between them are rounded to whole pairs. */
      readonly truncate: boolean;
      readonly attentionFactor: number;
      readonly originalLength: number;
    }
  /** A divisor for each frequency, one list for rows up to `originalLength` and one for longer ones. */
  | {
      readonly type: "longrope";
      readonly shortFactors: readonly number[];
      readonly longFactors: readonly number[];
      readonly attentionFactor: number;
      readonly originalLength: number;
    }
);

/** Whether rows of so many positions have angles of their own: see "dynamic" and "longrope". */
export const dependsOnLength = (rope: RopeSettings, length: number): boolean =>
  (rope.type === "dynamic" || rope.type === "longrope") && length > rope.originalLength;

/**
 * The angle per position of each of the E/2 rotated pairs: θ^(−2i/E).        RoFormer, arXiv:2104.09864 §3.2.2
 *
 * "linear" divides all by `factor` (arXiv:2306.15595). "dynamic" takes θ·(factor·length/originalLength − factor + 1)^(E/(E − 2)) for θ where
 * `length`, that of the rows, is above originalLength. "llama3" divides the slow ones, keeps the fast ones, and blends between by their turns
 * (Llama 3.1's published rule), and so does "yarn" by their index (arXiv:2309.00071 §3.2). "longrope": arXiv:2402.13753.
 */
export function inverseFrequencies(rotaryDim: number, rope: RopeSettings, length = 0): Float64Array {
  const theta = dependsOnLength(rope, length) && rope.type === "dynamic" ? grown(rotaryDim, rope, length) : rope.theta;
  const kept = rope.type === "yarn" ? yarnRamp(rotaryDim, rope) : () => 1;
  return Float64Array.from({ length: rotaryDim / 2 }, (_, i) => {
    const frequency = theta ** ((-2 * i) / rotaryDim);
    switch (rope.type) {
      case "linear":
        return frequency / rope.factor;
      case "llama3": {
        const turns = (rope.originalLength * frequency) / (2 * Math.PI); // full turns within the original context
        const blend = (turns - rope.lowFreqFactor) / (rope.highFreqFactor - rope.lowFreqFactor);
        return between(frequency / rope.factor, frequency, clamp(blend));
      }
      case "yarn":
        return between(frequency / rope.factor, frequency, kept(i));
      case "longrope": {
        const factors = dependsOnLength(rope, length) ? rope.longFactors : rope.shortFactors;
        return frequency / (factors[i] ?? 1);
      }
      default:
        return frequency;
    }
  });
}

const clamp = (x: number): number => Math.min(1, Math.max(0, x));
const between = (a: number, b: number, share: number): number => share * b + (1 - share) * a;

function grown(rotaryDim: number, rope: RopeSettings & { readonly type: "dynamic" }, length: number): number {
  const growth = (rope.factor * length) / rope.originalLength - (rope.factor - 1);
  return rope.theta * growth ** (rotaryDim / (rotaryDim - 2));
}

/** The share of its own frequency that pair i keeps. */
function yarnRamp(rotaryDim: number, rope: RopeSettings & { readonly type: "yarn" }): (i: number) => number {
  const pairOf = (turns: number): number =>
    (rotaryDim * Math.log(rope.originalLength / (turns * 2 * Math.PI))) / (2 * Math.log(rope.theta));
  const [fast, slow] = [pairOf(rope.betaFast), pairOf(rope.betaSlow)];
  const low = Math.max(rope.truncate ? Math.floor(fast) : fast, 0);
  const high = Math.min(rope.truncate ? Math.ceil(slow) : slow, rotaryDim - 1);
  return (i) => 1 - clamp((i - low) / (high === low ? 1e-3 : high - low));
}

/**
 * cos and sin of every angle, for rows of `length` positions: two tensors [positions, E/2], times the attention factor where there is one.
 *
 * Made on the host: WGSL promises little of sin at large angles.
 */
export function ropeTables(
  gpu: Gpu,
  rotaryDim: number,
  positions: number,
  rope: RopeSettings,
  length = 0,
): { cos: Tensor; sin: Tensor } {
  const frequencies = inverseFrequencies(rotaryDim, rope, length).map(Math.fround);
  const factor = "attentionFactor" in rope ? rope.attentionFactor : 1;
  const half = frequencies.length;
  const [cos, sin] = [new Float32Array(positions * half), new Float32Array(positions * half)];
  for (let p = 0; p < positions; p++)
    for (let i = 0; i < half; i++) {
      const angle = Math.fround(p * (frequencies[i] ?? 0));
      cos[p * half + i] = factor * Math.cos(angle);
      sin[p * half + i] = factor * Math.sin(angle);
    }
  const shape = [positions, half];
  return { cos: tensor(gpu, cos, shape), sin: tensor(gpu, sin, shape) };
}
