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
  readonly run: (point: SearchPoint, trial: number) => AsyncIterable<number>;
  /** How several trials run at once; one by one unless given. */
  readonly together?: SharedRuns;
  /** Trials that end on their own before the median rule ends others. 3 unless given. */
  readonly warmupTrials?: number;
  readonly signal?: AbortSignal | undefined;
}

/** Trials that run at once. */
export interface SharedRuns {
  /** So many points are proposed at a time, each as if the others were the worst: such rounds begin at the trials 1, 1 + most, 1 + 2·most, … */
  readonly most: number;
  /** Splits the points of a round into those that run at once, by their indices. What is alone is left to `run`. */
  readonly groups: (points: readonly SearchPoint[]) => Promise<readonly (readonly number[])[]>;
  /**
   * Trains with the settings of all; gives after each evaluation the validation losses in the order of the trials, undefined for one that has ended and NaN
   * for one that ends because it is no longer finite. A trial ends too when its signal is aborted.
   */
  readonly run: (trials: readonly SharedTrial[]) => AsyncIterable<readonly (number | undefined)[]>;
}

export interface SharedTrial {
  /** From 1. */
  readonly trial: number;
  readonly point: SearchPoint;
  readonly signal: AbortSignal;
}

/**
 * Runs one trial after the other, or some at once, and gives each in its order once it is done. A trial ends early when its best loss is above the median of what the others
 * had reached by the same evaluation (D. Golovin et al., "Google Vizier", KDD 2017, §3.2). A trial that throws ShapeError, as where its loss is
 * no longer finite, counts as the worst. Which settings come next depends on the seed and the trials before, or those before its round, alone.
 *
 * Throws ShapeError for numbers out of range, and as `checkSpace`.
 */
export async function* sweep(options: SweepOptions): AsyncGenerator<SweepTrial, void, undefined> {
  const { space, strategy, trials, warmupTrials = 3, done = [], together, signal } = options;
  checkSpace(space);
  for (const [name, n] of Object.entries({ trials, warmupTrials, "most of together": together?.most ?? 1 }))
    if (!Number.isInteger(n) || n < 1)
      throw new ShapeError(`sweep: ${name} must be a whole number of at least 1, got ${n}`);
  const all = [...done];
  const most = strategy === "grid" ? Math.min(trials, gridPoints(space).length) : trials;
  while (all.length < most && !signal?.aborted) {
    const size = together?.most ?? 1;
    const first = all.length - (all.length % size);
    const before = all.length;
    const points = proposals(options, all.slice(0, first), Math.min(most, first + size)).slice(before - first);
    const groups = together ? await together.groups(points) : points.map((_, i) => [i]);
    const each = groups.flat().toSorted((a, b) => a - b);
    if (String(each) !== String([...points.keys()]))
      throw new ShapeError(`sweep: groups must have each of ${points.length} points once, got [${each}]`);
    const ended = new Map<number, SweepTrial>();
    for (const group of groups) {
      const chosen = group.map((i) => ({ trial: before + i + 1, point: points[i] as SearchPoint }));
      const others = [...all.slice(0, before), ...ended.values()];
      const results = await runTrials(options, chosen, others, first >= warmupTrials);
      if (signal?.aborted) return; // half a trial says nothing
      chosen.forEach((one, i) => void ended.set(one.trial, { ...one, ...(results[i] as Ended) }));
      for (let next = ended.get(all.length + 1); next; next = ended.get(all.length + 1)) {
        all.push(next);
        yield next;
      }
    }
  }
}

/** The points from the first trial that is not in `trials` on, up to the `end`-th. */
function proposals(
  { space, strategy, seed = 0 }: SweepOptions,
  trials: readonly SweepTrial[],
  end: number,
): SearchPoint[] {
  if (strategy === "grid") return gridPoints(space).slice(trials.length, end);
  const points: SearchPoint[] = [];
  for (let i = trials.length; i < end; i++) {
    const random = new Random(seed, i);
    const pending = points.map((point) => ({ point, value: Number.NaN }));
    const next = {
      random: () => randomPoint(space, random),
      bayes: () => suggestPoint(space, [...trials, ...pending], random),
    };
    points.push(next[strategy]());
  }
  return points;
}

type Ended = Pick<SweepTrial, "losses" | "value" | "stopped">;
type Chosen = Pick<SweepTrial, "trial" | "point">;

/** Runs these at once, or the one that it is. `mayStop` says whether the median rule may end them. */
async function runTrials(
  { run, together, signal }: SweepOptions,
  chosen: readonly Chosen[],
  others: readonly SweepTrial[],
  mayStop: boolean,
): Promise<Ended[]> {
  const trials = chosen.map((one) => ({
    ...one,
    losses: [] as number[],
    hasFailed: false,
    end: new AbortController(),
  }));
  const [only, ...more] = trials;
  if (!only) return [];
  const rounds = together && more.length > 0 ? together.run(trials.map(asShared)) : alone(run(only.point, only.trial));
  try {
    for await (const round of rounds) {
      const running = trials.filter((trial, i) => round[i] !== undefined && !trial.end.signal.aborted);
      for (const trial of running) {
        const loss = round[trials.indexOf(trial)] as number;
        if (Number.isNaN(loss)) trial.hasFailed = true;
        else trial.losses.push(loss);
      }
      const hopeless = running.filter(
        (trial) => mayStop && isHopeless(trial.losses, [...others, ...trials.filter((one) => one !== trial)]),
      );
      for (const { end } of hopeless) end.abort();
      if (signal?.aborted || trials.every(({ end }) => end.signal.aborted)) break;
    }
  } catch (error) {
    if (!(error instanceof ShapeError)) throw error;
    for (const trial of trials) trial.hasFailed ||= !trial.end.signal.aborted;
  }
  return trials.map(({ losses, hasFailed, end }) => ({
    losses,
    value: hasFailed ? Number.NaN : least(losses),
    stopped: end.signal.aborted,
  }));
}

const asShared = ({ trial, point, end }: Chosen & { readonly end: AbortController }): SharedTrial => ({
  ...{ trial, point },
  signal: end.signal,
});

async function* alone(losses: AsyncIterable<number>): AsyncGenerator<readonly number[]> {
  for await (const loss of losses) yield [loss];
}

const least = (losses: readonly number[]): number => (losses.length > 0 ? Math.min(...losses) : Number.NaN);

/** Whether the best of these losses is above the median of the others' best at the same evaluation. */
function isHopeless(losses: readonly number[], others: readonly Pick<SweepTrial, "losses">[]): boolean {
  const reached = others.filter((other) => other.losses.length >= losses.length);
  const bests = reached.map((other) => least(other.losses.slice(0, losses.length))).toSorted((a, b) => a - b);
  const median = bests[Math.floor(bests.length / 2)];
  return median !== undefined && least(losses) > median;
}
