/** A training step of several adapters whose rows go through one base together. */
import { backward } from "../autograd/engine.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { Plan } from "../gpu/plan.ts";
import { scale as scaled } from "../kernels/axpy.ts";
import { copyTo, takeColumns } from "../kernels/copy-rows.ts";
import { reduce } from "../kernels/reduce.ts";
import { ShapeError } from "../tensor/errors.ts";
import { type Tensor, view } from "../tensor/tensor.ts";
import { AdamW, type AdamWSettings } from "./adamw.ts";
import { type Batch, stackBatches } from "./batches.ts";
import { batchInputs, batchLosses, type Inputs, type LanguageModel, shapeKey, writeInputs } from "./loss.ts";
import { Replay } from "./replay.ts";
import { type StepResult, StepRing } from "./step-ring.ts";

/** Adapters that compute in one batch, seen from training: a `SharedBase`. */
export interface SharesBase {
  readonly adapters: readonly { readonly parameters: readonly Tensor[]; enable(): void; disable(): void }[];
  /** Runs f, in which a batch has so many rows of each adapter, those of the first one first. */
  during<T>(rows: readonly number[], f: () => T): T;
}

/** How an adapter of the step is trained. */
export interface LaneSettings extends AdamWSettings {
  /** All of the adapter's unless given. */
  readonly parameters?: readonly Tensor[];
}

export interface LaneStepOptions {
  readonly model: LanguageModel;
  readonly shared: SharesBase;
  /** In the order of the adapters. */
  readonly lanes: readonly LaneSettings[];
  /** Of all lanes: see `LanguageSettings`. */
  readonly labelSmoothing?: number | undefined;
  /** See `TrainingStepOptions`. */
  readonly eager?: boolean;
}

/** What an adapter does in a step. */
export interface LaneWork {
  readonly batch: Batch;
  readonly learningRate: number;
}

/** Of each lane; undefined where it takes no part. */
type Batches = readonly (Batch | undefined)[];

interface LaneInputs {
  readonly inputs: Inputs;
  readonly tensors: readonly Tensor[];
  write(batches: Batches): void;
  /** Of each lane: rows, and `Batch.targets`. */
  readonly rows: readonly number[];
  readonly targets: readonly number[];
}

interface Lane {
  readonly optimizer: AdamW;
  readonly ring: StepRing;
  // What varies from step to step.
  scale: number;
  learningRate: number;
}

/**
 * One forward and one backward pass of all lanes' rows, and for each lane what `TrainingStep` has: a loss that is the mean over its own targets, a
 * norm, a clip factor, a word on whether it counts, an update. Each lane comes out as if it were trained alone, up to the order of sums. Traced once per
 * shape of batch and replayed.
 */
export class LaneStep {
  readonly #gpu: Gpu;
  readonly #model: LanguageModel;
  readonly #shared: SharesBase;
  readonly #labelSmoothing: number | undefined;
  readonly #eager: boolean;
  readonly #lanes: readonly Lane[];
  readonly #replay: Replay<Batches, LaneInputs>;

