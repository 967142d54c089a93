/** The rows of a matrix in one tensor or in several: a device may not bind a large vocabulary in one. */
import type { PackedMatrix } from "./packed.ts";
import type { Tensor } from "./tensor.ts";

export interface Piece<T> {
  readonly W: T;
  /** Which row of the whole is its first. */
  readonly first: number;
  readonly rows: number;
}

/** A matrix, or its rows 0 … V₀ − 1, V₀ … and so on: one behind the other. */
export function piecesOf<T extends Tensor | PackedMatrix>(matrix: T | readonly T[]): Piece<T>[] {
  let end = 0;
  return ("length" in matrix ? matrix : [matrix]).map((W) => {
    const [rows = 0] = W.shape;
    end += rows;
    return { W, first: end - rows, rows };
  });
}
