/** What is known of each step: when it was sent, and when the device is done. */
import { ShapeError } from "../tensor/errors.ts";
import { MOST_BAD_STEPS, type StepResult } from "./step-ring.ts";
import type { Evaluated } from "./validation.ts";

/** One row of `metrics.jsonl`. */
export interface StepMetrics {
  /** From 1. */
  readonly step: number;
  /** Mean over all target tokens of the optimizer step, in nats, or over what else the task has. */
  readonly loss: number;
  /** See `StepResult`. */
  readonly losses?: Readonly<Record<string, number>>;
  readonly learning_rate: number;
  /** Global norm of the gradient, before clipping. */
  readonly grad_norm: number;
  /** Tokens that went through the model, padding not counted. */
  readonly tokens: number;
  readonly tokens_per_second: number;
  /** True where the update was not made: loss or norm were not finite, or there was nothing to learn. */
  readonly skipped: boolean;
  /** What the evaluation after this step gave, and whether its loss is the lowest so far. */
  readonly validation?: Evaluated & { readonly best: boolean };
}

/** Of a step on its way. */
export interface Sent {
  readonly rate: number;
  readonly tokens: number;
}

/** Puts together what was known of each step when it was sent and what the device made of it. */
export class StepCounts {
  readonly #sent: Sent[] = [];
  #since = performance.now();
  #bad: number;

  /** `bad`: steps in a row that were not finite, of the run that goes on. */
  constructor(bad = 0) {
    this.#bad = bad;
  }

  sent(step: Sent): void {
    this.#sent.push(step);
  }

  /** `evaluate` is called after the last of the steps. Throws ShapeError at the last of too many steps in a row that were not finite. */
  async *metrics(
    results: readonly StepResult[],
    evaluate?: () => Promise<StepMetrics["validation"]>,
  ): AsyncGenerator<StepMetrics> {
    const sent = this.#sent.splice(0, results.length);
    const now = performance.now();
    const perSecond = sent.reduce((sum, { tokens }) => sum + tokens, 0) / ((now - this.#since) / 1000);
    this.#since = now;
    for (const [i, { step, loss, losses, gradNorm, updated }] of results.entries()) {
      const { rate = 0, tokens = 0 } = sent[i] ?? {};
      const validation = i === results.length - 1 ? await evaluate?.() : undefined;
      if (validation) this.#since = performance.now();
      yield {
        step,
        loss,
        ...(losses && { losses }),
        learning_rate: rate,
        grad_norm: gradNorm,
        tokens,
        tokens_per_second: perSecond,
        skipped: !updated,
        ...(validation && { validation }),
      };
      const isSound = Number.isFinite(loss) && Number.isFinite(gradNorm);
      if (updated) this.#bad = 0;
      else if (!isSound) this.#bad++;
      if (!isSound && this.#bad === MOST_BAD_STEPS)
        throw new ShapeError(
          `train: loss and gradient norm must stay finite, got ${loss} and ${gradNorm} at step ${step}, the last of ${MOST_BAD_STEPS} such steps in a row. The parameters are those of step ${step - MOST_BAD_STEPS}. Use a lower learning rate or a maxGradNorm`,
        );
    }
  }
}
