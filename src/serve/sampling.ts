/** From logits to the next token. */
import { TOP } from "../kernels/top-logits.ts";
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { largest, type RowChoices, rowOf, sum, weightsOf } from "./row-choices.ts";

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
  /** Another one that is where this one is now. */
  fork(): TokenConstraint;
}

export const noTokenAllowed = (): ShapeError =>
  new ShapeError(
    "generate: the constraint must allow a token of the vocabulary, got none that it allows here. Take a model whose tokens can write any text",
  );

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

/**
 * Draws the tokens of one answer, one after the other; the same seed draws the same.
 *
 * A draw walks along the row's choices and then along all others by id, so that it is the same whether the row was read back or not.
 */
export class Sampler {
  /** What `RowChoices.temperedRest` is to be for: the options' own, or 1 where nothing is drawn. */
  readonly temperature: number;
  readonly #options: SamplingOptions;
  readonly #random: Random;
  readonly #prompt: ReadonlySet<number>;
  /** How often the answer has each token. */
  readonly #counts = new Map<number, number>();
  readonly #eosIds: readonly number[];
  /** Whether logits are changed, and whether they may be raised. */
  readonly #changes: boolean;
  readonly #raises: boolean;
  /** Drawn for the token that is being chosen, and how many of them were used in this attempt. */
  readonly #uniforms: number[] = [];
  #used = 0;

  /** A constraint knows nothing of `eosIds`: they are allowed where the answer may end. Throws ShapeError for settings out of range. */
  constructor(promptIds: readonly number[], options: SamplingOptions = {}, eosIds: readonly number[] = []) {
    checkSampling(options);
    const { repetitionPenalty = 1, presencePenalty = 0, frequencyPenalty = 0, logitBias = new Map() } = options;
    const biases = [...logitBias.values()];
    this.#changes = repetitionPenalty !== 1 || presencePenalty !== 0 || frequencyPenalty !== 0 || biases.length > 0;
    this.#raises =
      repetitionPenalty < 1 || presencePenalty < 0 || frequencyPenalty < 0 || biases.some((bias) => !(bias <= 0));
    this.temperature = options.temperature || 1;
    this.#options = options;
    this.#eosIds = eosIds;
    this.#random = new Random(options.seed ?? 0);
    this.#prompt = new Set(promptIds);
  }

