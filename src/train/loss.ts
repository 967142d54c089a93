import { reshape } from "../autograd/basic-ops.ts";
import { gatherRows, linearCrossEntropies } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Uniform } from "../gpu/kernel.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { type Head, type LogitUpdate, linearCrossEntropy as scores } from "../kernels/linear-cross-entropy.ts";
import type { EmbeddingNoise } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import { readAll, type Shape, slice, type Tensor, tensor, view } from "../tensor/tensor.ts";
import { type Batch, collateRounded, isPacked, largestBatch, longest } from "./batches.ts";
import { IGNORED, type Row } from "./data.ts";
import { ReplayedPass } from "./replay.ts";

interface HiddenOptions {
  /** Of packed rows: positions and first places of segments, each i32 [B,T]. */
  readonly packing?: { readonly positions: Tensor; readonly starts: Tensor };
  /** Of the embeddings, in training. */
  readonly noise?: EmbeddingNoise;
}

/** Anything that predicts tokens, such as a model with or without an adapter: logits = hidden·headᵀ. */
export interface LanguageModel {
  readonly gpu: Gpu;
  /** The output projection [V,C], or pieces of it. */
  readonly head: Head;
  /** What an adapter of the head adds to the logits of h [M,C]. */
  headUpdates?(h: Tensor): readonly LogitUpdate[];
  /** c: a logit x counts as c·tanh(x/c). */
  readonly logitCap?: number | undefined;
  /** ids i32 [B,T] → [B,T,C], what `head` is applied to. */
  hidden(ids: Tensor, options?: HiddenOptions): Tensor;
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
  /** Those that have memory of their own, to be released. */
  readonly tensors: readonly Tensor[];
}

/** Batches with the same key have inputs of the same shapes. */
export const shapeKey = ({ B, T, targets, packing }: Batch): string =>
  `${B}×${T}/${targets.length}${packing ? " packed" : ""}`;

/** The batch on the device; with `room`, the tensors of a batch no smaller, in their memory, to which it then belongs. */
export function batchInputs(gpu: Gpu, batch: Batch, room?: readonly Tensor[]): Inputs {
  const { B, T } = batch;
  const { ids, targets, labels, places } = hostInputs(batch);
  const made = {
    ids: placed(gpu, ids, [B, T], room?.[0]),
    targets: placed(gpu, targets, [targets.length], room?.[1]),
    labels: placed(gpu, labels, [labels.length], room?.[2]),
    places: placed(gpu, places, [places.length], room?.[3]),
  };
  const packing = batch.packing && {
    positions: placed(gpu, batch.packing.positions, [B, T], room?.[4]),
    starts: placed(gpu, batch.packing.starts, [B, T], room?.[5]),
  };
  const tensors = [...Object.values(made), ...Object.values(packing ?? {})].filter((_, i) => !room?.[i]);
  return { ...made, ...(packing && { packing }), tensors };
}

