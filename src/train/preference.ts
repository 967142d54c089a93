/** Direct preference optimisation: R. Rafailov et al., arXiv:2305.18290. */
import { add, mul, reshape, scale as scaled, split } from "../autograd/basic-ops.ts";
import { crossEntropy, gatherRows, linearCrossEntropy } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import { putColumns } from "../kernels/copy-rows.ts";
import { ShapeError } from "../tensor/errors.ts";
import { read, type Tensor, tensor, view } from "../tensor/tensor.ts";
import { type Batch, collate, longest, roundedLength } from "./batches.ts";
import { IGNORED, type PreferencePair } from "./data.ts";
import { frozen, type LanguageModel, placed } from "./loss.ts";
import { ReplayedPass } from "./replay.ts";
import type { RowTask } from "./task.ts";

/** A pair and what the model without the adapter makes of it: see `withReference`. */
export interface PreferenceRow extends PreferencePair {
  /** log π_ref(chosen) − log π_ref(rejected) */
  readonly referenceMargin: number;
  /** The longer of the two. */
  readonly inputIds: readonly number[];
}

export interface PreferenceSettings {
  /** β: how strongly the adapter is held to the base. 0.1 unless given. */
  readonly beta?: number;
  /** Probability that a label is the wrong way round (E. Mitchell, "conservative DPO"); 0 unless given. */
  readonly labelSmoothing?: number;
}

/** Pairs on the host: the chosen rows and below them the rejected ones. */
export interface PreferenceBatch {
  readonly batch: Batch;
  /** Positions of each row that have a target, padded with −1: [2P,L]. */
  readonly targets: Int32Array;
  readonly margins: Float32Array;
}

/** An adapter that can be switched off. */
interface Switchable {
  disable(): void;
  enable(): void;
}

/**
 * For `trainTask` or a `TrainingStep`: the mean over pairs of −log σ(z), z = β·((log π(chosen) − log π(rejected)) − referenceMargin). With
 * smoothing ε it is −(1 − ε)·log σ(z) − ε·log σ(−z). log π of a row is the sum over its targets; the logits are never stored whole.
 */
export function preferenceTask(
  model: LanguageModel,
  { beta = 0.1, labelSmoothing = 0 }: PreferenceSettings = {},
  padId = 0,
): RowTask<PreferenceRow, PreferenceBatch> {
  if (!(beta > 0) || !Number.isFinite(beta))
    throw new ShapeError(`preferenceTask: beta must be a number above 0, got ${beta}`);
  if (!(labelSmoothing >= 0 && labelSmoothing < 0.5))
    throw new ShapeError(`preferenceTask: labelSmoothing must be at least 0 and below 0.5, got ${labelSmoothing}`);
  const { gpu } = model;
  return {
    gpu,
    weights: { loss: 1 },
    key: keyOf,
    count: ({ margins }) => margins.length,
    load(pairs, room) {
      const inputs = onDevice(gpu, pairs, room);
      const P = pairs.margins.length;
      // Where the margin of a pair stands among the logits of its two classes.
      const cells = Array.from({ length: P }, (_, p) => tensor(gpu, unit(2 * P, 2 * p), [P, 2]));
      const [first, second] = [0, 1].map((label) => tensor(gpu, new Int32Array(P).fill(label), [P]));
      return {
        tensors: [...(room ? [] : tensorsOf(inputs)), ...cells, ...(first && second ? [first, second] : [])],
        write: (next) => writeInputs(inputs, next),
        losses(scale) {
          const losses = rowLosses(model, inputs);
          const margins = cells.map((cell, p) => {
            const margin = add(losses[P + p] as Tensor, scaled(losses[p] as Tensor, -1));
            return mul(scaled(margin, beta), cell);
          });
          const all = margins.reduce((sum, cell) => add(sum, cell));
          const z = add(all, scaled(inputs.margins, -beta)); // [P,2]: z and 0
          const loss = (labels: Tensor | undefined, weight: number): Tensor =>
            scaled(crossEntropy(z, labels as Tensor, scale), weight);
          if (labelSmoothing === 0) return [crossEntropy(z, first as Tensor, scale)];
          return [add(loss(first, 1 - labelSmoothing), loss(second, labelSmoothing))];
        },
      };
    },
    collate: (rows, most) => collatePairs(rows, padId, most),
    tokensOf: ({ chosen, rejected }) => chosen.inputIds.length + rejected.inputIds.length,
    largest: largestPairs,
    evaluation: (largest) => measuring(model, largest).destroy(),
  };
}

