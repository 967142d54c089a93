/** One trial of a sweep: a fresh adapter on the base, trained and evaluated. */
import { attachLora } from "../lora/attach.ts";
import type { LoraConfig } from "../lora/config.ts";
import type { CausalModel } from "../models/causal.ts";
import { savePeftTo } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Row } from "../train/data.ts";
import { evaluate } from "../train/loss.ts";
import type { SearchPoint } from "../train/search.ts";
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

const loraConfigOf = (point: SearchPoint): LoraConfig => ({
  r: Number(point.rank),
  alpha: Number(point.alpha),
  dropout: Number(point.dropout),
  targetModules: parseTargets(String(point["target-modules"])),
});

/**
 * Trains with the settings of a point and gives the validation loss after each evaluation. An adapter whose loss is the lowest of this trial and
 * below `toBeat` is left in `candidate`. The model is what it was when the run ends or is closed.
 */
export async function* runTrial(
  { model, baseModel, config, rows, valid, signal }: TrialBench,
  chosen: SearchPoint,
  candidate: string,
  toBeat: number,
): AsyncGenerator<number, void, undefined> {
  const { steps, batchSize, seed, evaluations, fixed } = config;
  const point = { ...fixed, ...chosen };
  const adapter = attachLora(model, loraConfigOf(point), seed);
  let least = toBeat;
  try {
    const training = train({
      ...{ model, adapter, parameters: adapter.parameters, rows, steps, batchSize, seed, shuffleSeed: seed, signal },
      learningRate: Number(point["learning-rate"]),
      weightDecay: Number(point["weight-decay"]),
      warmupSteps: Math.ceil(Number(point.warmup) * steps),
      maxGradNorm: 1,
      validation: { every: Math.ceil(steps / evaluations), evaluate: () => evaluate(model, valid, batchSize) },
    });
    for await (const { validation } of training) {
      if (!validation) continue;
      if (validation.loss < least) {
        least = validation.loss;
        await savePeftTo(adapter, candidate, baseModel);
      }
      yield validation.loss;
    }
  } catch (error) {
    if (error instanceof ShapeError) say(`a trial ends as the worst: ${error.message}`);
    throw error;
  } finally {
    adapter.detach();
  }
}
