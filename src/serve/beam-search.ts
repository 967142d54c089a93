/** Beam search over a cache in pages: beams share the pages of what they have in common. */
import { ShapeError } from "../tensor/errors.ts";
import { checkPrompt } from "./generate.ts";
import { PagePool } from "./page-pool.ts";
import { type PagedModel, PagedStep, type RowAdapters, type StepToken } from "./paged-step.ts";
import { largest, logSumExp } from "./row-choices.ts";
import { noTokenAllowed, type TokenConstraint } from "./sampling.ts";

export interface BeamSearchOptions {
  readonly promptIds: readonly number[];
  readonly maxTokens: number;
  /** Continuations that are followed. 4 unless given. */
  readonly beams?: number;
  /** p: answers are compared by log-probability / lengthᵖ. 1 unless given. */
  readonly lengthPenalty?: number;
  /**
   * When to stop where there are as many answers as beams: at once (true), when the best open beam would be worse at its length (false), or
   * when it cannot get better at any length ("never"). false unless given.
   */
  readonly earlyStopping?: boolean | "never";
  /** Ids that end an answer; the model's own unless given. */
  readonly eosIds?: readonly number[];
  /**
   * What an answer may be. The log-probabilities stay the model's own, as with transformers' `prefix_allowed_tokens_fn`; an answer that is done ends
   * without an id that says so.
   */
  readonly constraint?: TokenConstraint | undefined;
  /** The adapter of all rows: see `AdapterPool`. */
  readonly adapter?: { readonly pool: RowAdapters; readonly slot: number };
  readonly signal?: AbortSignal | undefined;
}

export interface BeamAnswer {
  /** Without the id that ended it. */
  readonly ids: readonly number[];
  /** Log-probability in nats / lengthᵖ; the id that ended it counts in both. */
  readonly score: number;
}

interface Beam {
  readonly ids: readonly number[];
  /** Sum of log-probabilities. */
  readonly sum: number;
  /** Where its keys and values are. */
  readonly pages: readonly number[];
  readonly constraint: TokenConstraint | undefined;
}

/** A way to go on. */
interface Candidate {
  readonly beam: Beam;
  readonly id: number;
  readonly sum: number;
}

const PAGE_TOKENS = 16;

/**
 * The likeliest answers that a search with `beams` open continuations finds, the best first, at most so many. The same as transformers'
 * `generate(num_beams=…)`, which keeps answers that end among the best candidates of a step, and fills the beams with those that go on. Answers
 * that are cut off where the constraint does not let them end are given only where there is no other.
 *
 * Throws ShapeError for settings out of range and where the constraint allows no token, the signal's reason where it is aborted.
 */
