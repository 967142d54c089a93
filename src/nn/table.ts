/** A vector for each word of a vocabulary: what an embedding reads by rows, and what an output projection multiplies with. */
import { add, matmul, scale } from "../autograd/basic-ops.ts";
import { addNoise, embedding } from "../autograd/model-ops.ts";
import type { Uniform } from "../gpu/kernel.ts";
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

/**
 * NEFTune (arXiv:2310.05914): uniform noise of ±alpha/√(T·C) on each number that comes out of an embedding, where T is the positions that a row
 * has in its batch, padding and all, as in transformers. Made from the seed and the number of the batch.
 */
export interface EmbeddingNoise {
  readonly alpha: number;
  readonly seed: number;
  readonly step: Uniform;
}

/** Far from the streams of the modules' dropout. */
const NOISE_STREAM = 2 ** 32 - 1;

/** Rows of W + Σ s·X·Y by ids (i32): [...ids.shape, C]; with noise, ids are [B,T]. */
export function embed(table: Table, ids: Tensor, noise?: EmbeddingNoise): Tensor {
  const y = withUpdates(table, ids);
  if (!noise) return y;
  const { alpha, ...key } = noise;
  return addNoise(y, alpha / Math.sqrt(y.size / (ids.shape[0] ?? 1)), { ...key, stream: NOISE_STREAM });
}

function withUpdates(table: Table, ids: Tensor): Tensor {
  const y = embedding(inUse(table).weight, ids);
  const added = (table.updates ?? []).map((one) => scale(matmul(embedding(one.X, ids), one.Y()), one.scale()));
  return added.reduce(add, y);
}

/** The updates of a head, as they are for h [...,C]. */
export const headUpdates = ({ updates = [] }: Table, h: Tensor): HeadUpdate[] =>
  updates.map((one) => ({ u: matmul(one.dropped?.(h) ?? h, one.Y(), "nt"), X: one.X, scale: one.scale() }));