const keyOf = ({ batch: { B, T }, targets }: PreferenceBatch): string => `${B}×${T}/${targets.length}`;

function largestPairs(pairs: number, length: number): PreferenceBatch {
  const ids = new Array<number>(length).fill(0);
  const row = { inputIds: ids, labels: ids };
  const pair = { chosen: row, rejected: row, referenceMargin: 0, inputIds: ids };
  return collatePairs(new Array<PreferenceRow>(pairs).fill(pair), 0, length);
}

const unit = (length: number, at: number): Float32Array => Float32Array.from({ length }, (_, i) => Number(i === at));

function collatePairs(rows: readonly PreferenceRow[], padId: number, most: number): PreferenceBatch {
  const sides = [...rows.map(({ chosen }) => chosen), ...rows.map(({ rejected }) => rejected)];
  const T = roundedLength(longest(sides), most);
  const batch = collate(sides, padId, T);
  const places = sides.map((_, b) =>
    Array.from({ length: T }, (_position, t) => b * T + t).filter((at) => batch.labels[at] !== IGNORED),
  );
  const L = roundedLength(Math.max(1, ...places.map((list) => list.length)), T);
  const targets = new Int32Array(sides.length * L).fill(-1);
  places.forEach((list, b) => void targets.set(list, b * L));
  return { batch, targets, margins: Float32Array.from(rows, ({ referenceMargin }) => referenceMargin) };
}

/** What a batch is on the device: `labels` are those of each row's `targets`, `places` where each position is among those, or −1. */
interface PreferenceInputs {
  readonly ids: Tensor;
  readonly targets: Tensor;
  readonly places: Tensor;
  /** [P,2]: the margins and zeros. */
  readonly margins: Tensor;
  readonly labels: readonly Tensor[];
}

function hostInputs({ batch: { ids, labels, B }, targets, margins }: PreferenceBatch) {
  const L = targets.length / B;
  const places = new Int32Array(ids.length).fill(-1);
  targets.forEach((at, i) => {
    if (at >= 0) places[at] = i;
  });
  const wanted = targets.map((at) => (at < 0 ? IGNORED : (labels[at] ?? IGNORED)));
  return {
    ...{ ids, targets, places },
    margins: Float32Array.from({ length: 2 * margins.length }, (_, i) => (i % 2 === 0 ? (margins[i / 2] ?? 0) : 0)),
    labels: Array.from({ length: B }, (_, b) => wanted.slice(b * L, (b + 1) * L)),
  };
}

function onDevice(gpu: Gpu, pairs: PreferenceBatch, room: readonly Tensor[] = []): PreferenceInputs {
  const { ids, targets, places, labels, margins } = hostInputs(pairs);
  return {
    ids: placed(gpu, ids, [pairs.batch.B, pairs.batch.T], room[0]),
    targets: placed(gpu, targets, [targets.length], room[1]),
    places: placed(gpu, places, [places.length], room[2]),
    margins: placed(gpu, margins, [margins.length / 2, 2], room[3]),
    labels: labels.map((row, b) => placed(gpu, row, [row.length], room[4 + b])),
  };
}

function writeInputs(inputs: PreferenceInputs, pairs: PreferenceBatch): void {
  const { labels, ...others } = hostInputs(pairs);
  const { gpu } = inputs.ids;
  for (const [name, values] of Object.entries(others)) gpu.write(inputs[name as keyof typeof others], values);
  labels.forEach((row, b) => void gpu.write(inputs.labels[b] as Tensor, row));
}

/** −log π of each row of the batch, shapes []. `taken` may put something else in place of the hidden states. */
function rowLosses(model: LanguageModel, inputs: PreferenceInputs, taken = (h: Tensor): Tensor => h): Tensor[] {
  const { ids, targets, places, labels } = inputs;
  const [B, L] = [labels.length, targets.size / labels.length];
  const h = taken(model.hidden(ids));
  const C = h.shape.at(-1) ?? 0;
  const counted = gatherRows(reshape(h, [ids.size, C]), targets, places);
  const rows = split(reshape(counted, [1, B * L * C]), new Array<number>(B).fill(L * C));
  return rows.map((row, b) => {
    const own = reshape(row, [L, C]);
    const options = { logitCap: model.logitCap, updates: model.headUpdates?.(own) };
    return linearCrossEntropy(own, model.head, labels[b] as Tensor, 1, options);
  });
}

