/**
 * The harness of all benchmarks: nothing is timed before its results have been compared with f64.
 *
 * Portable: no `node:` module, so that Node, Deno and a page run the same code.
 */
import type { Gpu } from "../src/gpu/gpu.ts";
import { Random } from "../src/tensor/random.ts";
import { readAll, type Tensor } from "../src/tensor/tensor.ts";
import type { Peer, PeerCase, PeerWork } from "./peers/peer.ts";

/** One way to do the work of a contest. */
export interface Case {
  readonly name: string;
  /** Floating-point operations of one run: 2 per multiply-add of its matrix products, elementwise work not counted. */
  readonly flops: number;
  /** Bytes of one run if each dispatch reads each of its operands once and writes its result once. */
  readonly bytes: number;
  /** Encodes one run and returns its results by name. Runs in a scope: what it does not return goes back to the pool. */
  readonly run: () => Readonly<Record<string, Tensor>>;
  /** What the host does after a run, waited for before the next one. Throws where it is wrong. */
  readonly after?: () => Promise<void>;
  /** The f64 value of one element of one result. */
  readonly check: (result: string, element: number) => number;
  /** Of |got − f64| / (1 + |f64|); 10⁻⁴ unless given, which suits f32 arithmetic. */
  readonly tolerance?: number;
  /** Bytes of buffers on the device at most, where the case counts them. */
  readonly peakBytes?: number;
}

/** Cases that are timed in turns on the same inputs. The first is the baseline of every ratio. */
export interface Contest {
  readonly name: string;
  /** Contests of one group belong in one plot. */
  readonly group?: string;
  /** What varies within the group: M, N, K, r, layout, … */
  readonly sizes?: Readonly<Record<string, number | string>>;
  /** The case that the peers' are compared with, if they have this work to do too. */
  readonly against?: string;
  /** In place of the settings' own. */
  readonly maxCaseMs?: number;
  readonly setup: (gpu: Gpu) => Prepared;
}

interface Prepared {
  readonly inputs: readonly Tensor[];
  readonly cases: readonly Case[];
  /** The work of the case `against`, for the peers: its costs and reference values are theirs too. */
  readonly work?: PeerWork;
  /** Frees what is not among the inputs. */
  readonly dispose?: () => void;
}

export interface Settings {
  readonly repetitions: number;
  /** A repetition runs a case as often as it takes to last this long, then waits for the device once. */
  readonly minBatchMs: number;
  /** A case that has used this much in 3 repetitions or more sits out the rest. No limit unless given. */
  readonly maxCaseMs?: number;
  /** A peer that takes longer than this for one step is given up. No limit unless given. */
  readonly peerPatienceMs?: number;
  /** A clock in milliseconds. */
  readonly now: () => number;
  /** Milliseconds that all threads of the process have computed, where the adapter is a CPU and the runtime tells. */
  readonly cpuNow?: () => number;
}

/** Of the repetitions: the middle one, and the ends of the middle 80 %. */
export interface Spread {
  readonly median: number;
  readonly p10: number;
  readonly p90: number;
}

/** What this device was measured to do at most. */
export interface Peaks {
  /** 10⁹ operations per second in f32 multiply-adds. */
  readonly fmaGflops: number;
  /** 10⁹ bytes per second, read and written together, in a copy that no cache holds. */
  readonly copyGbs: number;
}

export interface CaseResult {
  readonly name: string;
  /** The peer whose case this is; absent for our own. */
  readonly peer?: string;
  readonly flops: number;
  readonly bytes: number;
  /** Dispatches of one run; only known of our own. */
  readonly dispatches?: number;
  /** Bytes of buffers on the device at most in a first run; only known where the contest counts them. */
  readonly peakBytes?: number;
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
  /** The same of the CPU time of all threads, which hardly depends on what else the machine does. Absent where it is not known. */
  readonly cpu?: { readonly ms: Spread; readonly ratio: Spread };
  /** Which peak bounds this work, by its operations per byte; and the share of that peak which it reached. */
  readonly limit?: "compute" | "memory";
  readonly shareOfPeak?: number;
}

/** A case of a peer's that gave no time, and why. */
export interface FailedCase {
  readonly name: string;
  readonly peer: string;
  readonly error: string;
}

export type CaseReport = CaseResult | FailedCase;

/** A result is wrong, so there is nothing to time. */
export class WrongResultError extends Error {
  override readonly name = "WrongResultError";
}

const TOLERANCE = 1e-4; // of |got − f64| / (1 + |f64|)
const SAMPLES = 64;

/** A case that has been found right: what its runs cost, and a way to have some. */
interface Entrant {
  readonly result: Pick<CaseResult, "name" | "peer" | "flops" | "bytes" | "dispatches">;
  readonly peakBytes?: () => number | undefined;
  /** Elements of each result. */
  readonly resultSizes: ReadonlyMap<string, number>;
  /** Runs it n times and waits for the device. */
  readonly batch: (n: number) => Promise<void>;
  readonly dispose?: PeerCase["dispose"];
  readonly times: number[];
  readonly cpuTimes: number[];
  size: number;
  /** Why it is out. */
  error?: string;
}

