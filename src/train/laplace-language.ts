/** Laplace's approximation for language models: probabilities of target tokens that know what the rows trained on left open. */
import { reshape } from "../autograd/basic-ops.ts";
import { backward } from "../autograd/engine.ts";
import { gatherRows } from "../autograd/model-ops.ts";
import { addInto, axpy, scale } from "../kernels/axpy.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { softmax } from "../kernels/softmax.ts";
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { read, type Tensor, tensor } from "../tensor/tensor.ts";
import { type Batch, collate } from "./batches.ts";
import type { Row } from "./data.ts";
import { type Curvature, curvatureOf, drawOffset, type Gradient } from "./laplace.ts";
import { batchInputs, batchLoss, type Inputs, type LanguageModel } from "./loss.ts";
import { type Prediction, predictionOf } from "./metrics.ts";

/** A language model whose logits can be read. */
export interface TokenModel extends LanguageModel {
  /** ids i32 [B,T] → [B,T,V] */
  logits(ids: Tensor): Tensor;
}

/**
 * The curvature of the log-likelihood of the rows' targets. The Fisher matrix of a row has a rank of targets × vocabulary; it is estimated from
 * draws: of targets ŷ ~ p(·|row) at all its positions at once, g = ∇ Σ log p(ŷ). The mean of g·gᵀ is the Fisher matrix exactly, since
 * what is drawn at two positions is independent. A draw is a forward and backward pass; each row has at least one, and enough that there are 2·rank. Throws the
 * reason of the signal.
 */
export function languageCurvature(
  model: TokenModel,
  parameters: readonly Tensor[],
  rows: readonly Row[],
  {
    rank = 128,
    seed = 0,
    signal,
  }: { readonly rank?: number; readonly seed?: number; readonly signal?: AbortSignal } = {},
): Promise<Curvature> {
  const draws = Math.max(1, Math.ceil((2 * rank) / rows.length));
  return curvatureOf(parameters, drawnGradients(model, rows, draws, new Random(seed), signal), rank);
}

async function* drawnGradients(
  model: TokenModel,
  rows: readonly Row[],
  draws: number,
  random: Random,
  signal: AbortSignal | undefined,
): AsyncGenerator<Gradient> {
  const { gpu } = model;
  for (const row of rows) {
    const batch = collate([row], 0);
    const found = gpu.scope(() => softmax(targetLogits(model, batchInputs(gpu, batch))));
    const p = await read(found);
    gpu.release(found);
    for (let draw = 0; draw < draws; draw++) {
      signal?.throwIfAborted();
      const labels = Int32Array.from(batch.labels);
      const V = p.length / batch.targets.length;
      batch.targets.forEach((at, i) => {
        if (at >= 0 && (labels[at] ?? -1) >= 0) labels[at] = drawn(p.subarray(i * V, (i + 1) * V), random);
      });
      yield () => backward(batchLoss(model, batchInputs(gpu, { ...batch, labels }), 1 / Math.sqrt(draws)));
    }
  }
}

/** A number with these probabilities. */
function drawn(p: Float32Array, random: Random): number {
  let rest = random.uniform();
  const found = p.findIndex((share) => {
    rest -= share;
    return rest < 0;
  });
  return found < 0 ? p.length - 1 : found;
}

/** Logits [targets, V] at the batch's targets; where there is none, anything. */
function targetLogits(model: TokenModel, { ids, targets, places, packing }: Inputs): Tensor {
  if (packing) throw new ShapeError("laplace: rows must be apart, got packed ones. Give them as they were before");
  const logits = model.logits(ids);
  const rows = reshape(logits, [ids.size, logits.shape.at(-1) ?? 0]);
  return targets.size === ids.size ? rows : gatherRows(rows, targets, places);
}

export interface TokenPredictiveOptions {
  /** Rows of one forward pass; 4 unless given. */
  readonly batchSize?: number;
  /** Draws of the parameters; 32 unless given. Each is two forward passes over all rows. */
  readonly samples?: number;
  /** Of the draws; 0 unless given. */
  readonly seed?: number;
  /** Ends it by throwing the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

export interface TokenPredictions {
  /** By the parameters as they are, of each target token. */
  readonly plain: readonly Prediction[];
  /** By the posterior. */
  readonly laplace: readonly Prediction[];
}

