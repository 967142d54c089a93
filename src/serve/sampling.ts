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

  #penalised(logits: Float32Array): Float32Array | Float64Array {
    const { repetitionPenalty = 1, presencePenalty = 0, frequencyPenalty = 0, logitBias = new Map() } = this.#options;
    if (repetitionPenalty === 1 && presencePenalty === 0 && frequencyPenalty === 0 && logitBias.size === 0)
      return logits;
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

  #drawAllowed(logits: Float32Array | Float64Array, allows: (id: number) => boolean): number | undefined {
    let choices = candidates(logits, this.#options);
    // Those refused are struck out, which changes nothing of how the others share; where that would take long, all are looked at.
    for (let n = 0; n < MOST_REFUSED && choices.ids.length > 0; n++) {
      const id = this.#draw(choices);
      if (allows(id)) return id;
      choices = keep(choices, (one, weight) => one !== id && weight > 0);
    }
    choices = keep(choices, allows);
    if (choices.ids.length > 0) return this.#draw(choices);
    const allowed = logits.map((logit, id) => (allows(id) ? logit : Number.NEGATIVE_INFINITY));
    return allowed.some((logit) => logit > Number.NEGATIVE_INFINITY)
      ? this.#draw(candidates(allowed, this.#options))
      : undefined;
  }

  #draw({ ids, weights }: Choices): number {
    let left = this.#random.uniform() * sum(weights);
    let best = 0;
    for (let i = 0; i < weights.length; i++) {
      const weight = weights[i] as number;
      left -= weight;
      if (left < 0) return ids[i] as number;
      if (weight > (weights[best] as number)) best = i;
    }
    return ids[best] as number;
  }
}

const MOST_REFUSED = 8;

/** Tokens by id: flat, as there may be 150,000 of them for each row and step. */
interface Choices {
  readonly ids: Int32Array;
  /** In proportion to their probabilities. */
  readonly weights: Float64Array;
}

function keep({ ids, weights }: Choices, holds: (id: number, weight: number) => boolean): Choices {
  const kept = { ids: new Int32Array(ids.length), weights: new Float64Array(ids.length) };
  let n = 0;
  for (let i = 0; i < ids.length; i++) {
    if (!holds(ids[i] as number, weights[i] as number)) continue;
    kept.ids[n] = ids[i] as number;
    kept.weights[n] = weights[i] as number;
    n++;
  }
  return { ids: kept.ids.subarray(0, n), weights: kept.weights.subarray(0, n) };
}

function sum(values: Float64Array): number {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i] as number;
  return total;
}

function greatest(values: Float32Array | Float64Array): number {
  let most = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < values.length; i++) most = Math.max(most, values[i] as number);
  return most;
}

/** The tokens that may be drawn, by temperature, then top-k, top-p and min-p, each of what the one before left. Ties with the last one stay. */
function candidates(
  logits: Float32Array | Float64Array,
  { temperature = 1, topK, topP = 1, minP = 0 }: SamplingOptions,
): Choices {
  const most = greatest(logits);
  const least = topK !== undefined && topK < logits.length ? logits[largest(logits, topK).at(-1) ?? 0] : undefined;
  let choices: Choices = { ids: new Int32Array(logits.length), weights: Float64Array.from(logits) };
  for (let id = 0; id < logits.length; id++) choices.ids[id] = id;
  if (least !== undefined) choices = keep(choices, (_, logit) => logit >= least);
  choices = { ...choices, weights: choices.weights.map((logit) => Math.exp((logit - most) / temperature)) };
  if (topP < 1) choices = nucleus(choices, topP);
  return minP > 0 ? keep(choices, (_, weight) => weight >= minP) : choices; // the likeliest has weight 1
}

/** The likeliest choices up to the first with which they have the share p. */
function nucleus(choices: Choices, p: number): Choices {
  const total = sum(choices.weights);
  // All that are below this together have less than 1 − p: none of them is in the nucleus, and the others are few.
  const floor = ((1 - p) * total) / choices.ids.length;
  const likely = keep(choices, (_, weight) => weight >= floor);
  const order = Array.from(likely.ids.keys()).sort(
    (a, b) => (likely.weights[b] as number) - (likely.weights[a] as number),
  );
  let mass = 0;
  const end = order.findIndex((i) => {
    mass += likely.weights[i] as number;
    return mass >= p * total;
  });
  const inside = new Set((end < 0 ? order : order.slice(0, end + 1)).map((i) => likely.ids[i]));
  return keep(likely, (id) => inside.has(id));
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
  for (let index = 0; index < values.length; index++) {
    const value = values[index] as number;
    if (kept.length === n && value <= valueAt(n - 1)) continue;
    let at = kept.length;
    while (at > 0 && value > valueAt(at - 1)) at--;
    kept.splice(at, 0, index);
    if (kept.length > n) kept.pop();
  }
  return kept;
}

export function logSumExp(values: Float32Array): number {
  const most = greatest(values);
  let total = 0;
  for (let i = 0; i < values.length; i++) total += Math.exp((values[i] as number) - most);
  return most + Math.log(total);
}