  /** Whether the next token cannot be told without its whole row: worth to know before anything is read. */
  needsRow(top = 0): boolean {
    const { temperature = 0, topK } = this.#options;
    const isOfFew = temperature === 0 || (topK === undefined ? !this.#changes : topK < TOP);
    return this.#raises || top > TOP || !isOfFew;
  }

  /**
   * The next token, and the `top` likeliest ones with their log-probabilities; undefined where it takes the whole row and `choices` has none: to be
   * asked again then. With a constraint: the likeliest that is allowed, or one drawn from what the options leave, given that it is allowed; where
   * none of these is, from what they leave of those that are.
   *
   * Throws ShapeError where the constraint allows no token.
   */
  next(choices: RowChoices, top = 0): SampledToken | undefined {
    const { row = choices.isAll ? rowOf(choices) : undefined } = choices;
    if (top > TOP && !row) return undefined;
    const known = this.#likeliest(choices);
    const id = (known && this.#choose(known)) ?? (row && this.#chooseOfAll(row, choices));
    if (id === undefined) {
      if (!row) return undefined;
      throw noTokenAllowed();
    }
    this.#uniforms.length = 0;
    if (!this.#eosIds.includes(id)) this.#options.constraint?.accept(id);
    this.#counts.set(id, (this.#counts.get(id) ?? 0) + 1);
    const { ids, logits, rest } = choices;
    const most = logits[0] as number;
    const total = most + Math.log(sum(weightsOf(logits, most, 1)) + rest);
    const scored = (one: number): ScoredToken => {
      const at = ids.indexOf(one);
      return { id: one, logprob: ((at < 0 ? row?.[one] : logits[at]) ?? Number.NaN) - total };
    };
    const listed = top > TOP && row ? largest(row, top) : [...ids.subarray(0, top)];
    return { ...scored(id), top: listed.map(scored) };
  }

  readonly #allows = (id: number): boolean => {
    const { constraint } = this.#options;
    return !constraint || (this.#eosIds.includes(id) ? constraint.mayEnd : constraint.allows(id));
  };

  /** The first of the row as the options change it: nothing that is not in it would come before its last. */
  #likeliest({ ids, logits, temperedRest, isAll }: RowChoices): Ranked | undefined {
    if (!this.#changes) return { ids, logits, rest: temperedRest, isAll };
    if (this.#raises && !isAll) return undefined;
    const changed = Float64Array.from(logits, (logit, i) => this.#change(ids[i] as number, logit));
    const [lastId, floor] = [ids.at(-1) as number, logits.at(-1) as number];
    const order = Array.from(ids.keys()).sort((a, b) => {
      const [one, other] = [changed[a] as number, changed[b] as number];
      return one === other ? (ids[a] as number) - (ids[b] as number) : other - one;
    });
    // What was lowered below the last one's own logit may come after one of the others.
    const kept = order.filter((i) => {
      const logit = changed[i] as number;
      return isAll || logit > floor || (logit === floor && (ids[i] as number) <= lastId);
    });
    return {
      ids: Int32Array.from(kept, (i) => ids[i] as number),
      logits: Float64Array.from(kept, (i) => changed[i] as number),
      rest: isAll ? 0 : Number.NaN,
      isAll,
    };
  }

  #change(id: number, logit: number): number {
    const { repetitionPenalty = 1, presencePenalty = 0, frequencyPenalty = 0, logitBias } = this.#options;
    const count = this.#counts.get(id) ?? 0;
    let changed = logit;
    if (count > 0 || this.#prompt.has(id))
      changed = changed > 0 ? changed / repetitionPenalty : changed * repetitionPenalty;
    if (count > 0) changed -= presencePenalty + count * frequencyPenalty;
    return changed + (logitBias?.get(id) ?? 0);
  }

  #chooseOfAll(row: Float32Array, { ids }: RowChoices): number | undefined {
    const values = Float64Array.from(row);
    for (let id = 0; id < values.length; id++) if (Number.isNaN(values[id])) values[id] = Number.NEGATIVE_INFINITY;
    if (this.#changes)
      for (const id of new Set([...this.#prompt, ...this.#counts.keys(), ...(this.#options.logitBias?.keys() ?? [])]))
        if (id < values.length) values[id] = this.#change(id, values[id] as number);
    if (this.temperature !== this.#options.temperature) return argmax(values, this.#allows);
    const id = this.#choose(ranked(values, this.#changes ? largest(values, TOP) : ids));
    if (id !== undefined || !this.#options.constraint) return id;
    const allowed = values.map((logit, one) => (this.#allows(one) ? logit : Number.NEGATIVE_INFINITY));
    return allowed.some((logit) => logit > Number.NEGATIVE_INFINITY)
      ? this.#draw(remaining(ranked(allowed, largest(allowed, TOP)), this.#options) as Choices)
      : undefined;
  }

  /** One of these, or undefined where it is none of them. */
  #choose(all: Ranked): number | undefined {
    if (this.temperature !== this.#options.temperature) return all.ids.find(this.#allows);
    this.#used = 0;
    let choices = remaining(all, this.#options);
    // Those refused are struck out, which changes nothing of how the others share; where that would take long, all are looked at.
    for (let n = 0; n < MOST_REFUSED && choices && choices.ids.length > 0; n++) {
      const id = this.#draw(choices);
      if (id === undefined || this.#allows(id)) return id;
      choices = keep(choices, (one, weight) => one !== id && weight > 0);
    }
    if (!choices?.isAll) return undefined;
    choices = keep(choices, this.#allows);
    return choices.ids.length > 0 ? this.#draw(choices) : undefined;
  }

  /** One of these, or undefined where it is none of them. */
  #draw({ ids, weights, rest, isAll }: Choices): number | undefined {
    const uniform = this.#uniforms[this.#used] ?? this.#random.uniform();
    this.#uniforms[this.#used++] = uniform;
    let place = uniform * (sum(weights) + rest);
    let best = 0;
    for (let i = 0; i < weights.length; i++) {
      const weight = weights[i] as number;
      place -= weight;
      if (place < 0) return ids[i];
      if (weight > (weights[best] as number)) best = i;
    }
    return isAll ? ids[best] : undefined;
  }
}

const MOST_REFUSED = 8;

/** Tokens of a row, flat, as there may be 150,000 of them for each row and step: the likeliest, sorted, and after TOP of them any that there are. */
interface Ranked {
  readonly ids: Int32Array;
  readonly logits: Float32Array | Float64Array;
  /** What exp((x − m) / temperature) of all others is together, m the greatest logit; NaN where that is not known. */
  readonly rest: number;
  /** Whether there are no others. */
  readonly isAll: boolean;
}

/** Tokens in the order in which a draw walks along them. */
interface Choices extends Omit<Ranked, "logits"> {
  /** In proportion to their probabilities. */
  readonly weights: Float64Array;
}

/** All tokens: the first ones, then the others by id. */
function ranked(values: Float64Array, first: ArrayLike<number>): Ranked {
  const [ids, isFirst] = [new Int32Array(values.length), new Uint8Array(values.length)];
  ids.set(first);
  for (let i = 0; i < first.length; i++) isFirst[first[i] as number] = 1;
  let n = first.length;
  for (let id = 0; id < ids.length; id++) if (isFirst[id] === 0) ids[n++] = id;
  const logits = new Float64Array(ids.length);
  for (let i = 0; i < ids.length; i++) logits[i] = values[ids[i] as number] as number;
  return { ids, logits, rest: 0, isAll: true };
}

function keep(choices: Choices, holds: (id: number, weight: number) => boolean): Choices {
  const { ids, weights } = choices;
  const kept = { ids: new Int32Array(ids.length), weights: new Float64Array(ids.length) };
  let n = 0;
  for (let i = 0; i < ids.length; i++) {
    if (!holds(ids[i] as number, weights[i] as number)) continue;
    kept.ids[n] = ids[i] as number;
    kept.weights[n] = weights[i] as number;
    n++;
  }
  return { ...choices, ids: kept.ids.subarray(0, n), weights: kept.weights.subarray(0, n) };
}

/**
 * What may be drawn, by temperature, then top-k, top-p and min-p, each of what the one before left. Ties with the last of top-k stay. Undefined
 * where that takes more than these tokens.
 */
function remaining(
  { ids, logits, rest, isAll }: Ranked,
  { temperature = 1, topK, topP = 1, minP = 0 }: SamplingOptions,
): Choices | undefined {
  if (ids.length === 0) return undefined;
  let choices: Choices = { ids, weights: weightsOf(logits, logits[0] as number, temperature), rest, isAll };
  if (topK !== undefined && (!isAll || topK < ids.length)) {
    const least = logits[topK <= TOP ? topK - 1 : (largest(logits, topK).at(-1) as number)];
    if (least === undefined || (!isAll && least === logits.at(-1))) return undefined;
    let n = 0;
    choices = { ...keep(choices, () => (logits[n++] as number) >= least), rest: 0, isAll: true };
  }
  if (Number.isNaN(choices.rest)) return undefined;
  if (topP < 1) {
    const closed = nucleus(choices, topP);
    if (!closed) return undefined;
    choices = closed;
  }
  if (minP === 0) return choices; // the likeliest has weight 1
  if (!choices.isAll && (choices.weights.at(-1) as number) >= minP) return undefined;
  return { ...keep(choices, (_, weight) => weight >= minP), rest: 0, isAll: true };
}

/** The likeliest choices up to the first with which they have the share p; undefined where these are too few. */
function nucleus(choices: Choices, p: number): Choices | undefined {
  const total = sum(choices.weights) + choices.rest;
  // All that are below this together have less than 1 − p: none of them is in the nucleus, and the others are few.
  const floor = choices.isAll ? ((1 - p) * total) / choices.ids.length : 0;
  const likely = keep(choices, (_, weight) => weight >= floor);
  const order = Array.from(likely.ids.keys()).sort(
    (a, b) => (likely.weights[b] as number) - (likely.weights[a] as number),
  );
  let mass = 0;
  const end = order.findIndex((i) => {
    mass += likely.weights[i] as number;
    return mass >= p * total;
  });
  if (end < 0 && !choices.isAll) return undefined;
  const inside = new Set((end < 0 ? order : order.slice(0, end + 1)).map((i) => likely.ids[i]));
  return { ...keep(likely, (id) => inside.has(id)), rest: 0, isAll: true };
}

/** Index of the largest value that is allowed; the first of equals. Asks only of those above all that were allowed before. */
function argmax(values: ArrayLike<number>, allows: (index: number) => boolean): number | undefined {
  let best: number | undefined;
  for (let i = 0; i < values.length; i++)
    if ((best === undefined || (values[i] ?? 0) > (values[best] ?? 0)) && allows(i)) best = i;
  return best;
}
