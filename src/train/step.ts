import { add, scale as scaled } from "../autograd/basic-ops.ts";
import { backward } from "../autograd/engine.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Plan } from "../gpu/plan.ts";
import { addInto } from "../kernels/axpy.ts";
import { copyTo, putColumns } from "../kernels/copy-rows.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, type Tensor, view } from "../tensor/tensor.ts";
import { AdamW, type AdamWSettings, type AdamWState } from "./adamw.ts";
import type { Batch } from "./batches.ts";
import type { LanguageModel } from "./loss.ts";
import { type ProfiledDispatch, profiled } from "./profile.ts";
import { Replay } from "./replay.ts";
import { type StepResult, StepRing } from "./step-ring.ts";
import { type Loaded, languageTask, type Task, type TrainingMode } from "./task.ts";

/** An adapter, seen from training. */
export interface HasTrainingMode {
  /** Set while a training step is made: dropout is on, its masks made from the seed and the number of the batch. */
  training?: TrainingMode | undefined;
  /** Of its scale; a step is traced anew where it changes. */
  readonly factor?: number;
}

/** What is learned: the next tokens of a language model, or another task. */
export type TrainingStepOptions<B = Batch> = StepSettings &
  ({ readonly model: LanguageModel } | { readonly task: Task<B> });

interface StepSettings extends AdamWSettings {
  /** What is trained; everything else is frozen. */
  readonly parameters: readonly Tensor[];
  /** What is trained, where it behaves differently in training: its dropout is on within a step, with masks by `seed`. */
  readonly adapter?: HasTrainingMode;
  /** Seed of the dropout masks and of noise; 0 unless given. */
  readonly seed?: number;
  /** Whether a step may have several batches, whose gradients are added up. */
  readonly accumulates?: boolean;
  /** Make every dispatch anew in each step instead of replaying a plan: slower, larger, and the same to the last bit. For study. */
  readonly eager?: boolean;
}

/** All that the next steps depend on besides their batches and learning rates. */
export interface TrainingStepState {
  readonly optimizer: AdamWState;
  /** Batches so far: dropout masks are made from their number and the seed. */
  readonly batchCount: number;
  /** Steps in a row, up to the last, that were not finite. */
  readonly badSteps: number;
}

/**
 * Forward, backward and update of a model, traced once per shape of batch and then replayed: no GPU object is made, nothing is read
 * back, one submit per batch.
 */
export class TrainingStep<B = Batch> {
  readonly optimizer: AdamW;
  readonly #task: Task<B>;
  readonly #gpu: Gpu;
  readonly #eager: boolean;
  readonly #adapter: HasTrainingMode;
  readonly #seed: number;
  /** Names of the losses, where there are several. */
  readonly #parts: readonly string[];
  readonly #ring: StepRing;
  readonly #replay: Replay<B, Loaded<B>>;
  #batchCount = 0;
  // What varies from step to step.
  #scale = 1;
  #learningRate = 0;

