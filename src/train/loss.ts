import { crossEntropy } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Uniform } from "../gpu/kernel.ts";
import type { Plan } from "../gpu/plan.ts";
import { addInto } from "../kernels/axpy.ts";
import { readAll, type Tensor, tensor } from "../tensor/tensor.ts";
import { type Batch, collateRounded, largestBatch, longest } from "./batches.ts";
import type { Row } from "./data.ts";

/** Anything that gives next-token logits, such as a model with or without an adapter. */
export interface LanguageModel {
  readonly gpu: Gpu;
  /** ids i32 [B,T] → [B,T,V] */
  logits(ids: Tensor): Tensor;
}

/** A batch on the device. */
export interface Inputs {
  readonly ids: Tensor;
  readonly labels: Tensor;
  /** All of them, to be released. */
  readonly tensors: readonly Tensor[];
}

/** Batches with the same key have inputs of the same shapes. */
export const shapeKey = ({ B, T }: Batch): string => `${B}×${T}`;

/** The batch on the device. */
export function batchInputs(gpu: Gpu, { ids, labels, B, T }: Batch): Inputs {
  const made = { ids: tensor(gpu, ids, [B, T]), labels: tensor(gpu, labels, [B, T]) };
  return { ...made, tensors: Object.values(made) };
}

/** Puts another batch of the same shape in their place. What was dispatched before still sees the old one. */
export function writeInputs(inputs: Inputs, { ids, labels }: Batch): void {
  const { gpu } = inputs.ids;
  gpu.write(inputs.ids, ids);
  gpu.write(inputs.labels, labels);
}

/** Σ over the batch's target tokens of −log p(target), times `scale`: one number, shape []. */
export function batchLoss(model: LanguageModel, { ids, labels }: Inputs, scale: Uniform): Tensor {
  return crossEntropy(model.logits(ids), labels, scale);
}

export interface Evaluation {
  /** Mean of −log p over all target tokens, in nats. */
  readonly loss: number;
  /** exp(loss) */
  readonly perplexity: number;
  /** Target tokens. */
  readonly tokens: number;
}

/** The mean loss over the target tokens of all rows. Each shape of batch is traced once and replayed, as in training. */
export async function evaluate(
  model: LanguageModel,
  rows: readonly Row[],
  batchSize: number,
  padId = 0,
): Promise<Evaluation> {
  const { gpu } = model;
  const most = longest(rows);
  const workspace: GPUBuffer[] = [];
  const shapes = new Map<string, { readonly inputs: Inputs; readonly plan: Plan }>();
  const sum = tensor(gpu, [0], []);
  const shapeOf = (batch: Batch): { readonly plan: Plan } => {
    const key = shapeKey(batch);
    const known = shapes.get(key);
    if (known) writeInputs(known.inputs, batch);
    const inputs = known?.inputs ?? batchInputs(gpu, batch);
    const plan = known?.plan ?? gpu.trace(() => addInto(batchLoss(model, inputs, 1), sum), workspace);
    shapes.set(key, { inputs, plan });
    return { plan };
  };
  let total = 0;
  let tokens = 0;
  try {
    shapeOf(largestBatch(Math.min(batchSize, rows.length), most)); // takes the memory for all
    for (let at = 0; at < rows.length; at += batchSize) {
      const batch = collateRounded(rows.slice(at, at + batchSize), padId, most);
      gpu.write(sum, new Float32Array(1));
      shapeOf(batch).plan.run();
      const [value] = await readAll([sum]);
      total += value?.[0] ?? Number.NaN;
      tokens += batch.tokens;
    }
  } finally {
    for (const { inputs, plan } of shapes.values()) {
      gpu.release(...inputs.tensors);
      plan.destroy();
    }
    gpu.release(sum, ...workspace.map((buffer) => ({ buffer })));
  }
  const loss = total / tokens;
  return { loss, perplexity: Math.exp(loss), tokens };
}
