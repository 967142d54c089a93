import { describe, expect, test } from "vitest";
import { ShapeError } from "../../src/tensor/errors.ts";
import type { SearchPoint } from "../../src/train/search.ts";
import { type SharedRuns, type SweepOptions, type SweepTrial, sweep } from "../../src/train/sweep.ts";

const SPACE = { rate: { min: 1e-3, max: 1, log: true }, rank: { values: [2, 4, 8] } };
const final = ({ rate, rank }: SearchPoint): number =>
  1 + Math.log10(Number(rate) / 0.03) ** 2 + Math.abs(Number(rank) - 4) / 4;

/** Five evaluations on the way to a final loss. */
async function* course(point: SearchPoint): AsyncGenerator<number> {
  for (let i = 1; i <= 5; i++) yield final(point) + 5 - i;
}

async function collect(options: Partial<SweepOptions>): Promise<SweepTrial[]> {
  const trials: SweepTrial[] = [];
  for await (const trial of sweep({ space: SPACE, strategy: "bayes", trials: 8, seed: 3, run: course, ...options }))
    trials.push(trial);
  return trials;
}

describe("a sweep", () => {
  test("goes on after an interruption as it would have gone on", async () => {
    const whole = await collect({});
    expect(whole.map(({ trial }) => trial)).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
    expect(await collect({ done: whole.slice(0, 5) })).toEqual(whole.slice(5));
    expect(await collect({ seed: 4 })).not.toEqual(whole);
  });

  test("ends a trial that is behind the median of the others at the same evaluation, and closes its run", async () => {
    const closed: number[] = [];
    const finals = [1, 2, 3, 9, 1.5];
    let at = 0;
    const run = async function* (): AsyncGenerator<number> {
      const end = finals[at++] as number;
      let i = 0;
      try {
        for (; i < 5; i++) yield end + 4 - i;
      } finally {
        closed.push(i);
      }
    };
    const trials = await collect({ strategy: "random", trials: 5, run });
    expect(trials.map(({ stopped }) => stopped)).toEqual([false, false, false, true, false]);
    expect(trials[3]?.losses).toEqual([13]);
    expect(closed).toEqual([5, 5, 5, 0, 5]);
    expect(trials.map(({ value }) => value)).toEqual([1, 2, 3, 13, 1.5]);
  });

  test("on a grid tries each combination once", async () => {
    const trials = await collect({
      space: { rank: { values: [2, 4] }, on: { values: [true, false] } },
      strategy: "grid",
      trials: 9,
    });
    expect(trials.map(({ point }) => point)).toEqual([
      { rank: 2, on: true },
      { rank: 2, on: false },
      { rank: 4, on: true },
      { rank: 4, on: false },
    ]);
  });

  test("counts a trial that diverged as the worst, and lets other errors through", async () => {
    const fail = (error: Error) =>
      async function* (): AsyncGenerator<number> {
        yield 3;
        throw error;
      };
    const [trial] = await collect({ trials: 1, run: fail(new ShapeError("train: loss must stay finite")) });
    expect(trial).toMatchObject({ losses: [3], value: Number.NaN, stopped: false });
    await expect(collect({ trials: 1, run: fail(new Error("disk full")) })).rejects.toThrow("disk full");
  });

  test("drops the trial in progress when it is told to stop", async () => {
    const stop = new AbortController();
    const run = async function* (point: SearchPoint): AsyncGenerator<number> {
      for await (const loss of course(point)) {
        if (point.rank === 4) stop.abort();
        yield loss;
      }
    };
    const trials = await collect({
      space: { rank: { values: [2, 4, 8] } },
      strategy: "grid",
      run,
      signal: stop.signal,
    });
    expect(trials.map(({ point }) => point)).toEqual([{ rank: 2 }]);
  });

  /** Runs all trials of a round at once, and notes which they were. */
  const atOnce = (most: number, seen: number[][] = [], finals?: readonly number[]): SharedRuns => ({
    most,
    groups: async (points) => [points.map((_, i) => i)],
    run: async function* (trials) {
      seen.push(trials.map(({ trial }) => trial));
      for (let i = 1; i <= 5; i++) {
        if (trials.every(({ signal }) => signal.aborted)) return;
        yield trials.map(({ signal, point, trial }) => {
          const end = finals?.[trial - 1] ?? final(point);
          return signal.aborted || (end === 0 && i > 2) ? undefined : end === 0 && i === 2 ? Number.NaN : end + 5 - i;
        });
      }
    },
  });

  test("of several trials at once proposes a round without what comes of it, and goes on within one as it would have", async () => {
    const seen: number[][] = [];
    const whole = await collect({ together: atOnce(3, seen) });
    expect(seen).toEqual([
      [1, 2, 3],
      [4, 5, 6],
      [7, 8],
    ]);
    expect(new Set(whole.map(({ point }) => JSON.stringify(point))).size).toBe(8);
    const oneByOne = await collect({});
    expect(oneByOne.slice(0, 4)).toEqual(whole.slice(0, 4)); // these are drawn at random
    expect(oneByOne[7]?.point).not.toEqual(whole[7]?.point);
    for (const n of [3, 4, 5, 7])
      expect(await collect({ together: atOnce(3), done: whole.slice(0, n) })).toEqual(whole.slice(n));
  });

  test("ends those that are behind the median of all that got as far, once a round before is done", async () => {
    const finals = [1, 9, 2, 3, 1, 9, 0, 2];
    const trials = await collect({ strategy: "random", together: atOnce(4, [], finals) });
    expect(trials.map(({ stopped }) => stopped)).toEqual([false, false, false, false, false, true, false, false]);
    expect(trials.map(({ losses }) => losses.length)).toEqual([5, 5, 5, 5, 5, 1, 1, 5]);
    expect(trials.map(({ value }) => value)).toEqual([1, 9, 2, 3, 1, 13, Number.NaN, 2]);
  });

  test("runs what is alone in its group by itself, and gives trials in their order", async () => {
    const order: number[] = [];
    const run = async function* (point: SearchPoint, trial: number): AsyncGenerator<number> {
      order.push(trial);
      yield* course(point);
    };
    const seen: number[][] = [];
    const together = { ...atOnce(3, seen), groups: async () => [[2, 0], [1]] };
    const trials = await collect({ trials: 3, together, run });
    expect([seen, order, trials.map(({ trial }) => trial)]).toEqual([[[3, 1]], [2], [1, 2, 3]]);
  });

  test("refuses groups that leave a point out", async () => {
    const together = { ...atOnce(3), groups: async () => [[0], [2]] };
    await expect(collect({ together })).rejects.toThrow(
      new ShapeError("sweep: groups must have each of 3 points once, got [0,2]"),
    );
  });

  test("counts all trials of a run that throws ShapeError as the worst", async () => {
    const together: SharedRuns = {
      ...atOnce(2),
      run: async function* () {
        yield [3, 4];
        throw new ShapeError("train: …");
      },
    };
    const trials = await collect({ trials: 2, together });
    expect(trials.map(({ losses, value }) => [losses, value])).toEqual([
      [[3], Number.NaN],
      [[4], Number.NaN],
    ]);
  });

  test("refuses numbers out of range", async () => {
    await expect(collect({ together: atOnce(0) })).rejects.toThrow(
      "sweep: most of together must be a whole number of at least 1, got 0",
    );
    await expect(collect({ trials: 0 })).rejects.toThrow("sweep: trials must be a whole number of at least 1, got 0");
    await expect(collect({ warmupTrials: 0.5 })).rejects.toThrow(
      "sweep: warmupTrials must be a whole number of at least 1, got 0.5",
    );
  });
});
