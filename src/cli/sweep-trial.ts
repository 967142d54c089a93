/** Trials of a sweep: fresh adapters on the base, trained and evaluated, one alone or several at once. */
import type { LoraAdapter } from "../lora/adapter.ts";
import { attachLora } from "../lora/attach.ts";
import type { LoraConfig } from "../lora/config.ts";
import { SharedBase } from "../lora/shared-base.ts";
import type { CausalModel } from "../models/causal.ts";
import { savePeftTo } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Row } from "../train/data.ts";
import { evaluate } from "../train/loss.ts";
import type { SearchPoint } from "../train/search.ts";
import type { SharedTrial } from "../train/sweep.ts";
import { trainTogether } from "../train/together.ts";
import { train } from "../train/trainer.ts";
import { parseTargets } from "./options.ts";
import { say } from "./session.ts";
import type { SweepConfig } from "./sweep-config.ts";

/** What all trials have in common. */
export interface TrialBench {
  readonly model: CausalModel;
  readonly baseModel: string;
  readonly config: SweepConfig;
  readonly rows: readonly Row[];
  readonly valid: readonly Row[];
  readonly signal?: AbortSignal | undefined;
}

const loraConfigOf = ({ fixed }: SweepConfig, chosen: SearchPoint): LoraConfig => {
  const point = { ...fixed, ...chosen };
  return {
    r: Number(point.rank),
    alpha: Number(point.alpha),
    dropout: Number(point.dropout),
    targetModules: parseTargets(String(point["target-modules"])),
  };
};

/** How the settings of a point train: see `TrainOptions`. */
function trainingOf({ model, config, rows, valid }: TrialBench, chosen: SearchPoint) {
  const { steps, batchSize, seed, evaluations, fixed } = config;
  const point = { ...fixed, ...chosen };
  return {
    ...{ rows, steps, batchSize, shuffleSeed: seed },
    learningRate: Number(point["learning-rate"]),
    weightDecay: Number(point["weight-decay"]),
    warmupSteps: Math.ceil(Number(point.warmup) * steps),
    maxGradNorm: 1,
    validation: { every: Math.ceil(steps / evaluations), evaluate: () => evaluate(model, valid, batchSize) },
  };
}

/**
 * Trains with the settings of a point and gives the validation loss after each evaluation. An adapter whose loss is the lowest of this trial and
 * below `toBeat` is left in `candidate`. The model is what it was when the run ends or is closed.
 */
export async function* runTrial(
  bench: TrialBench,
  point: SearchPoint,
  candidate: string,
  toBeat: number,
): AsyncGenerator<number, void, undefined> {
  const { model, baseModel, config, signal } = bench;
  const { seed } = config;
  const adapter = attachLora(model, loraConfigOf(config, point), seed);
  let least = toBeat;
  try {
    const options = { model, adapter, parameters: adapter.parameters, seed, signal };
    for await (const { validation } of train({ ...options, ...trainingOf(bench, point) })) {
      if (!validation) continue;
      if (validation.loss < least) {
        least = validation.loss;
        await savePeftTo(adapter, candidate, baseModel);
      }
      yield validation.loss;
    }
  } catch (error) {
    if (error instanceof ShapeError) sayWorst(error);
    throw error;
  } finally {
    adapter.detach();
  }
}

const sayWorst = ({ message }: Error): void => say(`a trial ends as the worst: ${message}`);

/** As `runTrial`, of several that train in one batch, as `SharedRuns` has it; `candidateOf` says where a trial's adapter is left. */
export async function* runTrialsTogether(
  bench: TrialBench,
  trials: readonly SharedTrial[],
  candidateOf: (trial: number) => string,
  toBeat: number,
): AsyncGenerator<readonly (number | undefined)[], void, undefined> {
  const { model, baseModel, config, signal } = bench;
  const adapters: LoraAdapter[] = [];
  try {
    for (const { point } of trials) adapters.push(attachLora(model, loraConfigOf(config, point), config.seed));
    const lanes = trials.map((trial) => ({ ...trainingOf(bench, trial.point), signal: trial.signal }));
    const least = trials.map(() => toBeat);
    const failed = new Set<number>();
    let round = new Map<number, number>();
    const losses = (): (number | undefined)[] => trials.map((_, i) => round.get(i));
    const isComplete = (): boolean => trials.every((one, i) => round.has(i) || failed.has(i) || one.signal.aborted);
    const shared = new SharedBase(adapters);
    for await (const { lane, metrics, failure } of trainTogether({ model, shared, lanes, signal })) {
      const loss = failure ? Number.NaN : metrics.validation?.loss;
      if (loss === undefined) continue;
      round.set(lane, loss);
      if (failure) {
        sayWorst(failure);
        failed.add(lane);
      } else if (loss < (least[lane] ?? toBeat)) {
        least[lane] = loss;
        await savePeftTo(adapters[lane] as LoraAdapter, candidateOf((trials[lane] as SharedTrial).trial), baseModel);
      }
      if (!isComplete()) continue;
      yield losses();
      round = new Map();
    }
    if (round.size > 0) yield losses();
  } finally {
    for (const adapter of adapters) adapter.detach();
  }
}

/**
 * Which of the points train at once, by their indices: those that share the targets and have no dropout, as many as fit into the memory that may be used.
 * What does not fit or cannot share is alone.
 */
export async function groupsOf(
  { config }: TrialBench,
  points: readonly SearchPoint[],
  fits: (configs: readonly LoraConfig[]) => Promise<boolean>,
): Promise<number[][]> {
  const alike = new Map<string, number[]>();
  points.forEach((point, i) => {
    const { targetModules, dropout } = loraConfigOf(config, point);
    const key = dropout ? `alone ${i}` : String(targetModules);
    alike.set(key, [...(alike.get(key) ?? []), i]);
  });
  const groups: number[][] = [];
  for (const members of alike.values())
    for (let at = 0, count = members.length; at < members.length; at += count) {
      count = members.length - at;
      const chosen = (): number[] => members.slice(at, at + count);
      while (count > 1 && !(await fits(chosen().map((i) => loraConfigOf(config, points[i] as SearchPoint))))) count--;
      groups.push(chosen());
    }
  return groups;
}