  /** Throws ShapeError unless there are settings for each adapter. */
  constructor({ model, shared, lanes, labelSmoothing, eager = false }: LaneStepOptions) {
    if (lanes.length !== shared.adapters.length)
      throw new ShapeError(
        `LaneStep: each adapter needs settings, got ${lanes.length} for ${shared.adapters.length} adapters`,
      );
    this.#gpu = model.gpu;
    this.#model = model;
    this.#shared = shared;
    this.#labelSmoothing = labelSmoothing;
    this.#eager = eager;
    this.#lanes = lanes.map(({ parameters, ...settings }, i) => ({
      optimizer: new AdamW(parameters ?? shared.adapters[i]?.parameters ?? [], settings),
      ring: new StepRing(model.gpu),
      ...{ scale: 1, learningRate: 0 },
    }));
    this.#replay = new Replay(model.gpu, {
      key: (batches) => batches.map((batch) => (batch ? shapeKey(batch) : "none")).join(", "),
      load: (batches, room) => this.#load(batches, room),
    });
  }

  /** Of each lane. */
  get optimizers(): readonly AdamW[] {
    return this.#lanes.map(({ optimizer }) => optimizer);
  }

  /** Plans traced so far. */
  get plans(): ReadonlyMap<string, Plan> {
    return this.#replay.plans;
  }

  /** Bytes that the plans share for what lives within a step. */
  get workspaceBytes(): number {
    return this.#replay.workspaceBytes;
  }

  /** Takes the memory of a step on such batches now, each lane's as large as any of its run: see `TrainingStep.reserve`. */
  reserve(batches: Batches): void {
    if (this.#eager) return;
    this.#replay.reserve(batches);
    this.#planFor(batches);
  }

  /**
   * Sends one step of the lanes that have work, whose batches are of one length, a multiple of 16. The others stay as they are. Results stay on
   * the device until `read`, which has to come within 64 steps. Throws ShapeError where there is no work, or batches do not fit.
   */
  run(work: readonly (LaneWork | undefined)[]): void {
    const batches = this.#lanes.map((_, i) => work[i]?.batch);
    demandFit(batches);
    for (const [i, lane] of this.#lanes.entries()) {
      const one = work[i];
      if (!one) continue;
      lane.ring.begin();
      lane.optimizer.stepCount++;
      lane.scale = one.batch.tokens > 0 ? 1 / one.batch.tokens : 0;
      lane.learningRate = one.learningRate;
    }
    if (this.#eager) {
      const inputs = this.#replay.inputsFor(batches);
      this.#gpu.scope(() => this.#encode(inputs));
      this.#gpu.flush();
    } else this.#planFor(batches).run();
  }

  /** The results of each lane's steps since the last `read`, once they are done. */
  read(): Promise<StepResult[][]> {
    return Promise.all(this.#lanes.map(({ ring }) => ring.read()));
  }

  /** Frees plans, workspace and optimizers. */
  destroy(): void {
    this.#replay.destroy();
    for (const { ring, optimizer } of this.#lanes) {
      ring.destroy();
      optimizer.destroy();
    }
  }

  #planFor(batches: Batches): Plan {
    return this.#replay.planFor(batches, (inputs) => this.#encode(inputs));
  }

  #load(batches: Batches, room: readonly Tensor[] | undefined): LaneInputs {
    const joined = (of: Batches): Batch => stackBatches(of.filter((batch) => batch !== undefined));
    const inputs = batchInputs(this.#gpu, joined(batches), room);
    return {
      ...{ inputs, tensors: inputs.tensors },
      write: (next) => writeInputs(inputs, joined(next)),
      rows: batches.map((batch) => batch?.B ?? 0),
      targets: batches.map((batch) => batch?.targets.length ?? 0),
    };
  }

  /** Losses and gradients are sums over the targets: a lane's are multiplied by its own scale afterwards. */
  #encode({ inputs, rows, targets }: LaneInputs): void {
    const { gradients, losses } = this.#shared.during(rows, () => {
      const sums = batchLosses(this.#model, inputs, 1, { labelSmoothing: this.#labelSmoothing });
      return { gradients: backward(sums.loss), losses: view(sums.losses, [1, sums.losses.size]) };
    });
    let end = 0;
    for (const [i, lane] of this.#lanes.entries()) {
      const count = targets[i] ?? 0;
      if (count === 0) continue;
      end += count;
      const { optimizer, ring } = lane;
      const loss = reduce("sum", takeColumns(losses, end - count, count));
      copyTo(
        scaled(loss, () => lane.scale),
        ring.losses,
      );
      optimizer.take(gradients);
      const clip = optimizer.norm(() => lane.scale);
      ring.record(clip, () => lane.scale);
      optimizer.update(clip, () => lane.learningRate);
    }
  }
}

function demandFit(batches: Batches): void {
  const lengths = new Set(batches.flatMap((batch) => batch?.T ?? []));
  const [length = 0] = lengths;
  if (lengths.size !== 1 || length % 16 !== 0)
    throw new ShapeError(
      `LaneStep: a step needs batches of one length, a multiple of 16, got ${lengths.size === 0 ? "none" : [...lengths].join(" and ")}`,
    );
}
