import type { Gpu } from "../gpu/gpu.ts";
import { ShapeError } from "../tensor/errors.ts";
import { readAll, type Tensor, tensor } from "../tensor/tensor.ts";
import { choicesOf } from "./row-choices.ts";
import { type SampledToken, Sampler, type SamplingOptions } from "./sampling.ts";

/** What generation needs of a model. `C` is the model's own cache. */
export interface Generator<C> {
  readonly gpu: Gpu;
  readonly config: { readonly contextLength: number; readonly eosIds: readonly number[]; readonly vocabSize: number };
  cache(B: number, capacity: number): C;
  logits(ids: Tensor, options: { readonly cache: C; readonly lastOnly: boolean }): Tensor;
}

export interface GenerateOptions extends SamplingOptions {
  /** Ids to continue; at least one. */
  readonly promptIds: readonly number[];
  readonly maxTokens: number;
  /** How many of the likeliest tokens to give with each one; none unless given. */
  readonly logprobs?: number;
  readonly signal?: AbortSignal | undefined;
}

/** `generateTokens`, the ids alone. */
export async function* generate<C extends KeyValueCache>(
  model: Generator<C>,
  options: GenerateOptions,
): AsyncGenerator<number, void, undefined> {
  for await (const { id } of generateTokens(model, options)) yield id;
}

/** Makes and frees on a dry Gpu what `generate` needs there for such a prompt: how a plan knows. */
export function planGeneration<C extends KeyValueCache>(
  model: Generator<C>,
  promptLength: number,
  maxTokens: number,
): void {
  const { gpu, config } = model;
  const cache = model.cache(1, Math.min(promptLength + maxTokens, config.contextLength));
  for (const length of [promptLength, 1]) gpu.release(lastLogits(model, new Int32Array(length), cache));
  for (const { k, v } of cache.layers) gpu.release(k, v);
}

const lastLogits = <C>(model: Generator<C>, ids: Int32Array, cache: C): Tensor =>
  model.gpu.scope(() => model.logits(tensor(model.gpu, ids, [1, ids.length]), { cache, lastOnly: true }));

/** A model's keys and values, to be released. */
interface KeyValueCache {
  readonly layers: readonly { readonly k: Tensor; readonly v: Tensor }[];
}

/**
 * Continues a prompt, one token at a time, computing each position once. Ends at an end-of-text token (which is not yielded),
 * after `maxTokens`, when the model's context is full, or where the constraint lets nothing follow.
 *
 * Throws ShapeError for an empty or too long prompt, an id outside the vocabulary, settings out of range, and a constraint that allows no token.
 */
export async function* generateTokens<C extends KeyValueCache>(
  model: Generator<C>,
  { promptIds, maxTokens, logprobs = 0, signal, ...sampling }: GenerateOptions,
): AsyncGenerator<SampledToken, void, undefined> {
  const { gpu, config } = model;
  checkPrompt(config, promptIds, maxTokens);
  const sampler = new Sampler(promptIds, sampling, config.eosIds);
  const room = Math.min(maxTokens, config.contextLength - promptIds.length);
  const cache = model.cache(1, promptIds.length + room);
  try {
    let next = promptIds;
    for (let n = 0; n < room && !signal?.aborted; n++) {
      const logits = lastLogits(model, Int32Array.from(next), cache);
      const [values = new Float32Array()] = await readAll([logits]);
      gpu.release(logits);
      const token = sampler.next(choicesOf(values, sampler.temperature), logprobs) as SampledToken; // the row is there
      if (config.eosIds.includes(token.id)) return;
      yield token;
      if (sampling.constraint?.isDone) return;
      next = [token.id];
    }
  } finally {
    for (const { k, v } of cache.layers) gpu.release(k, v);
  }
}

/** Throws ShapeError where a model cannot continue this. */
export function checkPrompt(
  { contextLength, vocabSize }: { readonly contextLength: number; readonly vocabSize: number },
  promptIds: readonly number[],
  maxTokens: number,
): void {
  if (promptIds.length === 0) throw new ShapeError("generate: the prompt must have at least one token, got none");
  if (promptIds.length >= contextLength)
    throw new ShapeError(
      `generate: the prompt must be shorter than the context of ${contextLength} tokens, got ${promptIds.length}`,
    );
  const bad = promptIds.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabSize);
  if (bad !== undefined) throw new ShapeError(`generate: ids must be in [0, ${vocabSize}), got ${bad}`);
  if (!Number.isInteger(maxTokens) || maxTokens < 0)
    throw new ShapeError(`generate: maxTokens must be a whole number of at least 0, got ${maxTokens}`);
}
