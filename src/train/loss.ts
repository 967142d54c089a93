import { reshape } from "../autograd/basic-ops.ts";
import { gatherRows, linearCrossEntropies } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Uniform } from "../gpu/kernel.ts";
import type { Plan } from "../gpu/plan.ts";
import { addInto } from "../kernels/axpy.ts";
import type { Head, LogitUpdate } from "../kernels/linear-cross-entropy.ts";
import { readAll, type Tensor, tensor } from "../tensor/tensor.ts";
import { type Batch, collateRounded, isPacked, largestBatch, longest } from "./batches.ts";
import { IGNORED, type Row } from "./data.ts";

/** Anything that predicts tokens, such as a model with or without an adapter: logits = hidden·headᵀ. */
export interface LanguageModel {
  readonly gpu: Gpu;
  /** The output projection [V,C], or pieces of it. */
  readonly head: Head;
  /** What an adapter of the head adds to the logits of h [M,C]. */
  headUpdates?(h: Tensor): readonly LogitUpdate[];
  /** c: a logit x counts as c·tanh(x/c). */
  readonly logitCap?: number | undefined;
  /** ids i32 [B,T] → [B,T,C], what `head` is applied to. Of packed rows: positions and first places of segments, each i32 [B,T]. */
  hidden(ids: Tensor, options?: { readonly packing?: { readonly positions: Tensor; readonly starts: Tensor } }): Tensor;
}

/** A batch on the device. */
export interface Inputs {
  readonly ids: Tensor;
  /** `Batch.targets`, what each of them is, and where each position is among them, or −1. */
  readonly targets: Tensor;
  readonly labels: Tensor;
  readonly places: Tensor;
  /** Of packed rows. */
  readonly packing?: { readonly positions: Tensor; readonly starts: Tensor };
  /** All of them, to be released. */
  readonly tensors: readonly Tensor[];
}

/** Batches with the same key have inputs of the same shapes. */
export const shapeKey = ({ B, T, targets, packing }: Batch): string =>
  `${B}×${T}/${targets.length}${packing ? " packed" : ""}`;

/** The batch on the device. */
export function batchInputs(gpu: Gpu, batch: Batch): Inputs {
  const { B, T } = batch;
  const { ids, targets, labels, places } = hostInputs(batch);
  const made = {
    ids: tensor(gpu, ids, [B, T]),
    targets: tensor(gpu, targets, [targets.length]),
    labels: tensor(gpu, labels, [labels.length]),
    places: tensor(gpu, places, [places.length]),
  };
  const packing = batch.packing && {
    positions: tensor(gpu, batch.packing.positions, [B, T]),
    starts: tensor(gpu, batch.packing.starts, [B, T]),
  };
  return { ...made, ...(packing && { packing }), tensors: [...Object.values(made), ...Object.values(packing ?? {})] };
}

/** Puts another batch of the same shape in their place. What was dispatched before still sees the old one. */
export function writeInputs(inputs: Inputs, batch: Batch): void {
  for (const [name, values] of Object.entries(hostInputs(batch)))
    inputs.ids.gpu.write(inputs[name as "ids" | "targets" | "labels" | "places"], values);
  if (!inputs.packing || !batch.packing) return;
  inputs.ids.gpu.write(inputs.packing.positions, batch.packing.positions);
  inputs.ids.gpu.write(inputs.packing.starts, batch.packing.starts);
}

function hostInputs({ ids, labels, targets }: Batch) {
  const places = new Int32Array(ids.length).fill(-1);
  targets.forEach((at, i) => {
    if (at >= 0) places[at] = i;
  });
  return { ids, targets, labels: targets.map((at) => (at < 0 ? IGNORED : (labels[at] ?? IGNORED))), places };
}

/** Σ over the batch's target tokens of −log p(target), times `scale`: one number, shape []. */
export function batchLoss(model: LanguageModel, inputs: Inputs, scale: Uniform): Tensor {
  const { loss, losses } = batchLosses(model, inputs, scale);
  loss.gpu.release(losses);
  return loss;
}

/** `batchLoss`, and beside it the loss at each of `Batch.targets`, in their order. */
export function batchLosses(model: LanguageModel, inputs: Inputs, scale: Uniform): { loss: Tensor; losses: Tensor } {
  const { ids, targets, labels, places, packing } = inputs;
  const h = model.hidden(ids, packing && { packing });
  const rows = reshape(h, [ids.size, h.shape.at(-1) ?? 0]);
  const counted = targets.size === ids.size ? rows : gatherRows(rows, targets, places);
  return linearCrossEntropies(counted, model.head, labels, scale, model.logitCap, model.headUpdates?.(counted));
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
    shapeOf(largestBatch(Math.min(batchSize, rows.length), most, isPacked(rows))); // takes the memory for all
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