/** Largest change of the parameters by which a derivative along a draw is taken, in parts of their norm. */
const STEP = 1e-2;

/**
 * What is said of each target token, over the whole vocabulary: the mean of softmax(f + J·δ) over draws δ of the posterior, with the prior's
 * precision `tau`. The Jacobian J of so many outputs is not made: J·δ is a central difference along δ, (f(θ + hδ) − f(θ − hδ))/2h, with an
 * error of h² and of f32's rounding. The parameters are as before afterwards. Keeps logits and probabilities of all targets on the device.
 */
export async function predictTokens(
  model: TokenModel,
  curvature: Curvature,
  tau: number,
  rows: readonly Row[],
  { batchSize = 4, samples = 32, seed = 0, signal }: TokenPredictiveOptions = {},
): Promise<TokenPredictions> {
  const { gpu } = model;
  const { parameters, squaredNorm, size } = curvature;
  const h = STEP * Math.sqrt((squaredNorm * tau) / size); // a draw's norm is at most about √(size/τ)
  const random = new Random(seed);
  const before = parameters.map((p) => scale(p, 1));
  const move = (offset: readonly Tensor[], step: number): void =>
    gpu.scope(() =>
      parameters.forEach((p, i) => void copyTo(axpy(1, before[i] as Tensor, step, offset[i] as Tensor), p)),
    );
  const parts = Array.from({ length: Math.ceil(rows.length / batchSize) }, (_, i) => {
    const batch = collate(rows.slice(i * batchSize, (i + 1) * batchSize), 0);
    return openPart(model, batch);
  });
  try {
    for (let s = 0; s < samples; s++) {
      signal?.throwIfAborted();
      const offset = await drawOffset(curvature, tau, random);
      move(offset, h);
      const ahead = parts.map(({ logits }) => logits());
      move(offset, -h);
      parts.forEach((part, i) => {
        gpu.scope(() => {
          const slope = axpy(0.5 / h, ahead[i] as Tensor, -0.5 / h, part.logits());
          addInto(scale(softmax(axpy(1, part.center, 1, slope)), 1 / samples), part.mean);
        });
        gpu.flush();
      });
      gpu.release(...ahead, ...offset);
    }
    const found = { plain: [] as Prediction[], laplace: [] as Prediction[] };
    for (const part of parts) {
      found.laplace.push(...(await predictions(part, part.mean)));
      const plain = gpu.scope(() => softmax(part.center));
      found.plain.push(...(await predictions(part, plain)));
      gpu.release(plain);
    }
    return found;
  } finally {
    before.forEach((t, i) => void copyTo(t, parameters[i] as Tensor));
    gpu.release(...before, ...parts.flatMap(({ tensors }) => tensors));
  }
}

/** A batch, its logits at θ*, and the mean of its probabilities so far. */
interface Part {
  readonly batch: Batch;
  readonly center: Tensor;
  readonly mean: Tensor;
  readonly tensors: readonly Tensor[];
  /** Logits at the parameters as they are. */
  logits(): Tensor;
}

function openPart(model: TokenModel, batch: Batch): Part {
  const { gpu } = model;
  const inputs = batchInputs(gpu, batch);
  const logits = (): Tensor => gpu.scope(() => targetLogits(model, inputs));
  const center = logits();
  const mean = tensor(gpu, new Float32Array(center.size), center.shape);
  return { batch, center, mean, logits, tensors: [...inputs.tensors, center, mean] };
}

/** Of each target, by its probabilities [targets, V]. */
async function predictions({ batch: { targets, labels } }: Part, probabilities: Tensor): Promise<Prediction[]> {
  const values = await read(probabilities);
  const V = probabilities.shape[1] ?? 0;
  return [...targets].flatMap((at, i) => {
    const label = at < 0 ? -1 : (labels[at] ?? -1);
    return label < 0 ? [] : [predictionOf(values.subarray(i * V, (i + 1) * V), label)];
  });
}
