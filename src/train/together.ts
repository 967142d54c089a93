/** The training of several adapters at once on one base. */
import { ShapeError } from "../tensor/errors.ts";
import { batchIndices, collate, isPacked, largestBatch, longest, roundedLength } from "./batches.ts";
import type { Row } from "./data.ts";
import { type LaneSettings, LaneStep, type LaneWork, type SharesBase } from "./lane-step.ts";
import type { LanguageModel } from "./loss.ts";
import { scheduleFactor } from "./schedule.ts";
import { StepCounts, type StepMetrics } from "./step-metrics.ts";
import { MOST_UNREAD_STEPS, type StepResult } from "./step-ring.ts";
import { checkOptions, IN_FLIGHT, READ_EVERY_MS, type RunOptions } from "./trainer.ts";
import { EarlyStopping } from "./validation.ts";

/** How one adapter is trained: as `TrainOptions` has it. Its signal ends it alone; only it is enabled while its validation evaluates. */
export type LaneOptions = LaneSettings &
  Pick<
    RunOptions<Row>,
    "steps" | "batchSize" | "learningRate" | "schedule" | "warmupSteps" | "shuffleSeed" | "validation" | "signal"
  > & { readonly rows: readonly Row[] };

export interface TogetherOptions {
  readonly model: LanguageModel;
  /** A `SharedBase` of the adapters. */
  readonly shared: SharesBase;
  /** In the order of the adapters. */
  readonly lanes: readonly LaneOptions[];
  /** Fills rows up to the longest of a batch; never seen by the loss. */
  readonly padId?: number;
  /** Of all lanes: see `LanguageSettings`. */
  readonly labelSmoothing?: number | undefined;
  /** Metrics are read back after so many steps, or after a quarter of a second. 10 unless given. */
  readonly readEvery?: number;
  /** Stops all after the step in progress. */
  readonly signal?: AbortSignal | undefined;
}

/** What came of a step of one lane, or why the lane ended before its last step. */
export type LaneEvent =
  | { readonly lane: number; readonly metrics: StepMetrics; readonly failure?: undefined }
  | { readonly lane: number; readonly failure: ShapeError; readonly metrics?: undefined };

/**
 * Trains the adapters of a `SharedBase` in one batch, each with rows, settings and steps of its own, and yields the metrics of each lane's steps. A lane
 * comes out as `train` would have it, up to the order of sums. One that ends, by its steps, its signal, its patience or a loss that is not finite five
 * times in a row, drops out of the batch; the others go on.
 *
 * Throws ShapeError for settings out of range.
 */
export async function* trainTogether(options: TogetherOptions): AsyncGenerator<LaneEvent, void, undefined> {
  const { model, shared, lanes, padId = 0, labelSmoothing, readEvery = 10, signal } = options;
  const { gpu } = model;
  const runs = lanes.map((lane, i) => new LaneRun(lane, shared.adapters[i], i, readEvery));
  const step = new LaneStep({ model, shared, lanes, labelSmoothing });
  try {
    const most = roundedLength(lanes.reduce((length, { rows }) => Math.max(length, longest(rows)), 0));
    step.reserve(
      lanes.map(({ rows, batchSize }) => largestBatch(Math.min(batchSize, rows.length), most, isPacked(rows))),
    );
    const report = async function* (): AsyncGenerator<LaneEvent> {
      const results = await step.read();
      for (const [i, run] of runs.entries()) yield* run.report(results[i] ?? []);
    };
    let readAt = performance.now();
    for (let k = 1; !signal?.aborted && runs.some((run) => run.goesOn); k++) {
      step.run(workOf(runs, padId));
      await gpu.throttle(IN_FLIGHT);
      const isDue = runs.some((run) => run.isDue);
      if (k % Math.min(readEvery, MOST_UNREAD_STEPS) !== 0 && performance.now() - readAt < READ_EVERY_MS && !isDue)
        continue;
      yield* report();
      readAt = performance.now();
    }
    yield* report();
  } finally {
    await gpu.throttle(1).catch(() => {}); // a lost device has its own error
    step.destroy();
  }
}

type LaneAdapter = SharesBase["adapters"][number];

/** What the lanes do in a step: batches as long as the longest of their rows, rounded up. */
function workOf(runs: readonly LaneRun[], padId: number): (LaneWork | undefined)[] {
  const next = runs.map((run) => (run.goesOn ? run.next() : undefined));
  const T = roundedLength(longest(next.flatMap((one) => one?.rows ?? [])));
  return next.map((one) => one && { batch: collate(one.rows, padId, T), learningRate: one.learningRate });
}

/** Where one lane is. */
class LaneRun {
  readonly #options: LaneOptions;
  readonly #adapter: LaneAdapter | undefined;
  readonly #lane: number;
  readonly #batches: Generator<number[], never>;
  readonly #watch: EarlyStopping;
  readonly #counts = new StepCounts();
  #step = 0;
  /** Steps whose results are still on the device. */
  #unread = 0;
  #hasFailed = false;

  constructor(options: LaneOptions, adapter: LaneAdapter | undefined, lane: number, readEvery: number) {
    checkOptions({ ...options, parameters: options.parameters ?? adapter?.parameters ?? [], readEvery });
    const { rows, batchSize, shuffleSeed: seed } = options;
    this.#options = options;
    this.#adapter = adapter;
    this.#lane = lane;
    this.#batches = batchIndices({ rows: rows.length, batchSize, seed });
    this.#watch = new EarlyStopping(options.validation, undefined);
  }

  get goesOn(): boolean {
    const { steps, signal } = this.#options;
    return this.#step < steps && !signal?.aborted && !this.#hasFailed && !this.#watch.isOver;
  }

  /** Whether the parameters are to be evaluated as they are now. */
  get isDue(): boolean {
    return this.#unread > 0 && this.#watch.isDue(this.#step, this.#options.steps);
  }

  /** Rows and rate of its next step. */
  next(): { readonly rows: readonly Row[]; readonly learningRate: number } {
    const { rows, learningRate, schedule = "linear", steps, warmupSteps = 0 } = this.#options;
    this.#unread++;
    const chosen = this.#batches.next().value.map((i) => rows[i] as Row);
    const rate = learningRate * scheduleFactor(schedule, this.#step++, steps, warmupSteps);
    this.#counts.sent({ rate, tokens: chosen.reduce((sum, { inputIds }) => sum + inputIds.length, 0) });
    return { rows: chosen, learningRate: rate };
  }

  /** What came of the steps since the last report, and of the evaluation after the last of them. */
  async *report(results: readonly StepResult[]): AsyncGenerator<LaneEvent> {
    const lane = this.#lane;
    const evaluate = this.isDue ? () => this.#evaluate() : undefined;
    this.#unread = 0;
    try {
      for await (const metrics of this.#counts.metrics(results, evaluate)) yield { lane, metrics };
    } catch (error) {
      if (!(error instanceof ShapeError)) throw error;
      this.#hasFailed = true;
      yield { lane, failure: error };
    }
  }

  async #evaluate(): Promise<StepMetrics["validation"]> {
    this.#adapter?.enable();
    try {
      return await this.#watch.evaluate(this.#step);
    } finally {
      this.#adapter?.disable();
    }
  }
}
