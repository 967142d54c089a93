/** Evaluation during training: which step was the best, and when to stop. */
import { ShapeError } from "../tensor/errors.ts";

/** What an evaluation gives: its loss is what counts. */
export interface Evaluated {
  readonly loss: number;
  /** Share of what was right: tokens, rows or pairs. */
  readonly accuracy?: number;
}

export interface Validation<E extends Evaluated = Evaluated> {
  /** Evaluates after every so many steps, and after the last. */
  readonly every: number;
  /** Measures what is trained as it stands, such as by `evaluate`. */
  readonly evaluate: () => Promise<E>;
  /** Training ends after so many evaluations in a row whose loss was not below the best. */
  readonly patience?: number | undefined;
}

export interface BestSoFar {
  readonly step: number;
  readonly loss: number;
  /** Evaluations since. */
  readonly since: number;
}

/** Follows the evaluations of a run. */
export class EarlyStopping {
  best: BestSoFar | undefined;
  readonly #validation: Validation | undefined;

  /** `best`: of the run that goes on. Throws ShapeError for settings out of range. */
  constructor(validation: Validation | undefined, best: BestSoFar | undefined) {
    const { every = 1, patience = 1 } = validation ?? {};
    for (const [name, n] of Object.entries({ every, patience }))
      if (!Number.isInteger(n) || n < 1)
        throw new ShapeError(`train: ${name} of the validation must be a whole number of at least 1, got ${n}`);
    this.#validation = validation;
    this.best = best;
  }

  /** Whether the patience is at its end. */
  get isOver(): boolean {
    return (this.best?.since ?? 0) >= (this.#validation?.patience ?? Number.POSITIVE_INFINITY);
  }

  isDue(step: number, steps: number): boolean {
    return this.#validation !== undefined && (step % this.#validation.every === 0 || step === steps);
  }

  /** Evaluates after this step. A loss that is not a number is never the best. */
  async evaluate(step: number): Promise<(Evaluated & { readonly best: boolean }) | undefined> {
    if (!this.#validation) return undefined;
    const evaluated = await this.#validation.evaluate();
    const isBest = evaluated.loss < (this.best?.loss ?? Number.POSITIVE_INFINITY);
    const { step: at = 0, loss = Number.MAX_VALUE, since = 0 } = this.best ?? {};
    this.best = isBest ? { step, loss: evaluated.loss, since: 0 } : { step: at, loss, since: since + 1 };
    return { ...evaluated, best: isBest };
  }
}
