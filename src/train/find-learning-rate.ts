/** A learning rate to begin with, from a short sweep over many. */
import { ShapeError } from "../tensor/errors.ts";
import { batchIndices, isPacked, longest } from "./batches.ts";
import type { Row } from "./data/row.ts";
import { TrainingStep } from "./step.ts";
import { languageTask } from "./task.ts";
import type { TrainOptions, TrainTaskOptions } from "./trainer.ts";

/** What a run has and a sweep of rates does not, or, of the rows, only as an array. */
type Fixed =
  | ("rows" | "maxLength" | "steps" | "learningRate" | "schedule" | "warmupSteps" | "gradAccumulation")
  | ("from" | "checkpoint" | "validation" | "profile" | "tune" | "onTuned" | "readEvery" | "pauseEvery");

export interface RateSweepOptions extends Omit<TrainOptions, Fixed>, RateRange<Row> {}

export interface TaskRateSweepOptions<R extends Pick<Row, "inputIds">, B>
  extends Omit<TrainTaskOptions<R, B>, Fixed>,
    RateRange<R> {}

interface RateRange<R> {
  readonly rows: readonly R[];
  /** The first rate and the last; 1e-7 and 1 unless given. */
  readonly lowest?: number;
  readonly highest?: number;
  /** Steps from one to the other, a constant factor apart; 100 unless given. */
  readonly steps?: number;
}

export interface RatePoint {
  readonly learningRate: number;
  /** The mean of the losses so far, the latest weighing most. */
  readonly loss: number;
}

export interface RateSweep {
  readonly points: readonly RatePoint[];
  /** Where the loss falls most steeply over the logarithm of the rate; undefined where it never falls. */
  readonly suggestion: number | undefined;
}

/** Weight of what came before in the smoothed loss. */
const SMOOTHING = 0.9;
/** The sweep ends where the smoothed loss is so many times the lowest. */
const DIVERGED = 4;

/**
 * The range test of Smith (arXiv:1506.01186, in the exponential form of fastai): steps at ever higher rates, until the loss runs away. What is
 * trained is afterwards what it was, to the last bit. Ends early, with the points so far, where the signal is aborted. Throws ShapeError for rates or steps out of range.
 */
export const findLearningRate = ({ model, ...options }: RateSweepOptions): Promise<RateSweep> =>
  findTaskLearningRate({ ...options, task: languageTask(model, options, isPacked(options.rows)) });

/** As `findLearningRate`, for another task. */
export async function findTaskLearningRate<R extends Pick<Row, "inputIds">, B>(
  options: TaskRateSweepOptions<R, B>,
): Promise<RateSweep> {
  const { task, rows, batchSize, shuffleSeed, lowest = 1e-7, highest = 1, steps = 100 } = options;
  if (!(lowest > 0 && highest > lowest && Number.isFinite(highest)) || !Number.isInteger(steps) || steps < 2)
    throw new ShapeError(
      `findLearningRate: rates must rise from above 0 in at least 2 steps, got ${lowest} to ${highest} in ${steps}`,
    );
  const training = new TrainingStep<B>(options);
  const before = await training.state();
  const points: RatePoint[] = [];
  let [sum, best] = [0, Number.POSITIVE_INFINITY];
  try {
    training.reserve([task.largest(Math.min(batchSize, rows.length), longest(rows))]);
    for (const indices of batchIndices({ rows: rows.length, batchSize, seed: shuffleSeed })) {
      if (points.length === steps || options.signal?.aborted) break;
      const learningRate = lowest * (highest / lowest) ** (points.length / (steps - 1));
      const chosen = indices.flatMap((i) => rows[i] ?? []);
      training.run([task.collate(chosen, longest(rows))], learningRate);
      const [result] = await training.read();
      sum = SMOOTHING * sum + (1 - SMOOTHING) * (result?.loss ?? Number.NaN);
      const loss = sum / (1 - SMOOTHING ** (points.length + 1));
      if (!(loss <= DIVERGED * best)) break;
      best = Math.min(best, loss);
      points.push({ learningRate, loss });
    }
  } finally {
    training.restore(before);
    training.destroy();
  }
  return { points, suggestion: steepest(points) };
}

/** The rate at which a loss falls most steeply from the point before to the one after. */
function steepest(points: readonly RatePoint[]): number | undefined {
  let [at, most]: [number | undefined, number] = [undefined, 0];
  for (const [i, { learningRate }] of points.entries()) {
    const [left, right] = [points[i - 1], points[i + 1]];
    const fall = left && right ? left.loss - right.loss : 0;
    if (fall > most) [at, most] = [learningRate, fall];
  }
  return at;
}