interface Measured extends PreferenceInputs {
  /** −log π of each row, [1,B]. */
  readonly losses: Tensor;
  readonly tensors: readonly Tensor[];
  write(pairs: PreferenceBatch): void;
}

/** Works out −log π of each row of batch after batch. */
const measuring = (model: LanguageModel, largest: PreferenceBatch) =>
  new ReplayedPass<PreferenceBatch, Measured>(
    model.gpu,
    {
      key: keyOf,
      load(pairs, room) {
        const { B } = pairs.batch;
        const losses = placed(model.gpu, new Float32Array(B), [1, B], room?.[0]);
        const inputs = onDevice(model.gpu, pairs, room?.slice(1));
        const tensors = room ? [] : [losses, ...tensorsOf(inputs)];
        return { ...inputs, losses, tensors, write: (next) => writeInputs(inputs, next) };
      },
      run: (inputs) =>
        rowLosses(model, inputs, frozen).forEach((loss, b) => void putColumns(view(loss, [1, 1]), inputs.losses, b)),
    },
    largest,
  );

/** log π(chosen) − log π(rejected) of each pair, by the model as it is. */
async function marginsOf(
  model: LanguageModel,
  rows: readonly PreferenceRow[],
  batchSize: number,
  signal?: AbortSignal,
): Promise<number[]> {
  const most = longest(rows);
  const pass = measuring(model, largestPairs(Math.min(batchSize, rows.length), most));
  const margins: number[] = [];
  try {
    for (let at = 0; at < rows.length; at += batchSize) {
      signal?.throwIfAborted();
      const pairs = collatePairs(rows.slice(at, at + batchSize), 0, most);
      const values = await read(pass.run(pairs).losses);
      const P = pairs.margins.length;
      margins.push(...Array.from({ length: P }, (_, p) => (values[P + p] ?? 0) - (values[p] ?? 0)));
    }
    return margins;
  } finally {
    pass.destroy();
  }
}

const tensorsOf = ({ labels, ...others }: PreferenceInputs): Tensor[] => [...Object.values(others), ...labels];

/** The pairs with what the base makes of them: the reference is the model with its adapter off, so it takes no memory of its own. Throws the reason of the signal. */
export async function withReference(
  model: LanguageModel,
  adapter: Switchable,
  pairs: readonly PreferencePair[],
  batchSize: number,
  signal?: AbortSignal,
): Promise<PreferenceRow[]> {
  const rows = pairs.map(({ chosen, rejected }) => {
    const inputIds = chosen.inputIds.length < rejected.inputIds.length ? rejected.inputIds : chosen.inputIds;
    return { chosen, rejected, inputIds, referenceMargin: 0 };
  });
  adapter.disable();
  try {
    const margins = await marginsOf(model, rows, batchSize, signal);
    return rows.map((row, i) => ({ ...row, referenceMargin: margins[i] ?? 0 }));
  } finally {
    adapter.enable();
  }
}

export interface PreferenceEvaluation {
  /** Mean of −log σ(z) over the pairs. */
  readonly loss: number;
  /** Share of the pairs whose chosen answer has gained on the rejected one: z > 0. */
  readonly accuracy: number;
  /** Mean of z: what the reward of the chosen answer, β·log(π / π_ref), is above that of the rejected one. */
  readonly margin: number;
  readonly pairs: number;
}

/** How well the model as it is tells chosen from rejected answers, against the reference. Throws the reason of the signal. */
export async function evaluatePreferences(
  model: LanguageModel,
  rows: readonly PreferenceRow[],
  batchSize: number,
  beta = 0.1,
  signal?: AbortSignal,
): Promise<PreferenceEvaluation> {
  const margins = await marginsOf(model, rows, batchSize, signal);
  const z = margins.map((margin, i) => beta * (margin - (rows[i]?.referenceMargin ?? 0)));
  const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
  return {
    loss: mean(z.map((x) => Math.max(0, -x) + Math.log1p(Math.exp(-Math.abs(x))))),
    accuracy: mean(z.map((x) => Number(x > 0))),
    margin: mean(z),
    pairs: rows.length,
  };
}
