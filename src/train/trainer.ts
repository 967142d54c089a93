import { backward, type Gradients } from "../autograd/engine.ts";
import type { Tuning } from "../gpu/tuner.ts";
import { sum2 } from "../kernels/axpy.ts";
import { ShapeError } from "../tensor/errors.ts";
import { readAll, type Tensor } from "../tensor/tensor.ts";
import { AdamW, type AdamWSettings } from "./adamw.ts";
import { batchIndices, collate } from "./batches.ts";
import type { Row } from "./data.ts";
import { batchLoss, type LanguageModel } from "./loss.ts";
import { type Schedule, scheduleFactor } from "./schedule.ts";

export interface TrainOptions extends AdamWSettings {
  readonly model: LanguageModel;
  /** What is trained; everything else is frozen. */
  readonly parameters: readonly Tensor[];
  readonly rows: readonly Row[];
  /** Optimizer steps. */
  readonly steps: number;
  /** Rows of one forward pass. */
  readonly batchSize: number;
  /** Forward passes whose gradients are added up to one optimizer step. */
  readonly gradAccumulation?: number;
  readonly learningRate: number;
  readonly schedule?: Schedule;
  /** Steps at the start over which the learning rate rises from 0. */
  readonly warmupSteps?: number;
  /** Seed of the order of the rows; undefined keeps the order of the file. */
  readonly shuffleSeed?: number | undefined;
  /** Fills rows up to the longest of a batch; never seen by the loss. */
  readonly padId?: number;
  /** Time the ways to compute this model's products on this device first, where that was not done before: see `Tuner`. */
  readonly tune?: boolean;
  readonly onTuned?: (tuning: Tuning) => void;
  /** Stops after the step in progress. */
  readonly signal?: AbortSignal | undefined;
}

/** One row of `metrics.jsonl`. */
export interface StepMetrics {
  /** From 1. */
  readonly step: number;
  /** Mean over all target tokens of the optimizer step, in nats. */
  readonly loss: number;
  readonly learning_rate: number;
  /** Global norm of the gradient, before clipping. */
  readonly grad_norm: number;
  /** Tokens that went through the model, padding not counted. */
  readonly tokens: number;
  readonly tokens_per_second: number;
}

/**
 * Trains `parameters` and yields the metrics of each step once its update is done.
 *
 * The loss of a step is the mean over all its target tokens, across accumulation. Nothing is read back inside a step; its loss
 * and gradient norm come in one readback at its end. Throws ShapeError when they stop being finite: the update of that step is
 * not made, so the parameters are those of the step before.
 */
export async function* train(options: TrainOptions): AsyncGenerator<StepMetrics, void, undefined> {
  const { model, rows, steps, batchSize, gradAccumulation = 1, learningRate, schedule = "linear", padId = 0 } = options;
  checkOptions(options);
  const { gpu } = model;
  if (options.tune) {
    const batch = collate(rows.slice(0, batchSize), padId);
    await gpu.tuner.tune(() => backward(batchLoss(model, batch, 1 / batch.tokens)), options.onTuned);
  }
  const batches = batchIndices({ rows: rows.length, batchSize, seed: options.shuffleSeed });
  const optimizer = new AdamW(options.parameters, options);
  try {
    for (let step = 1; step <= steps && !options.signal?.aborted; step++) {
      const started = performance.now();
      const chosen = Array.from({ length: gradAccumulation }, () => batches.next().value.map((i) => rows[i] as Row));
      const micro = chosen.map((part) => collate(part, padId));
      const targets = micro.reduce((sum, batch) => sum + batch.tokens, 0);
      const rate = learningRate * scheduleFactor(schedule, step - 1, steps, options.warmupSteps ?? 0);

      const { loss, norm } = gpu.scope(() => {
        let total: { readonly loss: Tensor; readonly grads: Gradients } | undefined;
        for (const batch of micro) {
          const part = gpu.scope(() => {
            const partLoss = batchLoss(model, batch, 1 / targets);
            return { loss: partLoss, grads: backward(partLoss) };
          });
          total = total ? addParts(total, part) : part;
        }
        if (!total) throw new ShapeError("train: a step must have a batch, got none");
        return { loss: total.loss, norm: optimizer.step(total.grads, rate) };
      });
      const [lossValues, normValues] = await readAll([loss, norm]);
      gpu.release(loss, norm);

      const metrics = { loss: lossValues?.[0] ?? Number.NaN, grad_norm: normValues?.[0] ?? Number.NaN };
      if (!Number.isFinite(metrics.loss) || !Number.isFinite(metrics.grad_norm))
        throw new ShapeError(
          `train: loss and gradient norm must stay finite, got ${metrics.loss} and ${metrics.grad_norm} at step ${step}. The parameters are those of step ${step - 1}. Use a lower learning rate or a maxGradNorm`,
        );
      const tokens = chosen.flat().reduce((sum, row) => sum + row.inputIds.length, 0);
      const seconds = (performance.now() - started) / 1000;
      yield {
        step,
        loss: metrics.loss,
        learning_rate: rate,
        grad_norm: metrics.grad_norm,
        tokens,
        tokens_per_second: tokens / seconds,
      };
    }
  } finally {
    optimizer.destroy();
  }
}

type Part = { readonly loss: Tensor; readonly grads: Gradients };

function addParts(a: Part, b: Part): Part {
  const grads: Gradients = new Map(a.grads);
  for (const [p, g] of b.grads) {
    const sum = grads.get(p);
    grads.set(p, sum ? sum2(sum, g) : g);
  }
  return { loss: sum2(a.loss, b.loss), grads };
}

function checkOptions({
  steps,
  batchSize,
  gradAccumulation = 1,
  learningRate,
  parameters,
  maxGradNorm = 0,
  weightDecay = 0,
}: TrainOptions): void {
  for (const [name, n] of Object.entries({ steps, batchSize, gradAccumulation }))
    if (!Number.isInteger(n) || n < 1)
      throw new ShapeError(`train: ${name} must be a whole number of at least 1, got ${n}`);
  for (const [name, x] of Object.entries({ learningRate, maxGradNorm, weightDecay }))
    if (!Number.isFinite(x) || x < 0) throw new ShapeError(`train: ${name} must be a number of at least 0, got ${x}`);
  const frozen = parameters.filter((p) => !p.requiresGrad).length;
  if (frozen > 0)
    throw new ShapeError(`train: every parameter must require a gradient, got ${frozen} that do not. Set requiresGrad`);
}
