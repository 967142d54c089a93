import { backward } from "../autograd/engine.ts";
import type { Tuning } from "../gpu/tuner.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { AdamWSettings } from "./adamw.ts";
import { batchIndices, longest } from "./batches.ts";
import type { Row } from "./data.ts";
import type { LanguageModel } from "./loss.ts";
import type { ProfiledDispatch } from "./profile.ts";
import { type Schedule, scheduleFactor } from "./schedule.ts";
import { type HasTrainingMode, MOST_BAD_STEPS, type StepResult, TrainingStep } from "./step.ts";
import { languageTask, type RowTask } from "./task.ts";

export interface TrainOptions extends RunOptions<Row> {
  readonly model: LanguageModel;
  /** Fills rows up to the longest of a batch; never seen by the loss. */
  readonly padId?: number;
}

export interface TrainTaskOptions<R extends HasIds, B> extends RunOptions<R> {
  readonly task: RowTask<R, B>;
}

type HasIds = Pick<Row, "inputIds">;

interface RunOptions<R> extends AdamWSettings {
  /** What is trained; everything else is frozen. */
  readonly parameters: readonly Tensor[];
  readonly rows: readonly R[];
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
  /** See `TrainingStepOptions`, as for `seed`. */
  readonly adapter?: HasTrainingMode;
  readonly seed?: number;
  /** Time the ways to compute this model's products on this device first, where that was not done before: see `Tuner`. */
  readonly tune?: boolean;
  readonly onTuned?: (tuning: Tuning) => void;
  /**
   * Metrics are read back after so many steps, or after a quarter of a second, while the next steps are already on their way: when
   * those of a step come, the parameters may be some steps ahead. 1 waits for every step. 10 unless given.
   */
  readonly readEvery?: number;
  /** After every so many steps it waits: when their metrics come, the parameters are those of that step. To save or evaluate. */
  readonly pauseEvery?: number | undefined;
  /** See `TrainingStepOptions`. */
  readonly eager?: boolean;
  /** Times every dispatch of this step: see `TrainingStep.profile`. */
  readonly profile?:
    | { readonly step: number; readonly onProfile: (dispatches: ProfiledDispatch[]) => void }
    | undefined;
  /** Stops after the steps in progress. */
  readonly signal?: AbortSignal | undefined;
}

/** One row of `metrics.jsonl`. */
export interface StepMetrics {
  /** From 1. */
  readonly step: number;
  /** Mean over all target tokens of the optimizer step, in nats, or over what else the task has. */
  readonly loss: number;
  /** See `StepResult`. */
  readonly losses?: Readonly<Record<string, number>>;
  readonly learning_rate: number;
  /** Global norm of the gradient, before clipping. */
  readonly grad_norm: number;
  /** Tokens that went through the model, padding not counted. */
  readonly tokens: number;
  readonly tokens_per_second: number;
  /** True where loss or norm were not finite and the update was not made. */
  readonly skipped: boolean;
}

/** Submits on their way to the device at a time. */
const IN_FLIGHT = 3;
const READ_EVERY_MS = 250;

/**
 * Trains `parameters` to predict next tokens and yields the metrics of each step once its update is done.
 *
 * The loss of a step is the mean over all its target tokens, across accumulation. A step whose loss or gradient norm is not finite leaves
 * the parameters as they are; after five such steps in a row it throws ShapeError, and the parameters are those of the last good step.
 */
export const train = ({ model, padId, ...options }: TrainOptions): AsyncGenerator<StepMetrics, void, undefined> =>
  trainTask({ ...options, task: languageTask(model, padId) });

