/** What steps noted on the device, until it is read. */
import type { Gpu } from "../gpu/gpu.ts";
import { recordStep, ringSize, slotSize } from "../kernels/record-step.ts";
import { ShapeError } from "../tensor/errors.ts";
import { read, type Tensor, tensor } from "../tensor/tensor.ts";

/** What one step noted on the device. */
export interface StepResult {
  /** From 1. */
  readonly step: number;
  /** Mean over all target tokens, in nats, or over what else the task has. */
  readonly loss: number;
  /** The losses it is the weighted sum of, by name, where there are several. */
  readonly losses?: Readonly<Record<string, number>>;
  /** Global norm of the gradient, before clipping. */
  readonly gradNorm: number;
  /** False where the update was not made: loss or norm were not finite, or the batches had nothing to learn. */
  readonly updated: boolean;
}

/** Steps whose results the device keeps until they are read. */
export const MOST_UNREAD_STEPS = 64;
/** So many steps in a row that are not finite end the updates. */
export const MOST_BAD_STEPS = 5;

/** Results of the steps of one optimizer. */
export class StepRing {
  /** Where the loss of a step goes, and behind it its parts, [1,n]. */
  readonly losses: Tensor;
  readonly #parts: readonly string[];
  readonly #ring: Tensor;
  #sent = 0;
  #read = 0;

  /** `parts` are the names of the losses that the loss is the sum of; none unless there are several. */
  constructor(gpu: Gpu, parts: readonly string[] = []) {
    this.#parts = parts;
    const count = 1 + parts.length;
    this.losses = tensor(gpu, new Float32Array(count), [1, count]);
    this.#ring = tensor(gpu, new Int32Array(ringSize(MOST_UNREAD_STEPS, count)), [ringSize(MOST_UNREAD_STEPS, count)]);
  }

  /** Counts a step. Throws ShapeError where the device has as many results as it can keep. */
  begin(): void {
    if (this.#sent - this.#read >= MOST_UNREAD_STEPS)
      throw new ShapeError(
        `TrainingStep: results of ${MOST_UNREAD_STEPS} steps are kept, got a step more. Read them first`,
      );
    this.#sent++;
  }

  /** Notes the losses that are there and the norm, and whether the update is made: see `recordStep`. A step whose `scale` is 0 has nothing to learn. */
  record(clip: Tensor, scale: () => number): void {
    const mostBad = (): number => (scale() > 0 ? MOST_BAD_STEPS : 0);
    recordStep(this.losses, clip, this.#ring, () => (this.#sent - 1) % MOST_UNREAD_STEPS, mostBad);
  }

  /** The results of the steps since the last `read`, once they are done. The steps that follow may be sent meanwhile. */
  async read(): Promise<StepResult[]> {
    const [from, to] = [this.#read, this.#sent];
    this.#read = to;
    if (from === to) return [];
    const [bytes = new ArrayBuffer(0)] = await this.#ring.gpu.read([this.#ring]);
    const [bits, floats] = [new Int32Array(bytes), new Float32Array(bytes)];
    return Array.from({ length: to - from }, (_, i) => {
      const at = slotSize(this.losses.size) * (1 + ((from + i) % MOST_UNREAD_STEPS));
      const number = (j: number): number => floats[at + j] ?? Number.NaN;
      const losses = Object.fromEntries(this.#parts.map((name, part) => [name, number(3 + part)]));
      return {
        step: from + i + 1,
        loss: number(2),
        gradNorm: number(0),
        updated: bits[at + 1] === 1,
        ...(this.#parts.length > 0 && { losses }),
      };
    });
  }

  /** Steps in a row, up to the last, that were not finite. */
  async badSteps(): Promise<number> {
    const [count = 0] = await read(this.#ring);
    return count;
  }

  /** Goes on behind step `stepCount`. */
  restore(stepCount: number, badSteps: number): void {
    this.#sent = stepCount;
    this.#read = stepCount;
    this.#ring.gpu.write(this.#ring, Int32Array.of(badSteps));
  }

  destroy(): void {
    this.#ring.gpu.release(this.losses, this.#ring);
  }
}
