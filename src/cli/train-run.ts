/** A training run on the command line: metrics, adapters and checkpoints into its directory, Ctrl-C and the end of its time. */
import { join } from "node:path";
import type { Gpu } from "../gpu/gpu.ts";
import { syncFile } from "../io/files.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import { appendLine, type RunSettings, type SavedCheckpoint, saveCheckpoint, savePeftTo } from "../node.ts";
import type { TrainingState } from "../train/checkpoint.ts";
import type { Row } from "../train/data.ts";
import type { ProfiledDispatch } from "../train/profile.ts";
import type { StepMetrics } from "../train/step-metrics.ts";
import { type TrainTaskOptions, trainTask } from "../train/trainer.ts";
import { Progress } from "./progress.ts";
import { deviceName, say } from "./session.ts";
import { writeProfile } from "./train-report.ts";
import { version } from "./version.ts";

interface RunOptions<R extends Pick<Row, "inputIds">, B> extends Omit<TrainTaskOptions<R, B>, "profile"> {
  readonly adapter: LoraAdapter;
  readonly out: string;
  readonly baseModel: string;
  /** See `keptSettings`. */
  readonly settings: RunSettings;
  /** What it goes on from. */
  readonly saved: SavedCheckpoint | undefined;
  readonly saveEvery?: number;
  /** Checkpoints. */
  readonly keep: number;
  /** What the model makes of some prompts, asked for after each evaluation and at the end. */
  readonly sample?: Sample | undefined;
  /** In milliseconds. */
  readonly timeBudget?: number;
  readonly profile?: boolean;
}

export type Sample = () => Promise<readonly { readonly prompt: string; readonly text: string }[]>;

interface RunEnd {
  /** Of this process. */
  readonly first: StepMetrics | undefined;
  readonly last: StepMetrics | undefined;
  /** By Ctrl-C. */
  readonly interrupted: boolean;
  readonly skipped: number;
}

/** Trains, and leaves the adapter of the last good step in `out` however it ends. */
export async function runTraining<R extends Pick<Row, "inputIds">, B>(options: RunOptions<R, B>): Promise<RunEnd> {
  const { task, out, steps, saved, timeBudget } = options;
  const progress = new Progress(steps, saved?.step);
  const ctrlC = interruption(() => progress.end());
  const timeIsOver = timeBudget ? [AbortSignal.timeout(timeBudget)] : [];
  const profiles: ProfiledDispatch[] = [];
  const files = new RunFiles(options);
  let [first, last]: (StepMetrics | undefined)[] = [];
  let skipped = 0;
  try {
    const training = trainTask({
      ...options,
      from: saved?.state,
      signal: AbortSignal.any([ctrlC.signal, ...timeIsOver]),
      checkpoint: { every: options.saveEvery, save: (state) => files.checkpoint(state) },
      profile: options.profile
        ? { step: Math.min((saved?.step ?? 0) + 3, steps), onProfile: (found) => void profiles.push(...found) }
        : undefined,
      onTuned: ({ key, chosen, timesMs }) =>
        say(`tuned ${key}: ${chosen}, ${timesMs[chosen]?.toPrecision(2)} ms, of ${Object.keys(timesMs).length} ways`),
    });
    for await (const metrics of training) {
      first ??= metrics;
      last = metrics;
      if (metrics.skipped) skipped++;
      await files.add(metrics);
      progress.show(metrics);
      if (metrics.validation && metrics.step < steps) await files.addSamples(metrics.step);
    }
    progress.end();
    const done = last?.step ?? saved?.step ?? 0;
    if (done < steps && !ctrlC.signal.aborted) say(whyEarly(done, timeIsOver[0]?.aborted ?? false));
    await files.addSamples(done);
    say(await files.saveAdapter());
    if (profiles.length > 0) await writeProfile(profiles, out, deviceName(task.gpu.info));
    return { first, last, interrupted: ctrlC.signal.aborted && done < steps, skipped };
  } catch (error) {
    progress.end();
    say(await files.saveAdapter().catch(() => files.left()));
    throw error;
  } finally {
    ctrlC.forget();
  }
}

