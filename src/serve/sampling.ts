/** From logits to the next token. */
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";

export interface SamplingOptions {
  /** 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature). 0 unless given. */
  readonly temperature?: number;
  /** Only so many of the likeliest tokens are drawn; all unless given. */
  readonly topK?: number;
  /** Only the likeliest tokens that together have this share (nucleus sampling, arXiv:1904.09751); 1 unless given. */
  readonly topP?: number;
  /** Only tokens with at least this share of the likeliest one's probability (arXiv:2407.01082); 0 unless given. */
  readonly minP?: number;
  /** Logits of tokens that came before, prompt or answer, are divided by it where positive and multiplied where negative (CTRL, arXiv:1909.05858 §4.1); 1 unless given. */
  readonly repetitionPenalty?: number;
  /** Taken from the logits of tokens that the answer has already. */
  readonly presencePenalty?: number;
  /** Taken from a logit once for each time that the answer has the token. */
  readonly frequencyPenalty?: number;
  /** Added to the logits of these tokens. */
  readonly logitBias?: ReadonlyMap<number, number>;
  readonly seed?: number;
  /** What the answer's text may be. For this answer alone. */
  readonly constraint?: TokenConstraint | undefined;
}

/** Says which tokens one answer may have; it goes along as they are drawn. */
export interface TokenConstraint {
  /** Whether the answer may go on with this token. */
  allows(id: number): boolean;
  /** The answer goes on with this token. */
  accept(id: number): void;
  /** Whether the answer may end here. */
  readonly mayEnd: boolean;
  /** Whether it can do nothing else. */
  readonly isDone: boolean;
}

/** A token and what the model thought of it, before penalties and temperature. */
export interface ScoredToken {
  readonly id: number;
  /** log softmax(logits)[id], in nats. */
  readonly logprob: number;
}

export interface SampledToken extends ScoredToken {
  /** The likeliest tokens, where they were asked for. */
  readonly top: readonly ScoredToken[];
}

function checkSampling(options: SamplingOptions): void {
  const rules: readonly (readonly [keyof SamplingOptions, rule: string, holds: (x: number) => boolean])[] = [
    ["temperature", "a number of at least 0", (x) => x >= 0 && Number.isFinite(x)],
    ["topK", "a whole number of at least 1", (x) => Number.isInteger(x) && x >= 1],
    ["topP", "a number above 0 and at most 1", (x) => x > 0 && x <= 1],
    ["minP", "a number from 0 to 1", (x) => x >= 0 && x <= 1],
    ["repetitionPenalty", "a number above 0", (x) => x > 0 && Number.isFinite(x)],
    ["presencePenalty", "a finite number", Number.isFinite],
    ["frequencyPenalty", "a finite number", Number.isFinite],
  ];
  for (const [name, rule, holds] of rules) {
    const value = options[name] as number | undefined;
    if (value !== undefined && !holds(value)) throw new ShapeError(`generate: ${name} must be ${rule}, got ${value}`);
  }
}

/** Draws the tokens of one answer, one after the other; the same seed draws the same. */
export class Sampler {
  readonly #options: SamplingOptions;
  readonly #random: Random;
  readonly #prompt: ReadonlySet<number>;
  /** How often the answer has each token. */
  readonly #counts = new Map<number, number>();

  readonly #eosIds: readonly number[];

  /** A constraint knows nothing of `eosIds`: they are allowed where the answer may end. Throws ShapeError for settings out of range. */
  constructor(promptIds: readonly number[], options: SamplingOptions = {}, eosIds: readonly number[] = []) {
    checkSampling(options);
    this.#options = options;
    this.#eosIds = eosIds;
    this.#random = new Random(options.seed ?? 0);
    this.#prompt = new Set(promptIds);
  }

