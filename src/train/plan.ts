/** What a training run takes, known before anything is loaded. */
import { dryGpu } from "../gpu/dry.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { AdamW } from "./adamw.ts";
import { largestBatch, roundedLength } from "./batches.ts";
import { LaneStep, type SharesBase } from "./lane-step.ts";
import type { LanguageModel } from "./loss.ts";
import { type HasTrainingMode, TrainingStep } from "./step.ts";
import { languageTask, type RowTask } from "./task.ts";

export interface PlanOptions {
  /** Rows of one forward pass, of each adapter where there are several. */
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

/** Adapters that are trained at once, each on batches of its own. */
interface PlannedTogether {
  readonly model: LanguageModel;
  readonly shared: SharesBase;
  readonly between?: undefined;
}

interface Planned {
  readonly model: LanguageModel;
  readonly shared?: undefined;
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
 * but no memory: weights are best made by `empty`; of adapters that share a base it gives the `SharedBase`. The step is traced as it will be in training, so the counts are those of the run itself.
 *
 * Throws GpuError where a buffer would exceed what `gpu` can bind.
 */
export async function planTraining(
  gpu: Gpu,
  build: (dry: Gpu) => Planned | PlannedTogether | Promise<Planned | PlannedTogether>,
  options: PlanOptions,
): Promise<MemoryPlan> {
  const dry = dryGpu(gpu);
  const planned = await build(dry);
  const { shared } = planned;
  const { evaluation } = options;
  const parameters = shared ? shared.adapters.flatMap((adapter) => adapter.parameters) : planned.parameters;
  const trained = parameters.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const weights = dry.counters().bytesLive - trained;
  const { step, optimizers, task } = shared ? lanes(planned, options) : alone(planned, options);
  shared?.adapters[0]?.enable();
  if (evaluation) task.evaluation?.(task.largest(evaluation.batchSize, evaluation.maxLength));
  planned.between?.();
  const { bytesPeak, dispatches } = dry.counters();
  const gradients = optimizers.reduce((sum, { gradientBytes }) => sum + gradientBytes, 0);
  const optimizer = optimizers.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const activations = step.workspaceBytes;
  return {
    ...{ weights, trained, gradients, optimizer, activations },
    rest: bytesPeak - weights - trained - gradients - optimizer - activations,
    peak: bytesPeak,
    dispatches: [...dispatches.values()].reduce((a, b) => a + b, 0),
  };
}

interface Sent {
  readonly task: RowTask<never, unknown>;
  readonly step: { readonly workspaceBytes: number };
  readonly optimizers: readonly AdamW[];
}

/** Sends the largest step of one adapter, or whatever else is trained. */
function alone(
  { model, task: given, parameters, adapter, projections }: Planned,
  { batchSize, maxLength, gradAccumulation = 1, packing = false }: PlanOptions,
): Sent {
  const task: RowTask<never, unknown> = given ?? languageTask(model, {}, packing);
  const settings = { projections, accumulates: gradAccumulation > 1, ...(adapter && { adapter }) };
  const step = new TrainingStep<unknown>({ task, parameters, ...settings });
  step.run(new Array(gradAccumulation).fill(task.largest(batchSize, maxLength)), 0);
  return { task, step, optimizers: [step.optimizer] };
}

/** Sends the largest step of adapters that share a base. */
function lanes({ model, shared }: PlannedTogether, { batchSize, maxLength, packing = false }: PlanOptions): Sent {
  const step = new LaneStep({ model, shared, lanes: shared.adapters.map(() => ({})) });
  const batch = largestBatch(batchSize, roundedLength(maxLength), packing);
  step.run(shared.adapters.map(() => ({ batch, learningRate: 0 })));
  return { task: languageTask(model, {}, packing), step, optimizers: step.optimizers };
}