const whyEarly = (step: number, timeIsOver: boolean): string =>
  timeIsOver
    ? `the time is over after step ${step}; the same command with --resume goes on`
    : `stopped after step ${step}: the validation loss was no lower for as long as --patience allows`;

/** The first Ctrl-C aborts. A second one finds the default again, which quits. */
function interruption(before: () => void): { readonly signal: AbortSignal; readonly forget: () => void } {
  const stop = new AbortController();
  const onInterrupt = (): void => {
    before();
    say("stopping after the step in progress; Ctrl-C again quits at once without saving");
    stop.abort();
  };
  process.once("SIGINT", onInterrupt);
  return { signal: stop.signal, forget: () => void process.off("SIGINT", onInterrupt) };
}

type FileOptions = Pick<
  RunOptions<Row, never>,
  "adapter" | "out" | "baseModel" | "settings" | "saved" | "keep" | "sample"
> & {
  readonly task: { readonly gpu: Gpu };
};

/** What a run writes. */
class RunFiles {
  readonly #options: FileOptions;
  readonly #metrics: string;
  /** The last step that is known to be done, and the last whose adapter was saved on the way. */
  #good: number | undefined;
  #saved: number | undefined;
  #best: number | undefined;
  #sampled: number | undefined;

  constructor(options: FileOptions) {
    this.#options = options;
    this.#metrics = join(options.out, "metrics.jsonl");
    this.#good = options.saved?.step;
    this.#best = options.saved?.state.best?.step;
  }

  /** Of a step with an evaluation the parameters are those of that step. */
  async add(metrics: StepMetrics): Promise<void> {
    const { adapter, out, baseModel } = this.#options;
    await appendLine(this.#metrics, JSON.stringify(metrics));
    if (!metrics.skipped) this.#good = metrics.step;
    if (!metrics.validation?.best) return;
    await savePeftTo(adapter, join(out, "best"), baseModel);
    this.#best = metrics.step;
  }

  async addSamples(step: number): Promise<void> {
    if (step === this.#sampled) return;
    this.#sampled = step;
    for (const sample of (await this.#options.sample?.()) ?? []) {
      await appendLine(join(this.#options.out, "samples.jsonl"), JSON.stringify({ step, ...sample }));
      say(`after step ${step}: ${sample.prompt} \u2192${sample.text.replaceAll("\n", "\n  ")}`);
    }
  }

  /** The metrics first: a checkpoint must not know of steps that they do not. */
  async checkpoint(state: TrainingState): Promise<void> {
    const { task, adapter, out, baseModel, settings, keep } = this.#options;
    await syncFile(this.#metrics);
    const madeBy = { lowrank: version(), runtime: process.version, device: deviceName(task.gpu.info) };
    await saveCheckpoint(out, adapter, baseModel, state, { settings, madeBy }, keep);
    await savePeftTo(adapter, out, baseModel);
    this.#saved = state.optimizer.stepCount;
  }

  async saveAdapter(): Promise<string> {
    const { adapter, out, baseModel } = this.#options;
    if (!this.#good) return "no step is known to be done: no adapter was saved";
    await savePeftTo(adapter, out, baseModel);
    const best = this.#best ? `, the best one, of step ${this.#best}, in ${join(out, "best")}` : "";
    return `the adapter of step ${this.#good} is saved in ${out}${best}`;
  }

  /** What there is when the device is gone, and how to go on. */
  left(): string {
    return this.#saved === undefined
      ? "the adapter could not be saved: what was trained is lost. Use --save-every to keep some of it"
      : `the adapter of step ${this.#saved} is in ${this.#options.out}, whole. The same command with --resume goes on from it`;
  }
}
