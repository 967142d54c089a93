/**
 * The Llama family: pre-norm decoder blocks with RoPE, grouped-query attention and a gated MLP.
 *
 *     h = h + Wo·attention(rope(Wq·n), rope(Wk·n), Wv·n)     n = rmsNorm(h)
 *     h = h + Wdown·(act(Wgate·n) ∘ Wup·n)                    n = rmsNorm(h)
 *
 * Shapes: B rows, T positions, C = hiddenSize, H heads of D, G key-value heads, V words. arXiv:2302.13971, 2307.09288.
 */
import { add, matmul, reshape } from "../autograd/basic-ops.ts";
import { recompute, record } from "../autograd/engine.ts";
import { addRmsNorm, attention, embedding, gated, rmsNorm, rope } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import { copyRows } from "../kernels/copy-rows.ts";
import { type Checkpoint, loadTensor, sliceName, sliceOf } from "../nn/checkpoint.ts";
import { type Linear, linear, linears } from "../nn/linear.ts";
import { ropeTables } from "../nn/rope.ts";
import { ShapeError } from "../tensor/errors.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { dims2, empty, type Tensor, tensor, view } from "../tensor/tensor.ts";
import type { LlamaConfig } from "./config.ts";

interface Block {
  readonly inputNorm: Tensor;
  readonly attention: { readonly q: Linear; readonly k: Linear; readonly v: Linear; readonly o: Linear };
  readonly postNorm: Tensor;
  readonly mlp: { readonly gate: Linear; readonly up: Linear; readonly down: Linear };
}

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

export class Llama {
  readonly gpu: Gpu;
  readonly config: LlamaConfig;
  /** Every linear layer that can take an adapter, by module name: "model.layers.0.self_attn.q_proj". */
  readonly linears: ReadonlyMap<string, Linear>;
  /** Names of those that read the same input. */
  readonly groups: readonly (readonly string[])[];
  /** Keep only the input of each block for the backward pass and compute the block again there: less memory, a third more arithmetic. */
  checkpointing = false;
  readonly #embedding: readonly Tensor[];
  readonly #blocks: readonly Block[];
  readonly #norm: Tensor;
  readonly #head: readonly Tensor[];
  readonly #rope: { readonly cos: Tensor; readonly sin: Tensor };
  readonly #others: ReadonlyMap<string, Tensor>;