/**
 * Checks every case of a contest, then times them in turns, so that noise of the machine meets all alike.
 *
 * Throws WrongResultError, before anything is timed, if a result of ours is wrong, and GpuError if our device fails. A peer
 * that fails or is wrong is reported as such.
 */
export async function measure(
  gpu: Gpu,
  contest: Contest,
  settings: Settings,
  peers: readonly Peer[] = [],
  peaks?: Peaks,
): Promise<CaseReport[]> {
  const { inputs, cases, work, dispose: disposeOfOurs } = contest.setup(gpu);
  const ours: Entrant[] = [];
  const theirs: Entrant[] = [];
  try {
    for (const one of cases) ours.push(await enter(gpu, `${contest.name}, ${one.name}`, one));
    for (const entrant of ours) await findBatch(entrant, settings);
    const index = cases.findIndex(({ name }) => name === contest.against);
    const [model, modelSizes] = [cases[index], ours[index]?.resultSizes ?? new Map<string, number>()];
    if (work && model)
      for (const peer of peers) {
        const entrant = await enterPeer(peer, work, model, modelSizes, settings);
        theirs.push(entrant);
        await attempt(entrant, () => patient(settings, findBatch(entrant, settings)));
      }
    await takeTurns([...ours, ...theirs], { ...settings, ...(contest.maxCaseMs && { maxCaseMs: contest.maxCaseMs }) });
    return [...ours, ...theirs].map((entrant) => report(entrant, ours[0] ?? entrant, peaks));
  } finally {
    for (const { dispose } of theirs) await dispose?.();
    disposeOfOurs?.();
    gpu.release(...inputs);
  }
}

async function enter(gpu: Gpu, what: string, one: Case): Promise<Entrant> {
  const { name, flops, bytes } = one;
  const { dispatches, resultSizes } = await checkCase(gpu, what, one);
  await one.after?.();
  const step = (): void => void one.run();
  const batch = async (n: number): Promise<void> => {
    // Submitted in eighths, so that the device need not wait until all is encoded.
    const portion = Math.ceil(n / 8);
    for (let i = 1; i <= n; i++) {
      gpu.scope(step);
      await one.after?.();
      if (i % portion === 0) gpu.flush();
    }
    await gpu.finish();
  };
  const peakBytes = (): number | undefined => one.peakBytes;
  return {
    result: { name, flops, bytes, dispatches },
    peakBytes,
    resultSizes,
    batch,
    times: [],
    cpuTimes: [],
    size: 1,
  };
}

/** Has a peer do the work once and compares what it gives with the f64 values of our own case. */
async function enterPeer(
  peer: Peer,
  work: PeerWork,
  model: Case,
  sizes: ReadonlyMap<string, number>,
  settings: Settings,
): Promise<Entrant> {
  const { name } = peer;
  let prepared: PeerCase | undefined;
  const batch = async (n: number): Promise<void> => {
    for (let i = 0; i < n; i++) {
      const pending = prepared?.run();
      if (pending) await pending;
    }
    await prepared?.finish();
  };
  const entrant: Entrant = {
    result: { name, peer: name, flops: model.flops, bytes: model.bytes },
    resultSizes: sizes,
    batch,
    dispose: () => prepared?.dispose(),
    // Counted for every peer's case: reported where ours is counted too.
    peakBytes: () => (model.peakBytes === undefined ? undefined : prepared?.peakBytes?.()),
    times: [],
    cpuTimes: [],
    size: 1,
  };
  await attempt(entrant, async () => {
    prepared = await patient(settings, peer.prepare(work));
    await patient(settings, batch(1));
    const results = await patient(settings, prepared.read());
    for (const [result, size] of sizes) {
      const values = results[result] ?? [];
      if (values.length !== size)
        throw new WrongResultError(`${name}: ${result} must have ${size} elements, got ${values.length}`);
      checkValues(name, result, values, model);
    }
  });
  return entrant;
}

/** Runs a step for a peer; if it fails, the entrant is out. */
async function attempt(entrant: Entrant, step: () => Promise<unknown>): Promise<void> {
  if (entrant.error !== undefined) return;
  try {
    await step();
  } catch (error) {
    entrant.error = error instanceof WrongResultError ? error.message : String(error);
  }
}

