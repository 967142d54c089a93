/** What a training run takes, known before anything is loaded. */
import { dryGpu } from "../gpu/dry.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { LanguageModel } from "./loss.ts";
import { type HasTrainingMode, TrainingStep } from "./step.ts";
import { languageTask, type RowTask } from "./task.ts";

export interface PlanOptions {
  /** Rows of one forward pass. */
  readonly batchSize: number;
  /** Tokens of its longest row. */
  readonly maxLength: number;
  readonly gradAccumulation?: number;
  /** Whether rows are packed. */
  readonly packing?: boolean;
  /** Batches of the evaluations on the way, if there are any. */
  readonly evaluation?: { readonly batchSize: number; readonly maxLength: number } | undefined;
}

/** Bytes of GPU memory, as `gpu.counters()` counts them. */
export interface MemoryPlan {
  /** What is frozen. */
  readonly weights: number;
  /** What is trained: an adapter, or all weights. */
  readonly trained: number;
  readonly gradients: number;
  /** The two moments of AdamW. */
  readonly optimizer: number;
  /** Activations and whatever else a step needs for a while, placed by liveness. */
  readonly activations: number;
  /** Tokens, labels, constants, losses. */
  readonly rest: number;
  /** All of it together. */
  readonly peak: number;
  /** Dispatches of a step. */
  readonly dispatches: number;
}

interface Planned {
  readonly model: LanguageModel;
  /** What is learned; next tokens unless given. */
  readonly task?: RowTask<never, unknown> | undefined;
  readonly parameters: readonly Tensor[];
  /** What is trained, where it behaves differently in training. */
  readonly adapter?: HasTrainingMode;
  /** See `AdamWSettings`. */
  readonly projections?: ReadonlyMap<Tensor, Tensor>;
  /** Makes and frees what else is done between steps, such as samples. What is done before the first, `build` itself may make and free. */
  readonly between?: () => void;
}

/**
 * Plans a run on the longest batch it may meet. `build` makes the model and what is trained on the Gpu it is given, which has `gpu`'s limits
 * but no memory: weights are best made by `empty`. The step is traced as it will be in training, so the counts are those of the run itself.
 *
 * Throws GpuError where a buffer would exceed what `gpu` can bind.
 */
export async function planTraining(
  gpu: Gpu,
  build: (dry: Gpu) => Planned | Promise<Planned>,
  { batchSize, maxLength, gradAccumulation = 1, packing = false, evaluation }: PlanOptions,
): Promise<MemoryPlan> {
  const dry = dryGpu(gpu);
  const {
    model,
    parameters,
    adapter,
    projections,
    between,
    task = languageTask(model, {}, packing),
  } = await build(dry);
  const trained = parameters.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const weights = dry.counters().bytesLive - trained;
  const settings = { projections, accumulates: gradAccumulation > 1 };
  const step = new TrainingStep<unknown>({ task, parameters, ...(adapter && { adapter }), ...settings });
  const batch = task.largest(batchSize, maxLength);
  step.run(new Array(gradAccumulation).fill(batch), 0);
  if (evaluation) task.evaluation?.(task.largest(evaluation.batchSize, evaluation.maxLength));
  between?.();
  const { bytesPeak, dispatches } = dry.counters();
  const { gradientBytes: gradients, sizeBytes: optimizer } = step.optimizer;
  const activations = step.workspaceBytes;
  return {
    ...{ weights, trained, gradients, optimizer, activations },
    rest: bytesPeak - weights - trained - gradients - optimizer - activations,
    peak: bytesPeak,
    dispatches: [...dispatches.values()].reduce((a, b) => a + b, 0),
  };
}