  /** `weights` by Hugging Face name, complete and in the order of `llamaShapes`. */
  constructor(gpu: Gpu, config: LlamaConfig, weights: ReadonlyMap<string, Tensor>) {
    const get = (name: string): Tensor => {
      const t = weights.get(name);
      if (!t) throw new ShapeError(`llama: weight "${name}" must be given, got ${weights.size} others`);
      return t;
    };
    const pieces = (name: string): Tensor[] => {
      const found = [...weights].flatMap(([key, t]) => (sliceOf(key).name === name ? [t] : []));
      return found.length > 0 ? found : [get(name)];
    };
    const byName = new Map<string, Linear>();
    const layer = (module: string): Linear => {
      const bias = weights.get(`${module}.bias`);
      const made: Linear = { weight: get(`${module}.weight`), ...(bias && { bias }) };
      byName.set(module, made);
      return made;
    };
    this.gpu = gpu;
    this.config = config;
    this.#embedding = pieces("model.embed_tokens.weight");
    this.#blocks = Array.from({ length: config.layers }, (_, i) => {
      const at = `model.layers.${i}`;
      return {
        inputNorm: get(`${at}.input_layernorm.weight`),
        attention: {
          q: layer(`${at}.self_attn.q_proj`),
          k: layer(`${at}.self_attn.k_proj`),
          v: layer(`${at}.self_attn.v_proj`),
          o: layer(`${at}.self_attn.o_proj`),
        },
        postNorm: get(`${at}.post_attention_layernorm.weight`),
        mlp: { gate: layer(`${at}.mlp.gate_proj`), up: layer(`${at}.mlp.up_proj`), down: layer(`${at}.mlp.down_proj`) },
      };
    });
    this.#norm = get("model.norm.weight");
    this.#head = config.tiedEmbeddings ? this.#embedding : pieces("lm_head.weight");
    this.linears = byName;
    this.groups = Array.from({ length: config.layers }, (_, i) => `model.layers.${i}`).flatMap((at) => [
      ["q", "k", "v"].map((one) => `${at}.self_attn.${one}_proj`),
      ["gate", "up"].map((one) => `${at}.mlp.${one}_proj`),
    ]);
    this.#others = new Map([...weights].filter(([name]) => !byName.has(name.replace(/\.weight$/, ""))));
    this.#rope = ropeTables(gpu, config.headDim, config.contextLength, config.rope);
  }

  /** Every weight as it is now, named as in `llamaShapes`: a merged layer shows its merged weight. */
  get weights(): Map<string, Tensor> {
    const layers = [...this.linears].map(([name, { weight }]) => [`${name}.weight`, weight] as const);
    return new Map([...this.#others, ...layers]);
  }

  /** The output projection [V,C], in one piece or several: `logits` is `hidden` times its transpose. */
  get head(): readonly Tensor[] {
    return this.#head;
  }

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
    const rows = embedding(reshape(y, [B * T, this.config.hiddenSize]), tensor(this.gpu, last, [B, 1]));
    return this.#project(rows);
  }

  /** y·headᵀ. Pieces are joined, for reading: there is no gradient through that. */
  #project(y: Tensor): Tensor {
    const parts = this.#head.map((W) => matmul(y, W, "nt"));
    if (parts.length === 1) return parts[0] as Tensor;
    const [M] = dims2("logits", "hidden", y);
    const V = this.config.vocabSize;
    const logits = empty(this.gpu, [...y.shape.slice(0, -1), V], "logits");
    piecesOf(this.#head).forEach(({ first, rows }, i) => {
      copyRows(view(parts[i] as Tensor, [M, rows]), view(logits, [M, V]), first);
    });
    return record("logits", logits, parts, () => {
      throw new ShapeError("logits: gradients need a head in one piece, got several. Use linearCrossEntropy");
    });
  }

  /**
   * What the output projection is applied to: ids i32 [B,T] → [B,T,C]. Cache and errors as in `logits`. Packed rows take no cache: each
   * of their segments is computed as if it were a row of its own.
   */
  hidden(ids: Tensor, { cache, packing }: { readonly cache?: KvCache; readonly packing?: Packing } = {}): Tensor {
    if (cache && packing)
      throw new ShapeError("hidden: packed rows take no cache, got one. Give each segment a row of its own");
    const [, T = 0] = ids.shape;
    const start = cache?.length ?? 0;
    const at = packing ?? start;
    const limit = cache?.capacity ?? this.config.contextLength;
    if (start + T > limit)
      throw new ShapeError(`logits: at most ${limit} positions fit, got ${start + T}. Shorten the rows`);
    const eps = this.config.rmsNormEps;
    let sum = embedding(this.#embedding, ids);
    if (this.checkpointing && !cache) {
      for (const block of this.#blocks)
        sum = recompute(sum, (x) => {
          const middle = addRmsNorm(x, this.#attend(block, rmsNorm(x, block.inputNorm, eps), at), block.postNorm, eps);
          return add(middle.sum, this.#feedForward(block, middle.y));
        });
      return rmsNorm(sum, this.#norm, eps);
    }
    let y = rmsNorm(sum, this.#blocks[0]?.inputNorm ?? this.#norm, eps);
    this.#blocks.forEach((block, i) => {
      ({ sum, y } = addRmsNorm(sum, this.#attend(block, y, at, cache?.layers[i]), block.postNorm, eps));
      ({ sum, y } = addRmsNorm(sum, this.#feedForward(block, y), this.#blocks[i + 1]?.inputNorm ?? this.#norm, eps));
    });
    if (cache) cache.length += T;
    return y;
  }

  /** An empty cache for B rows of up to `capacity` positions. */
  cache(B: number, capacity: number): KvCache {
    const { kvHeads, headDim, layers, contextLength } = this.config;
    const size = Math.min(capacity, contextLength);
    const one = (): Tensor => empty(this.gpu, [B, size, kvHeads, headDim], "key-value cache");
    return { length: 0, capacity: size, layers: Array.from({ length: layers }, () => ({ k: one(), v: one() })) };
  }

  /** Frees every weight. Adapters are freed by their own `detach`. */
  destroy(): void {
    this.gpu.release(...new Set([...this.weights.values(), this.#rope.cos, this.#rope.sin]));
  }

  /** `at`: the position of the first token, with its keys and values going to `cached`, or those of packed rows. */
  #attend(
    { attention: { q, k, v, o } }: Block,
    n: Tensor,
    at: number | Packing,
    cached?: { readonly k: Tensor; readonly v: Tensor },
  ): Tensor {
    const { heads, kvHeads, headDim } = this.config;
    const [B = 0, T = 0] = n.shape;
    const { cos, sin } = this.#rope;
    const [start, positions] = typeof at === "number" ? [at, at] : [0, at.positions];
    const [ofQ, ofK, ofV] = linears([q, k, v], n);
    const queries = rope(reshape(ofQ, [B, T, heads, headDim]), cos, sin, positions);
    let keys = rope(reshape(ofK, [B, T, kvHeads, headDim]), cos, sin, positions);
    let values = reshape(ofV, [B, T, kvHeads, headDim]);
    if (cached) {
      copyRows(keys, cached.k, start);
      copyRows(values, cached.v, start);
      keys = cached.k;
      values = cached.v;
    }
    const starts = typeof at === "number" ? {} : { starts: at.starts };
    const mixed = attention(queries, keys, values, { keyLength: start + T, ...starts });
    return linear(o, reshape(mixed, [B, T, heads * headDim]));
  }

  #feedForward({ mlp }: Block, n: Tensor): Tensor {
    const [gate, up] = linears([mlp.gate, mlp.up], n);
    return linear(mlp.down, gated(gate, up, this.config.activation));
  }
}

/** What a device can bind. */
type Limits = Pick<GPUSupportedLimits, "maxBufferSize" | "maxStorageBufferBindingSize">;

/** Pieces of a vocabulary begin at multiples of so many words. */
const VOCABULARY_STEP = 64;

/**
 * Name and shape of every weight of such a model, in the order of the layers.
 *
 * Given the limits of a device, an embedding or output projection that is too large for it comes in pieces of rows,
 * "model.embed_tokens.weight[0:65536]" and so on.
 */
export function llamaShapes(config: LlamaConfig, limits?: Limits): Map<string, number[]> {
  const { hiddenSize: C, intermediateSize: I, headDim: D, vocabSize: V } = config;
  const [Q, KV] = [config.heads * D, config.kvHeads * D];
  const shapes = new Map<string, number[]>();
  const table = (name: string): void => {
    const most = limits ? Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize) / (4 * C) : V;
    const step = most >= V ? V : Math.max(1, Math.floor(most / VOCABULARY_STEP)) * VOCABULARY_STEP;
    for (let at = 0; at < V; at += step) {
      const end = Math.min(at + step, V);
      shapes.set(step === V ? name : sliceName(name, at, end), [end - at, C]);
    }
  };
  table("model.embed_tokens.weight");
  const layer = (name: string, N: number, K: number, bias: boolean): void => {
    shapes.set(`${name}.weight`, [N, K]);
    if (bias) shapes.set(`${name}.bias`, [N]);
  };
  for (let i = 0; i < config.layers; i++) {
    const at = `model.layers.${i}`;
    shapes.set(`${at}.input_layernorm.weight`, [C]);
    layer(`${at}.self_attn.q_proj`, Q, C, config.attentionBias);
    layer(`${at}.self_attn.k_proj`, KV, C, config.attentionBias);
    layer(`${at}.self_attn.v_proj`, KV, C, config.attentionBias);
    layer(`${at}.self_attn.o_proj`, C, Q, config.attentionBias);
    shapes.set(`${at}.post_attention_layernorm.weight`, [C]);
    layer(`${at}.mlp.gate_proj`, I, C, config.mlpBias);
    layer(`${at}.mlp.up_proj`, I, C, config.mlpBias);
    layer(`${at}.mlp.down_proj`, C, I, config.mlpBias);
  }
  shapes.set("model.norm.weight", [C]);
  if (!config.tiedEmbeddings) table("lm_head.weight");
  return shapes;
}

/** Loads the weights as f32, in pieces by `limits`. Throws FormatError naming a tensor that is missing or has a wrong shape. */
export async function loadLlama(
  gpu: Gpu,
  config: LlamaConfig,
  checkpoint: Checkpoint,
  limits: Limits = gpu.limits,
): Promise<Llama> {
  const whole = llamaShapes(config);
  const weights = new Map<string, Tensor>();
  try {
    for (const [key, shape] of llamaShapes(config, limits)) {
      const { name, first } = sliceOf(key);
      weights.set(key, await loadTensor(gpu, checkpoint, name, whole.get(name) ?? shape, first, shape[0]));
    }
  } catch (error) {
    gpu.release(...weights.values());
    throw error;
  }
  return new Llama(gpu, config, weights);
}
