import { expect, test } from "vitest";
import {
  type Case,
  type Contest,
  measure,
  roofline,
  type Settings,
  spread,
  WrongResultError,
} from "../../bench/harness.ts";
import { readOptions } from "../../bench/run.ts";
import { type Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { scale } from "../../src/kernels/axpy.ts";
import { empty, type Tensor, tensor } from "../../src/tensor/tensor.ts";

// Not testGpu(): that one poisons every buffer, and here the harness has to.
const opened = openGpu();
const VALUES = Float32Array.from({ length: 100 }, (_, i) => i);

/** A clock that only the runs move, and what happened in which order. */
class FakeClock {
  ms = 0;
  readonly runs: string[] = [];
  readonly settings: Settings = { repetitions: 3, minBatchMs: 20, now: () => this.ms };

  /** Doubles VALUES; each run takes `cost(run)` milliseconds, runs counted from 1. */
  case(name: string, x: Tensor, cost: (run: number) => number, run: () => Tensor = () => scale(x, 2)): Case {
    let count = 0;
    return {
      name,
      flops: 6e6,
      bytes: 3e6,
      run: () => {
        this.runs.push(name);
        this.ms += cost(++count);
        return { y: run() };
      },
      check: (_, element) => 2 * element,
    };
  }
}

function contest(cases: (x: Tensor, gpu: Gpu) => Case[]): Contest {
  return {
    name: "doubling",
    setup: (gpu) => {
      const x = tensor(gpu, VALUES, [100]);
      return { inputs: [x], cases: cases(x, gpu) };
    },
  };
}

test("spread is the median and the interpolated 10th and 90th percentile, whatever the order", () => {
  expect(spread([5, 1, 4, 2, 3])).toEqual({ median: 3, p10: 1.4, p90: 4.6 });
  expect(spread([10, 0])).toEqual({ median: 5, p10: 1, p90: 9 });
  expect(spread([7])).toEqual({ median: 7, p10: 7, p90: 7 });
});

test("spread sorts by value, leaves its samples as they were and makes nothing of none", () => {
  const samples = [10, 9, 100];
  expect(spread(samples).median).toBe(10);
  expect(samples).toEqual([10, 9, 100]);
  expect(spread([])).toEqual({ median: Number.NaN, p10: Number.NaN, p90: Number.NaN });
});

test("right cases are timed in turns, with their rates, dispatches and ratios to the first", async () => {
  const gpu = await opened;
  const clock = new FakeClock();
  const live = gpu.counters().buffersLive;
  const results = await measure(
    gpu,
    contest((x) => [
      clock.case("slow", x, () => 30),
      clock.case(
        "fast",
        x,
        () => 10,
        () => scale(scale(x, 1), 2),
      ),
    ]),
    clock.settings,
  );
  const all = (value: number) => ({ median: value, p10: value, p90: value });
  expect(results).toEqual([
    {
      name: "slow",
      flops: 6e6,
      bytes: 3e6,
      dispatches: 1,
      batch: 1,
      repetitions: 3,
      ms: all(30),
      gflops: 0.2,
      gbs: 0.1,
      ratio: all(1),
    },
    {
      name: "fast",
      flops: 6e6,
      bytes: 3e6,
      dispatches: 2,
      batch: 3,
      repetitions: 3,
      ms: all(10),
      gflops: 0.6,
      gbs: 0.3,
      ratio: all(3),
    },
  ]);
  // Two runs each to check, one and 1 + 3 to find the batch, then the repetitions in turns.
  const text = clock.runs.map((name) => name[0]).join("");
  expect(text).toBe(`${"ssff"}${"s"}${"f".repeat(4)}${"sfff"}${"fffs"}${"sfff"}`);
  expect(gpu.counters().buffersLive).toBe(live);
});

test("the ratio pairs the repetitions, so that noise which meets both cases leaves it alone", async () => {
  const clock = new FakeClock();
  const [, fast] = await measure(
    await opened,
    contest((x) => [
      clock.case("slow", x, (run) => 40 * run), // repetitions are its runs 4, 5 and 6
      clock.case("fast", x, (run) => 20 * run),
    ]),
    clock.settings,
  );
  expect(fast).toMatchObject({ ms: { median: 100 }, ratio: { median: 2, p10: 2, p90: 2 } });
});

test("a wrong element is refused before anything is timed", async () => {
  const gpu = await opened;
  const clock = new FakeClock();
  const live = gpu.counters().buffersLive;
  const wrong = contest((x, on) => [
    clock.case("right", x, () => 30),
    clock.case(
      "wrong",
      x,
      () => 30,
      () =>
        tensor(
          on,
          VALUES.map((v) => 2 * v + (v === 99 ? 1 : 0)),
          [100],
        ),
    ),
  ]);
  await expect(measure(gpu, wrong, clock.settings)).rejects.toThrow(
    new WrongResultError("doubling, wrong: y[99] must be 198, got 199"),
  );
  expect(clock.runs).toEqual(["right", "right", "wrong", "wrong"]);
  expect(gpu.counters().buffersLive).toBe(live);
});

test("a result that a run does not write is refused, though an earlier run left the right one in the pool", async () => {
  const clock = new FakeClock();
  let runs = 0;
  const lazy = contest((x, gpu) => [
    clock.case(
      "lazy",
      x,
      () => 30,
      () => (runs++ === 0 ? scale(x, 2) : empty(gpu, [100], "lazy")),
    ),
  ]);
  await expect(measure(await opened, lazy, clock.settings)).rejects.toThrow(
    new WrongResultError("doubling, lazy: all 100 elements of y must be finite, got 100 that are not"),
  );
});

test("a result that the run did not make is refused, for it cannot be poisoned", async () => {
  const clock = new FakeClock();
  const kept = contest((x) => [
    clock.case(
      "kept",
      x,
      () => 30,
      () => x,
    ),
  ]);
  await expect(measure(await opened, kept, clock.settings)).rejects.toThrow(
    new WrongResultError("doubling, kept: each of 1 results must be made by the run, got 0 new buffers"),
  );
});

test("a result that escaped the poison is refused", async () => {
  const clock = new FakeClock();
  const hungry = contest((x, gpu) => [
    clock.case(
      "hungry",
      x,
      () => 30,
      () => {
        for (let i = 0; i < 9; i++) empty(gpu, [100], "hungry");
        return scale(x, 2);
      },
    ),
  ]);
  await expect(measure(await opened, hungry, clock.settings)).rejects.toThrow(
    new WrongResultError("doubling, hungry: y came in a buffer that was not poisoned"),
  );
});

test("a case that has used up its time sits out the later repetitions", async () => {
  const clock = new FakeClock();
  const results = await measure(
    await opened,
    contest((x) => [clock.case("slow", x, () => 400), clock.case("fast", x, () => 20)]),
    { ...clock.settings, repetitions: 6, maxCaseMs: 1000 },
  );
  expect(results).toMatchObject([
    { name: "slow", repetitions: 3, ratio: { median: 1 } },
    { name: "fast", repetitions: 6, ratio: { median: 20 } },
  ]);
});

test("the limit is the peak that a case is nearer to, and its share of it", () => {
  const peaks = { fmaGflops: 1000, copyGbs: 100 };
  expect(roofline(500, 20, peaks)).toEqual({ limit: "compute", shareOfPeak: 0.5 });
  expect(roofline(50, 20, peaks)).toEqual({ limit: "memory", shareOfPeak: 0.2 });
  expect(roofline(0, 20, peaks)).toEqual({ limit: "memory", shareOfPeak: 0.2 });
});

test("options are flags and names; peers take part unless it is quick", () => {
  const all = { quick: false, full: false, peers: true, only: [] };
  expect(readOptions([])).toEqual(all);
  expect(readOptions(["lora", "--quick", "nt"])).toEqual({ ...all, quick: true, peers: false, only: ["lora", "nt"] });
  expect(readOptions(["--quick", "--peers"])).toEqual({ ...all, quick: true });
  expect(readOptions(["--full", "--no-peers"])).toEqual({ ...all, full: true, peers: false });
});

test("any other option is refused, and so are two that exclude each other", () => {
  expect(() => readOptions(["--fast"])).toThrow(
    new Error("bench: options are --quick, --full, --peers, --no-peers, --json FILE and --in RUNTIME, got --fast"),
  );
  expect(() => readOptions(["--quick", "--full"])).toThrow(new Error("bench: --quick and --full exclude each other"));
});
