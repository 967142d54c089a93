/** A frozen matrix stored in fewer than 32 bits per element. Products widen it as they read it. */
import type { Gpu } from "../gpu/gpu.ts";
import type { Tensor } from "./tensor.ts";

/**
 * How an element is stored. f16 and bf16 as they are; int8 and nf4 as codes with a scale for each `group` elements of the
 * row-major matrix.
 */
export type PackedFormat = "f16" | "bf16" | "int8" | "nf4";

/** A matrix [rows, columns] in a packed format; columns must be a multiple of 4. Made by `packMatrix`. */
export interface PackedMatrix {
  readonly gpu: Gpu;
  readonly format: PackedFormat;
  readonly shape: readonly [rows: number, columns: number];
  /** The elements or codes, as words (i32). */
  readonly words: Tensor;
  /** int8, nf4: scales as f32, or as words when they are quantised themselves (`doubleQuant`). */
  readonly scales?: Tensor;
  /** Elements that share a scale, a power of two: kernels find the scale by a shift. A scale for a whole row is there once per group. */
  readonly group: number;
  readonly doubleQuant: boolean;
}

/** The tensors that it is or consists of, to be released. */
export const tensorsIn = (w: Tensor | PackedMatrix): Tensor[] =>
  isPacked(w) ? [w.words, ...(w.scales ? [w.scales] : [])] : [w];

/** True for a packed matrix, false for a tensor. */
export function isPacked(w: Tensor | PackedMatrix): w is PackedMatrix {
  return "format" in w;
}
