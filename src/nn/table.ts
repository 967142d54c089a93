/** A vector for each word of a vocabulary: what an embedding reads by rows, and what an output projection multiplies with. */
import { add, matmul, scale } from "../autograd/basic-ops.ts";
import { embedding } from "../autograd/model-ops.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { inUse, type Module } from "./module.ts";

/** W [V,C], in one piece or several. Where input and output are tied, each has a table of its own on the same tensors. */
export interface Table extends Module<readonly Tensor[]> {
  readonly use: "embedding" | "head";
  /** What is added to W while they are there: how LoRA hooks in. */
  updates?: readonly TableUpdate[] | undefined;
}

/** ΔW = s·X·Y with X [V,r], Y [r,C]. */
export interface TableUpdate {
  readonly X: Tensor;
  /** Made anew in each forward pass. */
  Y(): Tensor;
  scale(): number;
  /** What a head's update reads in place of h: dropout. */
  dropped?(h: Tensor): Tensor;
}

/** What an update of a head adds to the logits: s·u·Xᵀ with u = h·Yᵀ [M,r]. */
export interface HeadUpdate {
  readonly u: Tensor;
  readonly X: Tensor;
  readonly scale: number;
}

/** Rows of W + Σ s·X·Y by ids (i32): [...ids.shape, C]. */
export function embed(table: Table, ids: Tensor): Tensor {
  const y = embedding(inUse(table).weight, ids);
  const added = (table.updates ?? []).map((one) => scale(matmul(embedding(one.X, ids), one.Y()), one.scale()));
  return added.reduce(add, y);
}

/** The updates of a head, as they are for h [...,C]. */
export const headUpdates = ({ updates = [] }: Table, h: Tensor): HeadUpdate[] =>
  updates.map((one) => ({ u: matmul(one.dropped?.(h) ?? h, one.Y(), "nt"), X: one.X, scale: one.scale() }));
