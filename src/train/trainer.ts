import { backward } from "../autograd/engine.ts";
import type { Tuning } from "../gpu/tuner.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { AdamWSettings } from "./adamw.ts";
import { isPacked, longest } from "./batches.ts";
import type { TrainingState } from "./checkpoint.ts";
import type { Row } from "./data.ts";
import type { LanguageModel } from "./loss.ts";
import type { ProfiledDispatch } from "./profile.ts";
import { arrayOf, type RowSource, type Rows, rowSource } from "./row-source.ts";
import { type Schedule, scheduleFactor } from "./schedule.ts";
import { type HasTrainingMode, TrainingStep } from "./step.ts";
import { type Sent, StepCounts, type StepMetrics } from "./step-metrics.ts";
import { MOST_UNREAD_STEPS, type StepResult } from "./step-ring.ts";
import { type LanguageSettings, languageTask, type RowTask } from "./task.ts";
import { EarlyStopping, type Validation } from "./validation.ts";

export interface TrainOptions extends RunOptions<Row>, LanguageSettings {
  readonly model: LanguageModel;
}

export interface TrainTaskOptions<R extends HasIds, B> extends RunOptions<R> {
  readonly task: RowTask<R, B>;
}

type HasIds = Pick<Row, "inputIds">;

export interface RunOptions<R> extends AdamWSettings {
  /** What is trained; everything else is frozen. */
  readonly parameters: readonly Tensor[];
  /**
   * An array, or a stream: an iterable of another kind, asynchronous or not, such as `rowStream`. Of a stream no more is read than the next step
   * needs, in its own order, and once: training ends where it ends, which may be before `steps` and then without an evaluation, with a last batch
   * that may be short. An error of the stream is the run's. With `readEvery: 1` the metrics of a step do not wait for the rows of the next.
   */
  readonly rows: Rows<R>;
  /** No row has more tokens, which decides shapes and so the last bits. A stream needs it; an array has its longest row. */
  readonly maxLength?: number | undefined;
  /** Optimizer steps. */
  readonly steps: number;
  /** Rows of one forward pass. */
  readonly batchSize: number;
  /** Forward passes whose gradients are added up to one optimizer step. */
  readonly gradAccumulation?: number;
  readonly learningRate: number;
  /** "linear" unless given: it falls to 0. */
  readonly schedule?: Schedule;
  /** Steps at the start over which the learning rate rises from 0; none unless given. */
  readonly warmupSteps?: number;
  /** Seed of the order of the rows; undefined keeps the order of the file. A stream has none. */
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
  /**
   * Goes on from here: the parameters become those of the state, and the steps that follow what they would have been, bit for bit. A stream of rows
   * is given from its beginning, and read without use up to where the run was.
   */
  readonly from?: TrainingState | undefined;
  /** Stops after the steps in progress, and does not wait for a stream. */
  readonly signal?: AbortSignal | undefined;
}

/** Submits on their way to the device at a time. */
export const IN_FLIGHT = 3;
export const READ_EVERY_MS = 250;

/**
 * Trains `parameters` to predict next tokens and yields the metrics of each step once its update is done.
 *
 * The loss of a step is the mean over all its target tokens, across accumulation. A step whose loss or gradient norm is not finite leaves
 * the parameters as they are; after five such steps in a row it throws ShapeError, and the parameters are those of the last good step. A step
 * whose rows have no target token changes nothing, either.
 *
 * Defaults are not those of the command line, which clips at 1, warms up for 3 % of the steps and shuffles.
 */
export const train = ({ model, ...options }: TrainOptions): AsyncGenerator<StepMetrics, void, undefined> =>
  trainTask({ ...options, task: languageTask(model, options, isPacked(arrayOf(options.rows) ?? [])) });

