/** Many runs with different settings, to find the best ones. */
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { checkSpace, gridPoints, randomPoint, type SearchPoint, type SearchSpace, suggestPoint } from "./search.ts";

export type SweepStrategy = "grid" | "random" | "bayes";

/** One run of a sweep. */
export interface SweepTrial {
  /** From 1. */
  readonly trial: number;
  readonly point: SearchPoint;
  /** Validation losses, one per evaluation. */
  readonly losses: readonly number[];
  /** The least of them: NaN where there is none. */
  readonly value: number;
  /** Whether the median rule ended it. */
  readonly stopped: boolean;
}

export interface SweepOptions {
  readonly space: SearchSpace;
  readonly strategy: SweepStrategy;
  /** Runs at most; a grid may have fewer points. */
  readonly trials: number;
  readonly seed?: number;
  /** The trials of an earlier, interrupted sweep: it goes on behind them as it would have. */
  readonly done?: readonly SweepTrial[];
  /** Trains with these settings; gives the validation loss after each evaluation. Closed early where the median rule ends it. */
  readonly run: (point: SearchPoint) => AsyncIterable<number>;
  /** Trials that end on their own before the median rule ends others. 3 unless given. */
  readonly warmupTrials?: number;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Runs one trial after the other and gives each once it is done. A trial ends early when its best loss is above the median of what the others
 * had reached by the same evaluation (D. Golovin et al., "Google Vizier", KDD 2017, §3.2). A trial that throws ShapeError, as where its loss is
 * no longer finite, counts as the worst. Which settings come next depends on the seed and the trials before alone.
 *
 * Throws ShapeError for numbers out of range, and as `checkSpace`.
 */
export async function* sweep(options: SweepOptions): AsyncGenerator<SweepTrial, void, undefined> {
  const { space, strategy, trials, seed = 0, done = [], warmupTrials = 3, signal } = options;
  checkSpace(space);
  for (const [name, n] of Object.entries({ trials, warmupTrials }))
    if (!Number.isInteger(n) || n < 1)
      throw new ShapeError(`sweep: ${name} must be a whole number of at least 1, got ${n}`);
  const all = [...done];
  const grid = strategy === "grid" ? gridPoints(space) : [];
  const most = strategy === "grid" ? Math.min(trials, grid.length) : trials;
  while (all.length < most && !signal?.aborted) {
    const random = new Random(seed, all.length);
    const next = {
      grid: () => grid[all.length],
      random: () => randomPoint(space, random),
      bayes: () => suggestPoint(space, all, random),
    };
    const point = next[strategy]() as SearchPoint;
    const ended = await runTrial(options, point, all, warmupTrials);
    if (signal?.aborted) return; // half a trial says nothing
    all.push({ trial: all.length + 1, point, ...ended });
    yield all[all.length - 1] as SweepTrial;
  }
}

async function runTrial(
  { run, signal }: SweepOptions,
  point: SearchPoint,
  others: readonly SweepTrial[],
  warmupTrials: number,
): Promise<Pick<SweepTrial, "losses" | "value" | "stopped">> {
  const losses: number[] = [];
  let stopped = false;
  try {
    for await (const loss of run(point)) {
      losses.push(loss);
      stopped = others.length >= warmupTrials && isHopeless(losses, others);
      if (stopped || signal?.aborted) break;
    }
  } catch (error) {
    if (!(error instanceof ShapeError)) throw error;
    return { losses, value: Number.NaN, stopped };
  }
  return { losses, value: least(losses), stopped };
}

const least = (losses: readonly number[]): number => (losses.length > 0 ? Math.min(...losses) : Number.NaN);

/** Whether the best of these losses is above the median of the others' best at the same evaluation. */
function isHopeless(losses: readonly number[], others: readonly SweepTrial[]): boolean {
  const reached = others.filter((other) => other.losses.length >= losses.length);
  const bests = reached.map((other) => least(other.losses.slice(0, losses.length))).toSorted((a, b) => a - b);
  const median = bests[Math.floor(bests.length / 2)];
  return median !== undefined && least(losses) > median;
}