/** The promise, but no longer than `peerPatienceMs`. */
async function patient<T>({ peerPatienceMs }: Settings, promise: Promise<T>): Promise<T> {
  if (peerPatienceMs === undefined) return promise;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${peerPatienceMs / 1000} s`)), peerPatienceMs);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Times one batch of every case in every repetition; each goes first equally often. */
async function takeTurns(entrants: readonly Entrant[], settings: Settings): Promise<void> {
  const { repetitions, maxCaseMs = Number.POSITIVE_INFINITY, now, cpuNow } = settings;
  for (let repetition = 0; repetition < repetitions; repetition++)
    for (let turn = 0; turn < entrants.length; turn++) {
      const entrant = entrants[(turn + repetition) % entrants.length];
      if (!entrant || entrant.error !== undefined) continue;
      const { times, cpuTimes, size } = entrant;
      if (times.length >= 3 && sum(times) * size >= maxCaseMs) continue;
      const time = async (): Promise<void> => {
        const cpuBefore = cpuNow?.() ?? Number.NaN;
        times.push((await timeBatch(entrant, now)) / size);
        if (cpuNow) cpuTimes.push((cpuNow() - cpuBefore) / size);
      };
      if (entrant.result.peer === undefined) await time();
      else await attempt(entrant, () => patient(settings, time()));
    }
}

function report(
  { result, peakBytes, times, cpuTimes, size, error }: Entrant,
  baseline: Entrant,
  peaks?: Peaks,
): CaseReport {
  if (error !== undefined) return { name: result.name, peer: result.name, error };
  const ms = spread(times);
  const [gflops, gbs] = [result.flops / ms.median / 1e6, result.bytes / ms.median / 1e6];
  const peak = peakBytes?.();
  return {
    ...result,
    ...(peak !== undefined && { peakBytes: peak }),
    batch: size,
    repetitions: times.length,
    ms,
    gflops,
    gbs,
    ratio: ratios(baseline.times, times),
    ...(cpuTimes.length > 0 && { cpu: { ms: spread(cpuTimes), ratio: ratios(baseline.cpuTimes, cpuTimes) } }),
    ...(peaks && roofline(gflops, gbs, peaks)),
  };
}

const ratios = (baseline: readonly number[], times: readonly number[]): Spread =>
  spread(times.map((time, n) => (baseline[n] ?? Number.NaN) / time).filter((ratio) => !Number.isNaN(ratio)));

/**
 * Which peak bounds this work and the share of it that was reached: the larger of the two shares, for the work would meet that
 * peak first if it ran faster. Equal to comparing operations per byte with the ratio of the peaks.        Williams et al. 2009
 */
export function roofline(
  gflops: number,
  gbs: number,
  peaks: Peaks,
): Required<Pick<CaseResult, "limit" | "shareOfPeak">> {
  const [compute, memory] = [gflops / peaks.fmaGflops, gbs / peaks.copyGbs];
  return compute >= memory ? { limit: "compute", shareOfPeak: compute } : { limit: "memory", shareOfPeak: memory };
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

/** Compares what one run leaves in poisoned buffers with f64. */
async function checkCase(
  gpu: Gpu,
  what: string,
  one: Case,
): Promise<{ dispatches: number; resultSizes: Map<string, number> }> {
  const before = dispatchCount(gpu);
  const live = gpu.counters().buffersLive;
  const first = Object.values(gpu.scope(one.run));
  const made = gpu.counters().buffersLive - live;
  if (made !== first.length)
    throw new WrongResultError(
      `${what}: each of ${first.length} results must be made by the run, got ${made} new buffers`,
    );
  const dispatches = dispatchCount(gpu) - before;
  gpu.release(...first);
  const poisoned = poisonPool(gpu, first, dispatches);

  const results = Object.entries(gpu.scope(one.run));
  const tensors = results.map(([, t]) => t);
  const values = await readAll(tensors);
  gpu.release(...tensors);
  results.forEach(([result, t], n) => {
    if (!poisoned.has(t.buffer))
      throw new WrongResultError(`${what}: ${result} came in a buffer that was not poisoned`);
    checkValues(what, result, values[n] ?? [], one);
  });
  return { dispatches, resultSizes: new Map(results.map(([result, t]) => [result, t.size])) };
}

/** Throws WrongResultError unless all values are finite and those at some places near their f64 values. */
function checkValues(
  what: string,
  result: string,
  got: ArrayLike<number>,
  { check, tolerance = TOLERANCE }: Case,
): void {
  let holes = 0;
  for (let i = 0; i < got.length; i++) if (!Number.isFinite(got[i])) holes++;
  if (holes > 0)
    throw new WrongResultError(
      `${what}: all ${got.length} elements of ${result} must be finite, got ${holes} that are not`,
    );
  for (const element of sampled(got.length)) {
    const expected = check(result, element);
    const value = got[element] ?? Number.NaN;
    if (!(Math.abs(value - expected) <= tolerance * (1 + Math.abs(expected))))
      throw new WrongResultError(`${what}: ${result}[${element}] must be ${expected}, got ${value}`);
  }
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

/** Finds how many runs last `minBatchMs`, which is the warm-up too. */
async function findBatch(entrant: Entrant, { minBatchMs, now }: Settings): Promise<void> {
  for (;;) {
    const ms = await timeBatch(entrant, now);
    if (ms >= minBatchMs || entrant.size >= 100_000) return;
    entrant.size = Math.ceil(entrant.size * Math.min(10, Math.max(1.1, (1.1 * minBatchMs) / ms)));
  }
}

async function timeBatch({ batch, size }: Entrant, now: () => number): Promise<number> {
  const start = now();
  await batch(size);
  return now() - start;
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);

function dispatchCount(gpu: Gpu): number {
  return sum([...gpu.counters().dispatches.values()]);
}
