import type { HubProgress } from "../hub.ts";
import type { StepMetrics } from "../train/step-metrics.ts";
import type { Evaluated } from "../train/validation.ts";
import { bytes, duration, number, say } from "./session.ts";

/** Shows a training run: one line that renews itself on a terminal, about twenty lines on a pipe. */
export class Progress {
  readonly #steps: number;
  readonly #every: number;
  readonly #started: number = performance.now();
  readonly #done: number;
  readonly #losses: number[] = [];
  /** Whether a line on the terminal waits to be renewed. */
  #isOpen = false;

  /** `done`: steps of the run that it goes on from. */
  constructor(steps: number, done = 0) {
    this.#steps = steps;
    this.#done = done;
    this.#every = Math.max(1, Math.ceil(steps / 20));
  }

  show({ step, loss, grad_norm, tokens_per_second, skipped, validation }: StepMetrics): void {
    const left = ((performance.now() - this.#started) / 1000 / (step - this.#done)) * (this.#steps - step);
    const valid = validation
      ? `  validation ${evaluatedLine(validation)}${validation.best ? ", the best so far" : ""}`
      : "";
    const line = `step ${step}/${this.#steps}  loss ${loss.toFixed(4)}${valid}  ${number(tokens_per_second)} tokens/s  ${duration(left)} left${skipped ? `, ${Number.isFinite(loss + grad_norm) ? "nothing to learn" : "not finite"}: no update` : ""}`;
    if (Number.isFinite(loss)) this.#losses.push(loss);
    if (process.stderr.isTTY) {
      process.stderr.write(`\r\x1b[K${sparkline(this.#losses)}  ${line}${validation ? "\n" : ""}`);
      this.#isOpen = !validation;
    } else if (skipped || validation || step === this.#done + 1 || step % this.#every === 0 || step === this.#steps)
      say(line);
  }

  /** Leaves the line as it stands; what is said next starts below it. */
  end(): void {
    if (this.#isOpen) process.stderr.write("\n");
    this.#isOpen = false;
  }
}

/** Four digits after the point; JSON has null for a number that is not finite. */
export const fixed = (loss: number | null | undefined): string => loss?.toFixed(4) ?? "none";

/** "loss 2.1034, accuracy 51.2 %" */
export const evaluatedLine = ({ loss, accuracy }: Evaluated): string =>
  `loss ${fixed(loss)}${accuracy === undefined ? "" : `, accuracy ${number(100 * accuracy, 1)} %`}`;

const BARS = "▁▂▃▄▅▆▇█";

/** The course of some numbers in at most `width` bars, each the mean of its share of them. */
export function sparkline(values: readonly number[], width = 16): string {
  const bars = Math.min(width, values.length);
  const means = Array.from({ length: bars }, (_, i) => {
    const part = values.slice(Math.floor((i * values.length) / bars), Math.floor(((i + 1) * values.length) / bars));
    return part.reduce((a, b) => a + b, 0) / part.length;
  });
  const [low, high] = [Math.min(...means), Math.max(...means)];
  const levels = BARS.length - 1;
  return means.map((mean) => BARS[high > low ? Math.round((levels * (mean - low)) / (high - low)) : 0]).join("");
}

/** Shows a download: a bar on a terminal, on a pipe one line that says it has begun. */
export class DownloadProgress {
  readonly #name: string;
  readonly #started: number = performance.now();
  #shown: number | undefined;
  #before = 0;

  constructor(name: string) {
    this.#name = name;
  }

  show({ done, size }: HubProgress): void {
    const now = performance.now();
    if (this.#shown === undefined) {
      this.#before = done;
      say(`downloading ${this.#name} from the Hugging Face Hub`);
    } else if (now - this.#shown < 100 && done < size) return;
    this.#shown = now;
    if (!process.stderr.isTTY) return;
    const filled = Math.round((20 * done) / Math.max(1, size));
    const rate = (done - this.#before) / ((now - this.#started) / 1000);
    const left = rate > 0 ? `, ${duration((size - done) / rate)} left` : "";
    process.stderr.write(
      `\r\x1b[K[${"=".repeat(filled).padEnd(20)}] ${bytes(done)} of ${bytes(size)}, ${bytes(Math.max(0, rate))}/s${left}`,
    );
  }

  /** Leaves the bar as it stands; what is said next starts below it. */
  end(): void {
    if (this.#shown !== undefined && process.stderr.isTTY) process.stderr.write("\n");
  }
}
