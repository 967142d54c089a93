import { add, matmul, reshape, scale } from "../autograd/basic-ops.ts";
import { record } from "../autograd/engine.ts";
import { type AttentionOptions, attention, embedding } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import { copyRows } from "../kernels/copy-rows.ts";
import {
  type PagedAttentionOptions,
  type PagedTokens,
  type Pages,
  pagedAttention,
  pagedWrite,
} from "../kernels/paged.ts";
import { softCap } from "../kernels/soft-cap.ts";
import type { Linear } from "../nn/linear.ts";
import { inUse, type Module } from "../nn/module.ts";
import { type EmbeddingNoise, type HeadUpdate, headUpdates, type Table } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { dims2, empty, rowsOf, type Tensor, tensor, view } from "../tensor/tensor.ts";
import type { CausalConfig } from "./decoder-config.ts";
import { tensorsOf, type Weights } from "./weights.ts";

/** Keys and values of the positions seen so far, so that generation computes each position once. */
export interface KvCache {
  /** Positions filled. */
  length: number;
  readonly capacity: number;
  readonly layers: readonly { readonly k: Tensor; readonly v: Tensor }[];
}

/** Rows of several segments: no position sees one of a segment before its own. Each i32 [B,T]. */
export interface Packing {
  /** Of each token within its segment, from 0. */
  readonly positions: Tensor;
  /** Where in the row the segment of each token begins. */
  readonly starts: Tensor;
}

/** Tokens of any sequences, in one row [1,T], whose keys and values lie in pages: those of this pass are put there, and all are seen. */
export interface PagedRow extends PagedTokens {
  readonly layers: readonly Pages[];
  /** No sequence gets longer: what angles that depend on the length go by. */
  readonly contextLength: number;
}

/** A cache, packed rows, a row with its cache in pages, or none of them. */
export interface HiddenOptions {
  readonly cache?: KvCache;
  readonly packing?: Packing;
  /** In training, on the tokens' embeddings. */
  readonly noise?: EmbeddingNoise;
  readonly paged?: PagedRow;
}

/** Where the tokens of a forward pass stand. */
export interface Places extends HiddenOptions {
  /** Position of the first token: what a cache holds already. */
  readonly start: number;
  /** Positions after the last token. */
  readonly end: number;
  /** i32 [B,T]: of each token, where they are not start, start + 1, … in every row. */
  readonly positions: Tensor | undefined;
}

/** A model that predicts the next token: logits = hidden·headᵀ. What its layers compute is its own. */
export abstract class CausalModel<C extends CausalConfig = CausalConfig> {
  readonly gpu: Gpu;
  readonly config: C;
  /** Every linear layer that can take an adapter, by module name: "model.layers.0.self_attn.q_proj". */
  readonly linears: ReadonlyMap<string, Linear>;
  /** Names of those that read the same input. */
  abstract readonly groups: readonly (readonly string[])[];
  /** Every module with parameters of its own, by name, with norms, embeddings and the head, "lm_head", which may be tied to one of them. */
  readonly modules: ReadonlyMap<string, Module>;
  readonly #head: Table;
  /** c: a logit x counts as c·tanh(x/c). */
  readonly logitCap: number | undefined;
  /** Keep only the input of each block for the backward pass and compute the block again there: less memory, a third more arithmetic. */
  checkpointing = false;
  readonly #weights: Weights;

  /** `weights` have been asked for every linear layer. */
  constructor(gpu: Gpu, config: C, weights: Weights, head: Table, logitCap?: number) {
    this.gpu = gpu;
    this.config = config;
    this.#weights = weights;
    this.linears = weights.linears;
    this.modules = weights.modules;
    this.#head = head;
    this.logitCap = logitCap;
  }

