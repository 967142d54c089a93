/** Steps that are encoded once per shape of batch and then replayed. */
import type { Gpu } from "../gpu/gpu.ts";
import type { Plan } from "../gpu/plan.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** What a batch is on the device, and how it gets there. */
export interface Loader<B, L> {
  /** Batches with the same key have inputs of the same shapes. */
  key(batch: B): string;
  /** With `room`, the tensors of a batch no smaller, in their memory, as far as it can. */
  load(batch: B, room?: readonly Tensor[]): L;
}

export interface Inputs<B> {
  /** All of it that has memory of its own, to be released. */
  readonly tensors: readonly Tensor[];
  /** Puts another batch of the same shape in its place. */
  write(batch: B): void;
}

/** Plans of so many shapes are kept. */
const MOST_PLANS = 64;

/** Inputs and plans of a step by the shape of its batch. All plans share one workspace. */
export class Replay<B, L extends Inputs<B>> {
  readonly #gpu: Gpu;
  readonly #loader: Loader<B, L>;
  readonly #workspace: GPUBuffer[] = [];
  readonly #inputs = new Map<string, L>();
  readonly #plans = new Map<string, Plan>();
  /** Where batches are put: into the tensors of the largest. */
  #room: readonly Tensor[] | undefined;

  constructor(gpu: Gpu, loader: Loader<B, L>) {
    this.#gpu = gpu;
    this.#loader = loader;
  }

  /** Plans traced so far. */
  get plans(): ReadonlyMap<string, Plan> {
    return this.#plans;
  }

  /** Bytes that the plans share for what lives within a step. */
  get workspaceBytes(): number {
    return this.#workspace.reduce((sum, { size }) => sum + size, 0);
  }

  /** Takes the memory of this batch, in which those that follow lie, too: none may be larger. */
  reserve(largest: B): void {
    this.#room = this.inputsFor(largest).tensors;
  }

  /** The plan of such a batch, traced where there is none yet, with the batch in its inputs. `variant` tells steps of one shape apart. */
  planFor(batch: B, encode: (inputs: L) => void, variant = ""): Plan {
    return this.#planOf(batch, this.inputsFor(batch), encode, variant);
  }

  /** Sends the work on this batch. The inputs it was given. */
  run(batch: B, encode: (inputs: L) => void): L {
    const inputs = this.inputsFor(batch);
    this.#planOf(batch, inputs, encode, "").run();
    return inputs;
  }

  #planOf(batch: B, inputs: L, encode: (inputs: L) => void, variant: string): Plan {
    const key = `${this.#loader.key(batch)}${variant}`;
    const plan = this.#plans.get(key) ?? this.#gpu.trace(() => encode(inputs), this.#workspace);
    this.#plans.delete(key); // and to the end: the first is the one that was not used for longest
    this.#plans.set(key, plan);
    this.#forgetOld();
    return plan;
  }

  /** The batch on the device, in place of the last one of its shape. */
  inputsFor(batch: B): L {
    const shape = this.#loader.key(batch);
    const known = this.#inputs.get(shape);
    if (known) {
      known.write(batch);
      return known;
    }
    const made = this.#loader.load(batch, this.#room);
    this.#inputs.set(shape, made);
    return made;
  }

  destroy(): void {
    for (const plan of this.#plans.values()) plan.destroy();
    for (const inputs of this.#inputs.values()) this.#gpu.release(...inputs.tensors);
    this.#gpu.release(...this.#workspace.map((buffer) => ({ buffer })));
  }

  #forgetOld(): void {
    const [oldest] = this.#plans;
    if (this.#plans.size <= MOST_PLANS || !oldest) return;
    this.#plans.delete(oldest[0]);
    oldest[1].destroy();
  }
}

/** How batches of some kind are put on the device, and what is done with them there. */
interface Pass<B, L> extends Loader<B, L> {
  run(inputs: L): void;
}

/** The same work on batch after batch, outside of training: each shape is traced once and replayed, and all share the memory of the largest. */
export class ReplayedPass<B, L extends Inputs<B>> {
  readonly #pass: Pass<B, L>;
  readonly #replay: Replay<B, L>;

  /** Takes the memory for all: no batch may need more than `largest`. */
  constructor(gpu: Gpu, pass: Pass<B, L>, largest: B) {
    this.#pass = pass;
    this.#replay = new Replay(gpu, pass);
    this.#replay.reserve(largest);
    this.#replay.planFor(largest, pass.run);
  }

  /** Sends the work on this batch. The inputs it was given. */
  run(batch: B): L {
    return this.#replay.run(batch, this.#pass.run);
  }

  destroy(): void {
    this.#replay.destroy();
  }
}