/** As `train`, for another task. */
export async function* trainTask<R extends HasIds, B>(
  options: TrainTaskOptions<R, B>,
): AsyncGenerator<StepMetrics, void, undefined> {
  const { task, gradAccumulation = 1, from } = options;
  checkOptions(options);
  const source = rowSource(options);
  const watch = new EarlyStopping(options.validation, from?.best);
  if (options.tune) await tuneFor(source, options);
  const training = new TrainingStep<B>({ ...options, accumulates: gradAccumulation > 1 });
  try {
    training.reserve(new Array(gradAccumulation).fill(task.largest(source.batchSize, source.longest)));
    if (from) training.restore(from);
    yield* allSteps(training, source, watch, options);
  } finally {
    await task.gpu.throttle(1).catch(() => {}); // a lost device has its own error
    training.destroy();
    await source.close();
  }
}

/** Times the ways to compute this model's products on rows of the run, or the largest that a stream may have. */
async function tuneFor<R extends HasIds, B>(
  { sample, ...source }: RowSource<R>,
  { task, onTuned }: TrainTaskOptions<R, B>,
): Promise<void> {
  const isThere = sample.length > 0;
  const inputs = task.load(
    isThere ? task.collate(sample, longest(sample)) : task.largest(source.batchSize, source.longest),
  );
  await task.gpu.tuner.tune(() => inputs.losses(1).forEach((loss) => void backward(loss)), onTuned);
  task.gpu.release(...inputs.tensors);
}

/** Sends step after step and reads their metrics when they are due. */
async function* allSteps<R extends HasIds, B>(
  training: TrainingStep<B>,
  source: RowSource<R>,
  watch: EarlyStopping,
  options: TrainTaskOptions<R, B>,
): AsyncGenerator<StepMetrics, void, undefined> {
  const { task, steps, readEvery = 10, pauseEvery, checkpoint, signal, from } = options;
  const { gpu } = task;
  const counts = new StepCounts(from?.badSteps);
  const send = sender(training, source, options);
  const savesAt = (k: number): boolean => k % (checkpoint?.every ?? Number.POSITIVE_INFINITY) === 0;
  const save = async (): Promise<void> =>
    checkpoint?.save({ ...(await training.state()), best: watch.best, rowCount: source.rowCount });
  let readAt = performance.now();
  let pending: Promise<StepResult[]> | undefined;
  let step = from?.optimizer.stepCount ?? 0;
  let saved = step;
  while (step < steps && !signal?.aborted && !watch.isOver) {
    const sent = await send(step + 1);
    if (!sent) break;
    step++;
    counts.sent(sent);
    await gpu.throttle(IN_FLIGHT);
    const isEvaluated = watch.isDue(step, steps);
    const pauses = isEvaluated || savesAt(step) || step % (pauseEvery || Number.POSITIVE_INFINITY) === 0;
    const elapsed = performance.now() - readAt;
    if (step % Math.min(readEvery, MOST_UNREAD_STEPS) !== 0 && elapsed < READ_EVERY_MS && !pauses) continue;
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

/** Sends the k-th step, if there are rows for it; those before it must have been sent, by this run or the one it goes on from. */
function sender<R extends HasIds, B>(
  training: TrainingStep<B>,
  source: RowSource<R>,
  options: TrainTaskOptions<R, B>,
): (step: number) => Promise<Sent | undefined> {
  const { task, steps, schedule = "linear", warmupSteps = 0, profile } = options;
  return async (step) => {
    const chosen = await source.next();
    if (chosen.length === 0) return undefined;
    const rate = options.learningRate * scheduleFactor(schedule, step - 1, steps, warmupSteps);
    const micro = chosen.map((part) => task.collate(part, source.longest));
    if (step === profile?.step) profile.onProfile(await training.profile(micro, rate));
    else training.run(micro, rate);
    const tokens = chosen.flat().map((row) => task.tokensOf?.(row) ?? row.inputIds.length);
    return { rate, tokens: tokens.reduce((sum, count) => sum + count, 0) };
  };
}

/** Throws ShapeError for numbers out of range and for parameters without a gradient. */
export function checkOptions({
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
