import type { Gpu } from "../gpu/gpu.ts";
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { readAll, type Tensor, tensor } from "../tensor/tensor.ts";

/** What generation needs of a model. `C` is the model's own cache. */
export interface Generator<C> {
  readonly gpu: Gpu;
  readonly config: { readonly contextLength: number; readonly eosIds: readonly number[]; readonly vocabSize: number };
  cache(B: number, capacity: number): C;
  logits(ids: Tensor, options: { readonly cache: C; readonly lastOnly: boolean }): Tensor;
}

export interface GenerateOptions {
  /** Ids to continue; at least one. */
  readonly promptIds: readonly number[];
  readonly maxTokens: number;
  /** 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature). */
  readonly temperature?: number;
  readonly seed?: number;
  readonly signal?: AbortSignal;
}

/**
 * Continues a prompt, one token id at a time, computing each position once. Ends at an end-of-text token (which is not yielded),
 * after `maxTokens`, or when the model's context is full.
 *
 * Throws ShapeError for an empty or too long prompt, an id outside the vocabulary, and a negative temperature.
 */
export async function* generate<C extends { readonly layers: readonly { readonly k: Tensor; readonly v: Tensor }[] }>(
  model: Generator<C>,
  { promptIds, maxTokens, temperature = 0, seed = 0, signal }: GenerateOptions,
): AsyncGenerator<number, void, undefined> {
  const { gpu, config } = model;
  if (promptIds.length === 0) throw new ShapeError("generate: the prompt must have at least one token, got none");
  if (promptIds.length >= config.contextLength)
    throw new ShapeError(
      `generate: the prompt must be shorter than the context of ${config.contextLength} tokens, got ${promptIds.length}`,
    );
  const bad = promptIds.find((id) => !Number.isInteger(id) || id < 0 || id >= config.vocabSize);
  if (bad !== undefined) throw new ShapeError(`generate: ids must be in [0, ${config.vocabSize}), got ${bad}`);
  if (!Number.isInteger(maxTokens) || maxTokens < 0)
    throw new ShapeError(`generate: maxTokens must be a whole number of at least 0, got ${maxTokens}`);
  if (!(temperature >= 0) || !Number.isFinite(temperature))
    throw new ShapeError(`generate: temperature must be a number of at least 0, got ${temperature}`);

  const random = new Random(seed);
  const room = Math.min(maxTokens, config.contextLength - promptIds.length);
  const cache = model.cache(1, promptIds.length + room);
  try {
    let next = promptIds;
    for (let n = 0; n < room && !signal?.aborted; n++) {
      const ids = Int32Array.from(next);
      const logits = gpu.scope(() => model.logits(tensor(gpu, ids, [1, ids.length]), { cache, lastOnly: true }));
      const [values = new Float32Array()] = await readAll([logits]);
      gpu.release(logits);
      const id = temperature === 0 ? argmax(values) : sample(values, temperature, random.uniform());
      if (config.eosIds.includes(id)) return;
      yield id;
      next = [id];
    }
  } finally {
    for (const { k, v } of cache.layers) gpu.release(k, v);
  }
}

/** Index of the largest value; the first of equals. */
function argmax(values: Float32Array): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if ((values[i] ?? 0) > (values[best] ?? 0)) best = i;
  return best;
}

/** The index whose share of softmax(values / temperature) covers u in [0, 1). */
function sample(values: Float32Array, temperature: number, u: number): number {
  const largest = values.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const weights = Float64Array.from(values, (x) => Math.exp((x - largest) / temperature));
  let left = u * weights.reduce((a, b) => a + b, 0);
  for (const [i, weight] of weights.entries()) {
    left -= weight;
    if (left < 0) return i;
  }
  return argmax(values);
}