export async function beamSearch(model: PagedModel, options: BeamSearchOptions): Promise<BeamAnswer[]> {
  const { promptIds, maxTokens, beams = 4, lengthPenalty = 1, earlyStopping = false, adapter, signal } = options;
  const { config } = model;
  const { eosIds = config.eosIds, constraint } = options;
  checkPrompt(config, promptIds, maxTokens);
  if (!Number.isInteger(beams) || beams < 1)
    throw new ShapeError(`beamSearch: beams must be a whole number of at least 1, got ${beams}`);
  if (!Number.isFinite(lengthPenalty))
    throw new ShapeError(`beamSearch: lengthPenalty must be a finite number, got ${lengthPenalty}`);
  const most = Math.min(maxTokens, config.contextLength - promptIds.length);
  if (most === 0) return [{ ids: [], score: 0 }];
  const perBeam = Math.ceil((promptIds.length + most) / PAGE_TOKENS);
  const pool = new PagePool(2 * beams * perBeam, PAGE_TOKENS);
  const settings = { tokens: pool.count * PAGE_TOKENS, pageTokens: PAGE_TOKENS, sequences: beams };
  const step = new PagedStep(model, { ...settings, contextLength: config.contextLength, format: "f32" }, adapter?.pool);
  const slot = adapter?.slot ?? -1;
  try {
    let open: Beam[] = [{ ids: [], sum: 0, pages: [], constraint }];
    let done: BeamAnswer[] = [];
    const kept = Math.max(2, 1 + eosIds.length) * beams;
    const isEnd = (id: number): boolean => eosIds.includes(id);
    for (let length = 1; ; length++) {
      signal?.throwIfAborted();
      const logits = await advance(step, pool, open, promptIds, slot);
      const [going, ended, cutOff]: [Beam[], BeamAnswer[], BeamAnswer[]] = [[], [], []];
      for (const [rank, { beam, id, sum }] of bestOf(open, logits, kept, isEnd).entries()) {
        if (going.length === beams || (length === most && rank >= beams)) break;
        const after = isEnd(id) ? undefined : beam.constraint?.fork();
        after?.accept(id);
        const ids = isEnd(id) ? beam.ids : [...beam.ids, id];
        const isLast = isEnd(id) || after?.isDone === true;
        const answer = { ids, score: sum / length ** lengthPenalty };
        if (!isLast && length < most) going.push({ ids, sum, pages: beam.pages, constraint: after });
        else if (rank < beams) (isLast || after?.mayEnd !== false ? ended : cutOff).push(answer);
      }
      done = [...done, ...ended].toSorted((a, b) => b.score - a.score).slice(0, beams);
      if (length === most && done.length === 0) done = cutOff;
      const isFull = done.length === beams;
      const reach = earlyStopping === "never" && lengthPenalty > 0 ? most : length;
      const hope = (going[0]?.sum ?? Number.NEGATIVE_INFINITY) / reach ** lengthPenalty;
      if (going.length === 0 && done.length === 0) throw noTokenAllowed();
      if (going.length === 0 || (isFull && (earlyStopping === true || hope <= (done.at(-1)?.score ?? 0)))) return done;
      for (const page of going.flatMap(({ pages }) => pages)) pool.share(page);
      for (const beam of open) pool.release(beam);
      open = going;
    }
  } finally {
    step.destroy();
  }
}

/** The next-token logits of each beam, whose last token (of the first: whose prompt) is computed. Gives each beam pages of its own to write to. */
async function advance(
  step: PagedStep,
  pool: PagePool,
  open: Beam[],
  promptIds: readonly number[],
  slot: number,
): Promise<Float32Array[]> {
  const tokens: StepToken[] = [];
  const rows: number[] = [];
  const copies: [from: number, to: number][] = [];
  for (const [sequence, beam] of open.entries()) {
    const all = [...promptIds, ...beam.ids];
    const first = beam.ids.length === 0 ? 0 : all.length - 1;
    const pages = [...beam.pages];
    const at = Math.floor(first / PAGE_TOKENS);
    const written = pages[at];
    if (written !== undefined && pool.users(written) > 1) {
      const own = pool.take();
      copies.push([written, own]);
      pool.release({ pages: [written] });
      pages[at] = own;
    }
    while (pages.length < pool.pagesFor(all.length)) pages.push(pool.take());
    open[sequence] = { ...beam, pages };
    step.setPages(sequence, pages);
    for (let position = first; position < all.length; position++)
      tokens.push({ id: all[position] as number, position, sequence, slot });
    rows.push(tokens.length - 1);
  }
  step.copyPages(copies);
  return step.run(tokens, rows);
}

/** So many of a row's likeliest are looked at where some may be forbidden, or end the answer; all where too few are allowed. */
const TRIED = 64;

/** The likeliest ways to go on that are allowed, the best first: `count` at least, if there are so many. */
function bestOf(
  open: readonly Beam[],
  logits: readonly Float32Array[],
  count: number,
  isEnd: (id: number) => boolean,
): Candidate[] {
  const all = open.flatMap((beam, i) => {
    const { constraint } = beam;
    const own = logits[i] as Float32Array;
    const total = logSumExp(own);
    const isAllowed = (id: number): boolean => !constraint || (isEnd(id) ? constraint.mayEnd : constraint.allows(id));
    let ids = largest(own, constraint ? TRIED : count).filter(isAllowed);
    if (constraint && ids.length < count) {
      const allowed = own.map((logit, id) => (isAllowed(id) ? logit : Number.NEGATIVE_INFINITY));
      ids = largest(allowed, TRIED).filter((id) => allowed[id] !== Number.NEGATIVE_INFINITY);
    }
    return ids.map((id) => ({ beam, id, sum: beam.sum + (own[id] ?? Number.NaN) - total }));
  });
  return all.toSorted((a, b) => b.sum - a.sum);
}