/** As `train`, for another task. */
export async function* trainTask<R extends HasIds, B>(
  options: TrainTaskOptions<R, B>,
): AsyncGenerator<StepMetrics, void, undefined> {
  const { task, rows, steps, batchSize, gradAccumulation = 1, schedule = "linear" } = options;
  const { readEvery = 10, pauseEvery = 0 } = options;
  checkOptions(options);
  const { gpu } = task;
  if (options.tune) {
    const chosen = rows.slice(0, batchSize);
    const inputs = task.load(task.collate(chosen, longest(chosen)));
    const step = (): void => inputs.losses(1).forEach((loss) => void backward(loss));
    await gpu.tuner.tune(step, options.onTuned);
    gpu.release(...inputs.tensors);
  }
  const batches = batchIndices({ rows: rows.length, batchSize, seed: options.shuffleSeed });
  const training = new TrainingStep<B>({ ...options, accumulates: gradAccumulation > 1 });
  const counts = new StepCounts();
  const most = longest(rows);
  training.reserve(new Array(gradAccumulation).fill(task.largest(Math.min(batchSize, rows.length), most)));
  try {
    let readAt = performance.now();
    let pending: Promise<StepResult[]> | undefined;
    let step = 0;
    while (step < steps && !options.signal?.aborted) {
      step++;
      const chosen = Array.from({ length: gradAccumulation }, () => batches.next().value.map((i) => rows[i] as R));
      const rate = options.learningRate * scheduleFactor(schedule, step - 1, steps, options.warmupSteps ?? 0);
      const micro = chosen.map((part) => task.collate(part, most));
      if (step === options.profile?.step) options.profile.onProfile(await training.profile(micro, rate));
      else training.run(micro, rate);
      counts.sent(
        rate,
        chosen.flat().reduce((sum, row) => sum + row.inputIds.length, 0),
      );
      await gpu.throttle(IN_FLIGHT);
      const elapsed = performance.now() - readAt;
      if (step % readEvery !== 0 && elapsed < READ_EVERY_MS && !(pauseEvery && step % pauseEvery === 0)) continue;
      readAt = performance.now();
      if (pending) yield* counts.metrics(await pending);
      pending = training.read();
      const isSlow = elapsed >= READ_EVERY_MS; // a device that has enough to do anyway
      if (readEvery > 1 && !isSlow && !(pauseEvery && step % pauseEvery === 0)) continue;
      yield* counts.metrics(await pending);
      pending = undefined;
    }
    if (pending) yield* counts.metrics(await pending);
    yield* counts.metrics(await training.read());
  } finally {
    await gpu.throttle(1).catch(() => {}); // a lost device has its own error
    training.destroy();
  }
}

/** Puts together what was known of each step when it was sent and what the device made of it. */
class StepCounts {
  readonly #sent: { readonly rate: number; readonly tokens: number }[] = [];
  #since = performance.now();
  #bad = 0;

  sent(rate: number, tokens: number): void {
    this.#sent.push({ rate, tokens });
  }

  /** Throws ShapeError at the last of too many steps in a row that were not finite. */
  *metrics(results: readonly StepResult[]): Generator<StepMetrics> {
    const now = performance.now();
    const sent = this.#sent.splice(0, results.length);
    const perSecond = sent.reduce((sum, { tokens }) => sum + tokens, 0) / ((now - this.#since) / 1000);
    this.#since = now;
    for (const [i, { step, loss, losses, gradNorm, updated }] of results.entries()) {
      const { rate = 0, tokens = 0 } = sent[i] ?? {};
      yield {
        step,
        loss,
        ...(losses && { losses }),
        learning_rate: rate,
        grad_norm: gradNorm,
        tokens,
        tokens_per_second: perSecond,
        skipped: !updated,
      };
      this.#bad = updated ? 0 : this.#bad + 1;
      if (this.#bad === MOST_BAD_STEPS)
        throw new ShapeError(
          `train: loss and gradient norm must stay finite, got ${loss} and ${gradNorm} at step ${step}, the last of ${MOST_BAD_STEPS} such steps in a row. The parameters are those of step ${step - MOST_BAD_STEPS}. Use a lower learning rate or a maxGradNorm`,
        );
    }
  }
}

function checkOptions({
  steps,
  batchSize,
  gradAccumulation = 1,
  readEvery = 10,
  learningRate,
  parameters,
  maxGradNorm = 0,
  weightDecay = 0,
}: RunOptions<HasIds>): void {
  for (const [name, n] of Object.entries({ steps, batchSize, gradAccumulation, readEvery }))
    if (!Number.isInteger(n) || n < 1)
      throw new ShapeError(`train: ${name} must be a whole number of at least 1, got ${n}`);
  for (const [name, x] of Object.entries({ learningRate, maxGradNorm, weightDecay }))
    if (!Number.isFinite(x) || x < 0) throw new ShapeError(`train: ${name} must be a number of at least 0, got ${x}`);
  const frozen = parameters.filter((p) => !p.requiresGrad).length;
  if (frozen > 0)
    throw new ShapeError(`train: every parameter must require a gradient, got ${frozen} that do not. Set requiresGrad`);
}