  /** The output projection [V,C] as it is now, in one piece or several, without what an adapter adds. */
  get head(): readonly Tensor[] {
    return inUse(this.#head).weight;
  }

  /** What an adapter of the head adds to the logits of h [...,C]. */
  headUpdates(h: Tensor): readonly HeadUpdate[] {
    return headUpdates(this.#head, h);
  }

  /** Every weight as it is now, by Hugging Face name, but those that are packed: a merged layer shows its merged weight. */
  get weights(): Map<string, Tensor> {
    return this.#weights.tensors;
  }

  /** The weights that are packed. */
  get packed(): Map<string, PackedMatrix> {
    return this.#weights.packed;
  }

  /**
   * What the output projection is applied to: ids i32 [B,T] → [B,T,C]. Cache and errors as in `logits`. Packed rows take no cache: each
   * of their segments is computed as if it were a row of its own.
   */
  abstract hidden(ids: Tensor, options?: HiddenOptions): Tensor;

  /**
   * Next-token logits: ids i32 [B,T] → [B,T,V]; with `lastOnly`, those of the last position, [B,1,V].
   *
   * With a cache, the ids continue what it holds and are added to it; no gradients then. Throws ShapeError when a row is longer
   * than the model's context (or the cache).
   */
  logits(ids: Tensor, { cache, lastOnly = false }: { cache?: KvCache; lastOnly?: boolean } = {}): Tensor {
    const [B = 0, T = 0] = ids.shape;
    const y = this.hidden(ids, cache ? { cache } : {});
    if (!lastOnly) return this.#project(y);
    const last = Int32Array.from({ length: B }, (_, b) => b * T + T - 1);
    return this.#projectRows(y, tensor(this.gpu, last, [B, 1]));
  }

  /**
   * Next-token logits of some tokens of a row whose cache is in pages: ids i32 [1,T], `rows` i32 [N] (of the row's tokens) → [N,V].
   *
   * Every length that it depends on is the row's or in a tensor's values, so that a traced call serves any sequences. Throws ShapeError as
   * `pagedAttention`, and for a model whose angles change as a sequence grows within contextLength.
   */
  pagedLogits(ids: Tensor, paged: PagedRow, rows: Tensor): Tensor {
    return this.#projectRows(this.hidden(ids, { paged }), rows);
  }

  #projectRows(y: Tensor, rows: Tensor): Tensor {
    return this.#project(embedding(reshape(y, [y.size / this.config.hiddenSize, this.config.hiddenSize]), rows));
  }

  /** y·headᵀ. Pieces are joined, and capped logits are for reading: there is no gradient through that. */
  #project(y: Tensor): Tensor {
    const updates = this.headUpdates(y);
    const parts = piecesOf(this.head).map(({ W, first, rows }) =>
      updates.reduce(
        (sum, { u, X, scale: s }) => {
          const part = rows === X.shape[0] ? X : rowsOf(X, first, rows);
          return add(sum, scale(matmul(u, part, "nt"), s));
        },
        matmul(y, W, "nt"),
      ),
    );
    if (parts.length === 1 && this.logitCap === undefined) return parts[0] as Tensor;
    const [M] = dims2("logits", "hidden", y);
    const V = this.config.vocabSize;
    const logits = empty(this.gpu, [...y.shape.slice(0, -1), V], "logits");
    piecesOf(this.head).forEach(({ first, rows }, i) => {
      copyRows(view(parts[i] as Tensor, [M, rows]), view(logits, [M, V]), first);
    });
    if (this.logitCap !== undefined) softCap(logits, this.logitCap);
    return record("logits", logits, parts, () => {
      throw new ShapeError("logits: gradients need one head without a cap. Use linearCrossEntropy");
    });
  }

  /** Throws ShapeError where the tokens do not fit. */
  protected places(ids: Tensor, options: HiddenOptions): Places {
    const { cache, packing, paged } = options;
    if (cache && packing)
      throw new ShapeError("hidden: packed rows take no cache, got one. Give each segment a row of its own");
    if (paged) {
      if (cache || packing) throw new ShapeError("hidden: a row in pages takes no other cache and no packing, got one");
      return { ...options, start: 0, end: paged.contextLength, positions: view(paged.positions, ids.shape) };
    }
    const start = cache?.length ?? 0;
    const end = start + (ids.shape[1] ?? 0);
    const limit = cache?.capacity ?? this.config.contextLength;
    if (end > limit) throw new ShapeError(`logits: at most ${limit} positions fit, got ${end}. Shorten the rows`);
    return { ...options, start, end, positions: packing?.positions };
  }

  /** An empty cache for B rows of up to `capacity` positions. */
  cache(B: number, capacity: number): KvCache {
    const { kvHeads, headDim, layers, contextLength } = this.config;
    const size = Math.min(capacity, contextLength);
    const one = (): Tensor => empty(this.gpu, [B, size, kvHeads, headDim], "key-value cache");
    return { length: 0, capacity: size, layers: Array.from({ length: layers }, () => ({ k: one(), v: one() })) };
  }

  /** Whether files have this weight as [K,N], turned around. */
  isTransposed(_name: string): boolean {
    return false;
  }

  /** Frees every weight. Adapters are freed by their own `detach`. */
  destroy(): void {
    this.gpu.release(...new Set(tensorsOf(this.#weights.current())));
  }
}

/**
 * Attention of a pass's queries over all keys that they see, those of this pass included, in layer i: q [B,T,H,D], k and v [B,T,G,D] →
 * [B,T,H,D]. Keys and values are put into the cache, where there is one.
 */
export function attend(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  { start, end, packing, cache, paged }: Places,
  i: number,
  { window, ...options }: PagedAttentionOptions,
): Tensor {
  const pages = paged?.layers[i];
  if (paged && pages) {
    const flat = (t: Tensor): Tensor => view(t, t.shape.slice(1));
    pagedWrite(flat(k), flat(v), pages, paged);
    return view(pagedAttention(flat(q), pages, paged, { ...options, window }), q.shape);
  }
  const layer = cache?.layers[i];
  if (layer) {
    copyRows(k, layer.k, start);
    copyRows(v, layer.v, start);
  }
  const settings: AttentionOptions = {
    ...(options.scale !== undefined && { scale: options.scale }),
    softCap: options.softCap,
    ...(window !== undefined && window < end && { window }),
    ...(packing && { starts: packing.starts }),
  };
  return attention(q, layer?.k ?? k, layer?.v ?? v, { keyLength: end, ...settings });
}