  constructor(options: TrainingStepOptions<B>) {
    const { parameters, adapter = {}, seed = 0, accumulates = false, eager = false, ...settings } = options;
    this.#task = "task" in options ? options.task : (languageTask(options.model) as Task<unknown> as Task<B>);
    this.#gpu = this.#task.gpu;
    this.#eager = eager;
    this.#adapter = adapter;
    this.#seed = seed;
    this.optimizer = new AdamW(parameters, settings, accumulates);
    const names = Object.keys(this.#task.weights);
    this.#parts = names.length > 1 ? names : [];
    this.#ring = new StepRing(this.#gpu, this.#parts);
    this.#replay = new Replay(this.#gpu, this.#task);
  }

  /** Plans traced so far. */
  get plans(): ReadonlyMap<string, Plan> {
    return this.#replay.plans;
  }

  /** Bytes that the plans share for what lives within a step. */
  get workspaceBytes(): number {
    return this.#replay.workspaceBytes;
  }

  /**
   * Takes the memory of a step on such batches now, the first of them as large as any of the run: no later one may need more, as inputs and plans
   * share what it needs. Nothing is done eagerly.
   */
  reserve(batches: readonly B[]): void {
    if (this.#eager) return;
    const [largest] = batches;
    if (largest) this.#replay.reserve(largest);
    batches.forEach((batch, i) => void this.#planFor(batch, i === 0, i === batches.length - 1));
  }

  /** Sends one optimizer step on these batches. Its result stays on the device until `read`, which has to come within 64 steps. */
  run(batches: readonly B[], learningRate: number): void {
    for (const plan of this.#start(batches, learningRate)) plan.run();
  }

  /** As `run`, and says what each dispatch took: see `Plan.profile`. Throws ShapeError where it is eager: there is no plan then. */
  async profile(batches: readonly B[], learningRate: number): Promise<ProfiledDispatch[]> {
    if (this.#eager) throw new ShapeError("TrainingStep: a profile is made of a replayed step, got an eager one");
    const all: ProfiledDispatch[] = [];
    for (const plan of this.#start(batches, learningRate)) all.push(...profiled(plan.dispatches, await plan.profile()));
    return all;
  }

  /** The plans of a step one by one, each with its inputs in place; it runs the parts itself where it is eager. */
  *#start(batches: readonly B[], learningRate: number): Generator<Plan> {
    if (batches.length === 0) throw new ShapeError("TrainingStep: a step must have a batch, got none");
    this.#ring.begin();
    const count = batches.reduce((sum, batch) => sum + this.#task.count(batch), 0);
    this.#scale = count > 0 ? 1 / count : 0;
    this.#learningRate = learningRate;
    this.optimizer.stepCount++;
    for (const [i, batch] of batches.entries()) {
      this.#batchCount++;
      const [isFirst, isLast] = [i === 0, i === batches.length - 1];
      if (this.#eager) {
        const inputs = this.#replay.inputsFor(batch);
        this.#gpu.scope(() => this.#part(inputs, isFirst, isLast));
        this.#gpu.flush();
      } else yield this.#planFor(batch, isFirst, isLast);
    }
  }

  /** The results of the steps since the last `read`, once they are done. The steps that follow may be sent meanwhile. */
  async read(): Promise<StepResult[]> {
    return this.#ring.read();
  }

  /** Between two steps: what lets another `TrainingStep` of the same options go on from here, bit for bit. */
  async state(): Promise<TrainingStepState> {
    const badSteps = await this.#ring.badSteps();
    return { optimizer: await this.optimizer.state(), batchCount: this.#batchCount, badSteps };
  }

  /** Goes on from `state`, parameters included. Throws ShapeError where it is of other parameters. */
  restore({ optimizer, batchCount, badSteps }: TrainingStepState): void {
    this.optimizer.restore(optimizer);
    this.#batchCount = batchCount;
    this.#ring.restore(optimizer.stepCount, badSteps);
  }

  /** Frees plans, workspace and optimizer. */
  destroy(): void {
    this.#replay.destroy();
    this.#ring.destroy();
    this.optimizer.destroy();
  }

  /** Forward and backward of one batch, and the update after the last one. */
  #part(inputs: Loaded<B>, isFirst: boolean, isLast: boolean): void {
    const losses = this.#gradients(inputs, !isFirst);
    if (isFirst) copyTo(losses, this.#ring.losses);
    else addInto(losses, this.#ring.losses);
    if (!isLast) return;
    const clip = this.optimizer.norm();
    this.#ring.record(clip, () => this.#scale);
    this.optimizer.update(clip, () => this.#learningRate);
  }

  /** The loss of a batch and its parts, like the ring's, its gradients taken. Only meanwhile is the adapter in training: between steps it may be evaluated. */
  #gradients(inputs: Loaded<B>, adds: boolean): Tensor {
    const training = { seed: this.#seed, step: () => this.#batchCount };
    this.#adapter.training = training;
    try {
      const values = inputs.losses(() => this.#scale, training);
      const weights = Object.values(this.#task.weights);
      const weighted = values.map((value, i) => (weights[i] === 1 ? value : scaled(value, weights[i] ?? 0)));
      const loss = weighted.reduce((sum, value) => add(sum, value));
      this.optimizer.take(backward(loss), adds);
      return this.#beside([loss, ...(this.#parts.length > 0 ? values : [])]);
    } finally {
      this.#adapter.training = undefined;
    }
  }

  /** Numbers as one row. */
  #beside(values: readonly Tensor[]): Tensor {
    const [only] = values;
    if (only && values.length === 1) return view(only, [1, 1]);
    const row = empty(this.#gpu, [1, values.length], "losses");
    values.forEach((value, i) => void putColumns(view(value, [1, 1]), row, i));
    return row;
  }

  /** The plan of such a batch, traced where there is none yet, with the batch in its inputs. */
  #planFor(batch: B, isFirst: boolean, isLast: boolean): Plan {
    const variant = `${isFirst ? " first" : ""}${isLast ? " last" : ""} times ${this.#adapter.factor ?? 1}`;
    return this.#replay.planFor(batch, (inputs) => this.#part(inputs, isFirst, isLast), variant);
  }
}
