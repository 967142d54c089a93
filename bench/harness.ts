/**
 * The harness of all benchmarks: nothing is timed before its results have been compared with f64.
 *
 * Portable: no `node:` module, so that Node, Deno and a page run the same code.
 */
import type { Gpu } from "../src/gpu/gpu.ts";
import { Random } from "../src/tensor/random.ts";
import { readAll, type Tensor } from "../src/tensor/tensor.ts";

/** One way to do the work of a contest. */
export interface Case {
  readonly name: string;
  /** Floating-point operations of one run: 2 per multiply-add of its matrix products, elementwise work not counted. */
  readonly flops: number;
  /** Bytes of one run if each dispatch reads each of its operands once and writes its result once. */
  readonly bytes: number;
  /** Encodes one run and returns its results by name. Runs in a scope: what it does not return goes back to the pool. */
  readonly run: () => Readonly<Record<string, Tensor>>;
  /** The f64 value of one element of one result. */
  readonly check: (result: string, element: number) => number;
}

/** Cases that are timed in turns on the same inputs. The first is the baseline of every ratio. */
export interface Contest {
  readonly name: string;
  readonly setup: (gpu: Gpu) => { readonly inputs: readonly Tensor[]; readonly cases: readonly Case[] };
}

export interface Settings {
  readonly repetitions: number;
  /** A repetition runs a case as often as it takes to last this long, then waits for the device once. */
  readonly minBatchMs: number;
  /** A clock in milliseconds. */
  readonly now: () => number;
}

/** Of the repetitions: the middle one, and the ends of the middle 80 %. */
export interface Spread {
  readonly median: number;
  readonly p10: number;
  readonly p90: number;
}

export interface CaseResult {
  readonly name: string;
  readonly flops: number;
  readonly bytes: number;
  readonly dispatches: number;
  /** Runs per repetition. */
  readonly batch: number;
  readonly repetitions: number;
  /** Milliseconds of one run. */
  readonly ms: Spread;
  /** 10⁹ operations, and 10⁹ bytes, per second at the median. */
  readonly gflops: number;
  readonly gbs: number;
  /** The baseline's time over this one's, repetition by repetition: above 1 is faster than the baseline. */
  readonly ratio: Spread;
}

/** A result is wrong, so there is nothing to time. */
export class WrongResultError extends Error {
  override readonly name = "WrongResultError";
}

const TOLERANCE = 1e-4; // of |got − f64| / (1 + |f64|)
const SAMPLES = 64;

/**
 * Checks every case of a contest, then times them in turns, so that noise of the machine meets all alike.
 *
 * Throws WrongResultError, before anything is timed, if one result is wrong, and GpuError if the device fails.
 */
export async function measure(gpu: Gpu, contest: Contest, settings: Settings): Promise<CaseResult[]> {
  const { inputs, cases } = contest.setup(gpu);
  try {
    const dispatches: number[] = [];
    for (const one of cases) dispatches.push(await checkCase(gpu, `${contest.name}, ${one.name}`, one));
    const batches: number[] = [];
    for (const one of cases) batches.push(await findBatch(gpu, one, settings));
    const times: number[][] = cases.map(() => []);
    for (let repetition = 0; repetition < settings.repetitions; repetition++)
      for (let turn = 0; turn < cases.length; turn++) {
        const i = (turn + repetition) % cases.length; // each case goes first equally often
        const one = cases[i];
        const batch = batches[i] ?? 1;
        if (one) times[i]?.push((await timeBatch(gpu, one, batch, settings.now)) / batch);
      }
    return cases.map(({ name, flops, bytes }, i) => {
      const own = times[i] ?? [];
      const ms = spread(own);
      return {
        name,
        flops,
        bytes,
        dispatches: dispatches[i] ?? 0,
        batch: batches[i] ?? 1,
        repetitions: own.length,
        ms,
        gflops: flops / ms.median / 1e6,
        gbs: bytes / ms.median / 1e6,
        ratio: spread(own.map((time, n) => (times[0]?.[n] ?? Number.NaN) / time)),
      };
    });
  } finally {
    gpu.release(...inputs);
  }
}

