import { backward } from "../autograd/engine.ts";
import type { Tuning } from "../gpu/tuner.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { AdamWSettings } from "./adamw.ts";
import { batchIndices, isPacked, longest } from "./batches.ts";
import type { TrainingState } from "./checkpoint.ts";
import type { Row } from "./data.ts";
import type { LanguageModel } from "./loss.ts";
import type { ProfiledDispatch } from "./profile.ts";
import { type Schedule, scheduleFactor } from "./schedule.ts";
import { type HasTrainingMode, type StepResult, TrainingStep } from "./step.ts";
import { type Sent, StepCounts, type StepMetrics } from "./step-metrics.ts";
import { type LanguageSettings, languageTask, type RowTask } from "./task.ts";
import { EarlyStopping, type Validation } from "./validation.ts";

export interface TrainOptions extends RunOptions<Row>, LanguageSettings {
  readonly model: LanguageModel;
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
  /** Evaluates now and then: see `Validation`. The parameters are those of that step when its metrics come. */
  readonly validation?: Validation | undefined;
  /** Gives the run's state after every so many steps, and where it ends before its last step; after the metrics of that step. */
  readonly checkpoint?:
    | { readonly every?: number | undefined; readonly save: (state: TrainingState) => void | Promise<void> }
    | undefined;
  /** Goes on from here: the parameters become those of the state, and the steps that follow what they would have been, bit for bit. */
  readonly from?: TrainingState | undefined;
  /** Stops after the steps in progress. */
  readonly signal?: AbortSignal | undefined;
}

/** Submits on their way to the device at a time. */
const IN_FLIGHT = 3;
const READ_EVERY_MS = 250;

/**
 * Trains `parameters` to predict next tokens and yields the metrics of each step once its update is done.
 *
 * The loss of a step is the mean over all its target tokens, across accumulation. A step whose loss or gradient norm is not finite leaves
 * the parameters as they are; after five such steps in a row it throws ShapeError, and the parameters are those of the last good step. A step
 * whose rows have no target token changes nothing, either.
 */
export const train = ({ model, ...options }: TrainOptions): AsyncGenerator<StepMetrics, void, undefined> =>
  trainTask({ ...options, task: languageTask(model, options, isPacked(options.rows)) });

/** As `train`, for another task. */
export async function* trainTask<R extends HasIds, B>(
  options: TrainTaskOptions<R, B>,
): AsyncGenerator<StepMetrics, void, undefined> {
  const { task, rows, batchSize, gradAccumulation = 1, from } = options;
  checkOptions(options);
  const watch = new EarlyStopping(options.validation, from?.best);
  if (options.tune) await tuneFor(options);
  const training = new TrainingStep<B>({ ...options, accumulates: gradAccumulation > 1 });
  try {
    training.reserve(new Array(gradAccumulation).fill(task.largest(Math.min(batchSize, rows.length), longest(rows))));
    if (from) training.restore(from);
    yield* allSteps(training, watch, options);
  } finally {
    await task.gpu.throttle(1).catch(() => {}); // a lost device has its own error
    training.destroy();
  }
}

/** Times the ways to compute this model's products on rows of the run. */
async function tuneFor<R extends HasIds, B>({ task, rows, batchSize, onTuned }: TrainTaskOptions<R, B>): Promise<void> {
  const chosen = rows.slice(0, batchSize);
  const inputs = task.load(task.collate(chosen, longest(chosen)));
  await task.gpu.tuner.tune(() => inputs.losses(1).forEach((loss) => void backward(loss)), onTuned);
  task.gpu.release(...inputs.tensors);
}

/** Sends step after step and reads their metrics when they are due. */
async function* allSteps<R extends HasIds, B>(
  training: TrainingStep<B>,
  watch: EarlyStopping,
  options: TrainTaskOptions<R, B>,
): AsyncGenerator<StepMetrics, void, undefined> {
  const { task, steps, readEvery = 10, pauseEvery, checkpoint, signal, from } = options;
  const { gpu } = task;
  const counts = new StepCounts(from?.badSteps);
  const send = sender(training, options);
  const savesAt = (k: number): boolean => k % (checkpoint?.every ?? Number.POSITIVE_INFINITY) === 0;
  const save = async (): Promise<void> => checkpoint?.save({ ...(await training.state()), best: watch.best });
  let readAt = performance.now();
  let pending: Promise<StepResult[]> | undefined;
  let step = from?.optimizer.stepCount ?? 0;
  let saved = step;
  while (step < steps && !signal?.aborted && !watch.isOver) {
    step++;
    counts.sent(await send(step));
    await gpu.throttle(IN_FLIGHT);
    const isEvaluated = watch.isDue(step, steps);
    const pauses = isEvaluated || savesAt(step) || step % (pauseEvery || Number.POSITIVE_INFINITY) === 0;
    const elapsed = performance.now() - readAt;
    if (step % readEvery !== 0 && elapsed < READ_EVERY_MS && !pauses) continue;
    readAt = performance.now();
    if (pending) yield* counts.metrics(await pending);
    pending = training.read();
    const isSlow = elapsed >= READ_EVERY_MS; // a device that has enough to do anyway
    if (readEvery > 1 && !isSlow && !pauses) continue;
    yield* counts.metrics(await pending, isEvaluated ? () => watch.evaluate(step) : undefined);
    pending = undefined;
    if (!savesAt(step)) continue;
    await save();
    saved = step;
  }
  if (pending) yield* counts.metrics(await pending);
  yield* counts.metrics(await training.read());
  if (step < steps && saved < step) await save();
}

/** Sends the k-th step; those before it must have been sent, by this run or the one it goes on from. */
function sender<R extends HasIds, B>(
  training: TrainingStep<B>,
  options: TrainTaskOptions<R, B>,
): (step: number) => Promise<Sent> {
  const { task, rows, steps, batchSize, gradAccumulation = 1, schedule = "linear", warmupSteps = 0, profile } = options;
  const sampling = { rows: rows.length, batchSize, seed: options.shuffleSeed };
  const batches = batchIndices(sampling, options.from?.batchCount);
  const most = longest(rows);
  return async (step) => {
    const chosen = Array.from({ length: gradAccumulation }, () => batches.next().value.map((i) => rows[i] as R));
    const rate = options.learningRate * scheduleFactor(schedule, step - 1, steps, warmupSteps);
    const micro = chosen.map((part) => task.collate(part, most));
    if (step === profile?.step) profile.onProfile(await training.profile(micro, rate));
    else training.run(micro, rate);
    const tokens = chosen.flat().map((row) => task.tokensOf?.(row) ?? row.inputIds.length);
    return { rate, tokens: tokens.reduce((sum, count) => sum + count, 0) };
  };
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
  checkpoint,
}: RunOptions<HasIds>): void {
  const counts = { steps, batchSize, gradAccumulation, readEvery, "every of the checkpoint": checkpoint?.every ?? 1 };
  for (const [name, n] of Object.entries(counts))
    if (!Number.isInteger(n) || n < 1)
      throw new ShapeError(`train: ${name} must be a whole number of at least 1, got ${n}`);
  for (const [name, x] of Object.entries({ learningRate, maxGradNorm, weightDecay }))
    if (!Number.isFinite(x) || x < 0) throw new ShapeError(`train: ${name} must be a number of at least 0, got ${x}`);
  const frozen = parameters.filter((p) => !p.requiresGrad).length;
  if (frozen > 0)
    throw new ShapeError(`train: every parameter must require a gradient, got ${frozen} that do not. Set requiresGrad`);
}