/** `tensor`, in the memory of one no smaller where that is given. */
export function placed(gpu: Gpu, data: Int32Array | Float32Array, shape: Shape, room: Tensor | undefined): Tensor {
  if (!room) return tensor(gpu, data, shape);
  const t = slice(room, 0, shape);
  gpu.write(t, data);
  return t;
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

/** What training may ask of the loss of a batch. */
export interface LossSettings {
  /** See `CrossEntropyOptions`. */
  readonly labelSmoothing?: number | undefined;
  readonly noise?: EmbeddingNoise | undefined;
}

/** Σ over the batch's target tokens of −log p(target), times `scale`: one number, shape []. */
export function batchLoss(model: LanguageModel, inputs: Inputs, scale: Uniform, settings: LossSettings = {}): Tensor {
  const { loss, losses } = batchLosses(model, inputs, scale, settings);
  loss.gpu.release(losses);
  return loss;
}

/** `batchLoss`, and beside it the loss at each of `Batch.targets`, in their order. */
export function batchLosses(
  model: LanguageModel,
  inputs: Inputs,
  scale: Uniform,
  { labelSmoothing, noise }: LossSettings = {},
): { loss: Tensor; losses: Tensor } {
  const { ids, packing } = inputs;
  const counted = countedRows(model.hidden(ids, { ...(packing && { packing }), ...(noise && { noise }) }), inputs);
  const options = { logitCap: model.logitCap, updates: model.headUpdates?.(counted), labelSmoothing };
  return linearCrossEntropies(counted, model.head, inputs.labels, scale, options);
}

/** h where the batch has targets. */
function countedRows(h: Tensor, { ids, targets, places }: Inputs): Tensor {
  const rows = reshape(h, [ids.size, h.shape.at(-1) ?? 0]);
  return targets.size === ids.size ? rows : gatherRows(rows, targets, places);
}

/** `batchLoss`, and how many of the targets are the likeliest word, the first of equals: two numbers, shapes [], without gradients. */
function batchScores(model: LanguageModel, inputs: Inputs): { readonly loss: Tensor; readonly hits: Tensor } {
  const { ids, packing } = inputs;
  const h = model.hidden(ids, packing && { packing });
  const counted = countedRows(frozen(h), inputs);
  const updates = model.headUpdates?.(counted).map(({ u, X, scale }) => ({ u: frozen(u), X: frozen(X), scale }));
  const wants = { dh: false, dW: false, hits: true };
  const options = { logitCap: model.logitCap, updates };
  const { loss, losses, hits } = scores(counted, model.head, inputs.labels, 1, wants, options);
  loss.gpu.release(losses);
  return { loss, hits: hits as Tensor };
}

/** The same numbers, which no gradient goes back to. */
export const frozen = (t: Tensor): Tensor => view(t, t.shape);

export interface Evaluation {
  /** Mean of −log p over all target tokens, in nats. */
  readonly loss: number;
  /** exp(loss) */
  readonly perplexity: number;
  /** Share of the target tokens that are the likeliest word, of equals the first. */
  readonly accuracy: number;
  /** Target tokens. */
  readonly tokens: number;
}

export interface EvaluateOptions {
  /** Fills rows up to the longest of a batch; never seen by the loss. 0 unless given. */
  readonly padId?: number;
  /** Ends it after the batch in progress: its reason is thrown. */
  readonly signal?: AbortSignal | undefined;
}

interface Scored extends Inputs {
  write(batch: Batch): void;
  /** Loss and hits. */
  readonly sums: readonly Tensor[];
}

/** Works out loss and hits of batch after batch, into `sums`. */
const scoring = (model: LanguageModel, largest: Batch) =>
  new ReplayedPass<Batch, Scored>(
    model.gpu,
    {
      key: shapeKey,
      load(batch, room) {
        const sums = room?.slice(0, 2) ?? [0, 1].map(() => tensor(model.gpu, [0], []));
        const inputs = batchInputs(model.gpu, batch, room?.slice(2));
        const tensors = [...(room ? [] : sums), ...inputs.tensors];
        return { ...inputs, sums, tensors, write: (next) => writeInputs(inputs, next) };
      },
      run(inputs) {
        const { loss, hits } = batchScores(model, inputs);
        [loss, hits].forEach((value, i) => void copyTo(value, inputs.sums[i] as Tensor));
      },
    },
    largest,
  );

/** Makes and frees what `evaluate` needs whose largest batch is this one. */
export const planEvaluation = (model: LanguageModel, largest: Batch): void => scoring(model, largest).destroy();

/** Loss and accuracy over the target tokens of all rows, without smoothing, dropout or noise. Each shape of batch is traced once and replayed, as in training. Throws ShapeError where there is no target. */
export async function evaluate(
  model: LanguageModel,
  rows: readonly Row[],
  batchSize: number,
  { padId = 0, signal }: EvaluateOptions = {},
): Promise<Evaluation> {
  const most = longest(rows);
  const pass = scoring(model, largestBatch(Math.min(batchSize, rows.length), most, isPacked(rows)));
  let [total, hit, tokens] = [0, 0, 0];
  try {
    for (let at = 0; at < rows.length; at += batchSize) {
      signal?.throwIfAborted();
      const batch = collateRounded(rows.slice(at, at + batchSize), padId, most);
      const [loss, hits] = await readAll(pass.run(batch).sums);
      total += loss?.[0] ?? Number.NaN;
      hit += hits?.[0] ?? Number.NaN;
      tokens += batch.tokens;
    }
  } finally {
    pass.destroy();
  }
  if (tokens === 0) throw new ShapeError(`evaluate: rows must have a target token, got none in ${rows.length}`);
  const loss = total / tokens;
  return { loss, perplexity: Math.exp(loss), accuracy: hit / tokens, tokens };
}