/** Median and 10th and 90th percentile, with linear interpolation between neighbours. NaN of nothing. */
export function spread(samples: readonly number[]): Spread {
  const sorted = samples.toSorted((a, b) => a - b);
  const quantile = (q: number): number => {
    const at = q * (sorted.length - 1);
    const low = sorted[Math.floor(at)] ?? Number.NaN;
    const high = sorted[Math.ceil(at)] ?? Number.NaN;
    return low + (high - low) * (at - Math.floor(at));
  };
  return { median: quantile(0.5), p10: quantile(0.1), p90: quantile(0.9) };
}

/** What waiting for an idle device costs, in milliseconds: it is part of every repetition. */
export async function syncCost(gpu: Gpu, now: () => number): Promise<number> {
  const samples: number[] = [];
  for (let i = 0; i < 5; i++) {
    const start = now();
    await gpu.finish();
    samples.push(now() - start);
  }
  return spread(samples).median;
}

/** Compares what one run leaves in poisoned buffers with f64, and returns how many dispatches it took. */
async function checkCase(gpu: Gpu, what: string, { run, check }: Case): Promise<number> {
  const before = dispatchCount(gpu);
  const live = gpu.counters().buffersLive;
  const first = Object.values(gpu.scope(run));
  const made = gpu.counters().buffersLive - live;
  if (made !== first.length)
    throw new WrongResultError(
      `${what}: each of ${first.length} results must be made by the run, got ${made} new buffers`,
    );
  const dispatches = dispatchCount(gpu) - before;
  gpu.release(...first);
  const poisoned = poisonPool(gpu, first, dispatches);

  const results = Object.entries(gpu.scope(run));
  const tensors = results.map(([, t]) => t);
  const values = await readAll(tensors);
  gpu.release(...tensors);
  results.forEach(([result, t], n) => {
    const got = values[n] ?? new Float32Array();
    if (!poisoned.has(t.buffer))
      throw new WrongResultError(`${what}: ${result} came in a buffer that was not poisoned`);
    const holes = got.reduce((count, value) => count + (Number.isFinite(value) ? 0 : 1), 0);
    if (holes > 0)
      throw new WrongResultError(
        `${what}: all ${got.length} elements of ${result} must be finite, got ${holes} that are not`,
      );
    for (const element of sampled(got.length)) {
      const expected = check(result, element);
      const value = got[element] ?? Number.NaN;
      if (!(Math.abs(value - expected) <= TOLERANCE * (1 + Math.abs(expected))))
        throw new WrongResultError(`${what}: ${result}[${element}] must be ${expected}, got ${value}`);
    }
  });
  return dispatches;
}

/**
 * Fills with NaN bits the buffers that the next run will get for its results. The pool hands out last what it got first, and
 * a run makes at most one buffer per dispatch.
 */
function poisonPool(gpu: Gpu, results: readonly Tensor[], dispatches: number): Set<GPUBuffer> {
  const buffers = results.flatMap((t) =>
    Array.from({ length: dispatches + results.length }, () => gpu.allocate(t.sizeBytes, "bench")),
  );
  for (const buffer of buffers) {
    gpu.write({ buffer }, new Uint8Array(buffer.size).fill(0xff));
    gpu.release({ buffer });
  }
  return new Set(buffers);
}

/** First, last and random elements, the same each time. */
function sampled(size: number): number[] {
  const random = new Random(size);
  return [0, size - 1, ...Array.from({ length: SAMPLES - 2 }, () => random.below(size))];
}

/** How many runs last `minBatchMs`. Finding out is the warm-up too. */
async function findBatch(gpu: Gpu, one: Case, { minBatchMs, now }: Settings): Promise<number> {
  for (let batch = 1; ; ) {
    const ms = await timeBatch(gpu, one, batch, now);
    if (ms >= minBatchMs || batch >= 100_000) return batch;
    batch = Math.ceil(batch * Math.min(10, Math.max(1.1, (1.1 * minBatchMs) / ms)));
  }
}

async function timeBatch(gpu: Gpu, { run }: Case, batch: number, now: () => number): Promise<number> {
  const step = (): void => void run();
  const start = now();
  for (let i = 0; i < batch; i++) gpu.scope(step);
  await gpu.finish();
  return now() - start;
}

function dispatchCount(gpu: Gpu): number {
  return [...gpu.counters().dispatches.values()].reduce((a, b) => a + b, 0);
}
