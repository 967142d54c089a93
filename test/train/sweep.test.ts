import { describe, expect, test } from "vitest";
import { ShapeError } from "../../src/tensor/errors.ts";
import type { SearchPoint } from "../../src/train/search.ts";
import { type SweepOptions, type SweepTrial, sweep } from "../../src/train/sweep.ts";

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

  test("refuses numbers out of range", async () => {
    await expect(collect({ trials: 0 })).rejects.toThrow("sweep: trials must be a whole number of at least 1, got 0");
    await expect(collect({ warmupTrials: 0.5 })).rejects.toThrow(
      "sweep: warmupTrials must be a whole number of at least 1, got 0.5",
    );
  });
});
