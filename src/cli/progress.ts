import type { StepMetrics } from "../train/trainer.ts";
import { duration, number, say } from "./session.ts";

/** Shows a training run: one line that renews itself on a terminal, about twenty lines on a pipe. */
export class Progress {
  readonly #steps: number;
  readonly #every: number;
  readonly #started: number = performance.now();

  constructor(steps: number) {
    this.#steps = steps;
    this.#every = Math.max(1, Math.ceil(steps / 20));
  }

  show({ step, loss, tokens_per_second, skipped }: StepMetrics): void {
    const left = ((performance.now() - this.#started) / 1000 / step) * (this.#steps - step);
    const line = `step ${step}/${this.#steps}  loss ${loss.toFixed(4)}  ${number(tokens_per_second)} tokens/s  ${duration(left)} left${skipped ? ", not finite: no update" : ""}`;
    if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${line}`);
    else if (skipped || step === 1 || step % this.#every === 0 || step === this.#steps) say(line);
  }

  /** Leaves the line as it stands; what is said next starts below it. */
  end(): void {
    if (process.stderr.isTTY) process.stderr.write("\n");
  }
}
