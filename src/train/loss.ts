import { crossEntropy } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import { readAll, type Tensor, tensor } from "../tensor/tensor.ts";
import { type Batch, collate } from "./batches.ts";
import type { Row } from "./data.ts";

/** Anything that gives next-token logits, such as a model with or without an adapter. */
export interface LanguageModel {
  readonly gpu: Gpu;
  /** ids i32 [B,T] → [B,T,V] */
  logits(ids: Tensor): Tensor;
}

/** Σ over the batch's target tokens of −log p(target), times `scale`: one number, shape []. */
export function batchLoss(model: LanguageModel, { ids, labels, B, T }: Batch, scale: number): Tensor {
  const logits = model.logits(tensor(model.gpu, ids, [B, T]));
  return crossEntropy(logits, tensor(model.gpu, labels, [B, T]), scale);
}

export interface Evaluation {
  /** Mean of −log p over all target tokens, in nats. */
  readonly loss: number;
  /** exp(loss) */
  readonly perplexity: number;
  /** Target tokens. */
  readonly tokens: number;
}

/** The mean loss over the target tokens of all rows. */
export async function evaluate(
  model: LanguageModel,
  rows: readonly Row[],
  batchSize: number,
  padId = 0,
): Promise<Evaluation> {
  let total = 0;
  let tokens = 0;
  for (let at = 0; at < rows.length; at += batchSize) {
    const batch = collate(rows.slice(at, at + batchSize), padId);
    const sum = model.gpu.scope(() => batchLoss(model, batch, 1));
    const [value] = await readAll([sum]);
    model.gpu.release(sum);
    total += value?.[0] ?? Number.NaN;
    tokens += batch.tokens;
  }
  const loss = total / tokens;
  return { loss, perplexity: Math.exp(loss), tokens };
}
