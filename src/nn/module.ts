import type { PackedMatrix } from "../tensor/packed.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** A part of a model with parameters of its own. */
export interface Module<W = Tensor | PackedMatrix | readonly Tensor[]> {
  weight: W;
  bias?: Tensor | undefined;
  /** Trained copies, which count in their place while they are set. */
  trained?: { readonly weight?: W | undefined; readonly bias?: Tensor | undefined } | undefined;
}

/** The factors of a norm, and what some kinds of norm add. */
export type Norm = Module<Tensor>;

/** The parameters that count. */
export const inUse = <W>({ weight, bias, trained }: Module<W>): { weight: W; bias: Tensor | undefined } => ({
  weight: trained?.weight ?? weight,
  bias: trained?.bias ?? bias,
});