  /**
   * The next token by its logits [V], and the `top` likeliest ones with their log-probabilities. With a constraint: the likeliest that is allowed,
   * or one drawn from what the options leave, given that it is allowed; where none of these is, from what they leave of those that are.
   *
   * Throws ShapeError where the constraint allows no token.
   */
  next(logits: Float32Array, top = 0): SampledToken {
    const { temperature = 0, constraint } = this.#options;
    const changed = this.#penalised(logits);
    const allows = (one: number): boolean =>
      !constraint || (this.#eosIds.includes(one) ? constraint.mayEnd : constraint.allows(one));
    const id = temperature === 0 ? argmax(changed, allows) : this.#drawAllowed(changed, allows);
    if (id === undefined)
      throw new ShapeError(
        "generate: the constraint must allow a token of the vocabulary, got none that it allows here. Take a model whose tokens can write any text",
      );
    if (!this.#eosIds.includes(id)) constraint?.accept(id);
    this.#counts.set(id, (this.#counts.get(id) ?? 0) + 1);
    const total = logSumExp(logits);
    const scored = (one: number): ScoredToken => ({ id: one, logprob: (logits[one] ?? Number.NaN) - total });
    return { ...scored(id), top: top === 0 ? [] : largest(logits, top).map(scored) };
  }

  #penalised(logits: Float32Array): Float64Array {
    const { repetitionPenalty = 1, presencePenalty = 0, frequencyPenalty = 0, logitBias = new Map() } = this.#options;
    const changed = new Float64Array(logits);
    const change = (id: number, by: (logit: number) => number): void => {
      if (id < changed.length) changed[id] = by(changed[id] ?? 0);
    };
    if (repetitionPenalty !== 1)
      for (const id of new Set([...this.#prompt, ...this.#counts.keys()]))
        change(id, (logit) => (logit > 0 ? logit / repetitionPenalty : logit * repetitionPenalty));
    for (const [id, count] of this.#counts) change(id, (logit) => logit - presencePenalty - count * frequencyPenalty);
    for (const [id, bias] of logitBias) change(id, (logit) => logit + bias);
    return changed;
  }

  #drawAllowed(logits: Float64Array, allows: (id: number) => boolean): number | undefined {
    let choices = candidates(logits, this.#options);
    // Those refused are struck out, which changes nothing of how the others share; where that would take long, all are looked at.
    for (let n = 0; n < MOST_REFUSED && choices.length > 0; n++) {
      const id = this.#draw(choices);
      if (allows(id)) return id;
      choices = choices.filter((one) => one.id !== id && one.weight > 0);
    }
    choices = choices.filter(({ id }) => allows(id));
    if (choices.length > 0) return this.#draw(choices);
    const allowed = logits.map((logit, id) => (allows(id) ? logit : Number.NEGATIVE_INFINITY));
    return allowed.some((logit) => logit > Number.NEGATIVE_INFINITY)
      ? this.#draw(candidates(allowed, this.#options))
      : undefined;
  }

  #draw(choices: readonly Choice[]): number {
    let left = this.#random.uniform() * choices.reduce((sum, { weight }) => sum + weight, 0);
    for (const { id, weight } of choices) {
      left -= weight;
      if (left < 0) return id;
    }
    return choices.reduce((a, b) => (b.weight > a.weight ? b : a)).id;
  }
}

const MOST_REFUSED = 8;

interface Choice {
  readonly id: number;
  /** In proportion to its probability. */
  readonly weight: number;
}

/** The tokens that may be drawn, by temperature, then top-k, top-p and min-p, each of what the one before left. Ties with the last one stay. */
function candidates(logits: Float64Array, { temperature = 1, topK, topP = 1, minP = 0 }: SamplingOptions): Choice[] {
  const most = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const least =
    topK !== undefined && topK < logits.length ? (logits[largest(logits, topK).at(-1) ?? 0] ?? 0) : undefined;
  let choices: Choice[] = [];
  logits.forEach((logit, id) => {
    if (least === undefined || logit >= least) choices.push({ id, weight: Math.exp((logit - most) / temperature) });
  });
  if (topP < 1) choices = nucleus(choices, topP);
  return minP > 0 ? choices.filter(({ weight }) => weight >= minP) : choices; // the likeliest has weight 1
}

/** The likeliest choices up to the first with which they have the share p. */
function nucleus(choices: readonly Choice[], p: number): Choice[] {
  const total = choices.reduce((sum, { weight }) => sum + weight, 0);
  // All that are below this together have less than 1 − p: none of them is in the nucleus, and the others are few.
  const floor = ((1 - p) * total) / choices.length;
  const likely = choices.filter(({ weight }) => weight >= floor).toSorted((a, b) => b.weight - a.weight);
  let mass = 0;
  const end = likely.findIndex(({ weight }) => {
    mass += weight;
    return mass >= p * total;
  });
  return (end < 0 ? likely : likely.slice(0, end + 1)).toSorted((a, b) => a.id - b.id);
}

/** Index of the largest value that is allowed; the first of equals. Asks only of those above all that were allowed before. */
function argmax(values: ArrayLike<number>, allows: (index: number) => boolean): number | undefined {
  let best: number | undefined;
  for (let i = 0; i < values.length; i++)
    if ((best === undefined || (values[i] ?? 0) > (values[best] ?? 0)) && allows(i)) best = i;
  return best;
}

/** Indices of the n largest values, the largest first. */
export function largest(values: Float32Array | Float64Array, n: number): number[] {
  const kept: number[] = [];
  const valueAt = (i: number): number => values[kept[i] ?? 0] ?? 0;
  values.forEach((value, index) => {
    if (kept.length === n && value <= valueAt(n - 1)) return;
    let at = kept.length;
    while (at > 0 && value > valueAt(at - 1)) at--;
    kept.splice(at, 0, index);
    if (kept.length > n) kept.pop();
  });
  return kept;
}

export function logSumExp(values: Float32Array): number {
  const most = values.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  return most + Math.log(values.reduce((sum, x) => sum + Math.exp(x - most), 0));
}
