import type { Gpu } from "../gpu/gpu.ts";
import { type Inputs, type Loader, Replay } from "./replay.ts";

/** How batches of some kind are put on the device, and what is done with them there. */
interface Pass<B, L> extends Loader<B, L> {
  run(inputs: L): void;
}

/** The same work on batch after batch, outside of training: each shape is traced once and replayed, and all share the memory of the largest. */
export class Replays<B, L extends Inputs<B>> {
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
