import type { Gpu } from "../gpu/gpu.ts";
import type { Plan } from "../gpu/plan.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** How batches of some kind are put on the device, and what is done with them there. */
interface Pass<B, I> {
  /** Batches with the same key have inputs of the same shapes. */
  key(batch: B): string;
  /** With `room`, the tensors of a batch no smaller, in their memory. */
  load(batch: B, room?: readonly Tensor[]): I;
  /** Puts another batch of the same shape in its place. */
  write(inputs: I, batch: B): void;
  run(inputs: I): void;
}

/** The same work on batch after batch, outside of training: each shape is traced once and replayed, and all share the memory of the largest. */
export class Replays<B, I extends { readonly tensors: readonly Tensor[] }> {
  readonly #gpu: Gpu;
  readonly #pass: Pass<B, I>;
  readonly #shapes = new Map<string, { readonly inputs: I; readonly plan: Plan }>();
  readonly #workspace: GPUBuffer[] = [];

  /** Takes the memory for all: no batch may need more than `largest`. */
  constructor(gpu: Gpu, pass: Pass<B, I>, largest: B) {
    this.#gpu = gpu;
    this.#pass = pass;
    this.#shapeOf(largest);
  }

  /** Sends the work on this batch. The inputs it was given. */
  run(batch: B): I {
    const { inputs, plan } = this.#shapeOf(batch);
    plan.run();
    return inputs;
  }

  destroy(): void {
    for (const { inputs, plan } of this.#shapes.values()) {
      this.#gpu.release(...inputs.tensors);
      plan.destroy();
    }
    this.#gpu.release(...this.#workspace.map((buffer) => ({ buffer })));
  }

  #shapeOf(batch: B): { readonly inputs: I; readonly plan: Plan } {
    const key = this.#pass.key(batch);
    const known = this.#shapes.get(key);
    if (known) {
      this.#pass.write(known.inputs, batch);
      return known;
    }
    const [largest] = this.#shapes.values();
    const inputs = this.#pass.load(batch, largest?.inputs.tensors);
    const made = { inputs, plan: this.#gpu.trace(() => this.#pass.run(inputs), this.#workspace) };
    this.#shapes.set(key, made);
    return made;
  }
}
