/** Generation for many at once: requests join and leave between the steps of one batch, each with its own adapter (arXiv:2309.06180, 2311.03285). */

import type { Directory } from "../io/bytes.ts";
import { readAdapter } from "../lora/adapter-file.ts";
import type { PoolCounts } from "../lora/adapter-pool.ts";
import type { PlainAdapter } from "../lora/plain-adapter.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Engine, EngineStats, GenerationRequest } from "./engine-types.ts";
import { QueueFull } from "./errors.ts";
import { checkPrompt } from "./generate.ts";
import { type Lease, PagePool } from "./page-pool.ts";
import {
  type AskedRow,
  cacheBytes,
  type PagedModel,
  PagedStep,
  type RowAdapters,
  type StepToken,
} from "./paged-step.ts";
import type { RowChoices } from "./row-choices.ts";
import { type SampledToken, Sampler } from "./sampling.ts";
import { TokenStream } from "./token-stream.ts";

/** Adapters by name, of which some are resident: see `AdapterPool`. */
export interface ServedAdapters extends RowAdapters {
  readonly names: readonly string[];
  readonly counts: PoolCounts;
  register(name: string, adapter: PlainAdapter): Promise<void>;
  /** Makes it resident for one more user and gives its slot; undefined where there is no room now. */
  acquire(name: string): number | undefined;
  release(slot: number): void;
  unregister(name: string): void;
}

export interface EngineOptions {
  readonly adapters?: ServedAdapters | undefined;
  /** The longest prompt and answer together; the model's own unless given. */
  readonly contextLength?: number | undefined;
  /** Requests in the batch at a time. 32 unless given. */
  readonly maxRows?: number;
  /** Tokens of one step; prompts are cut to what is left beside the answers (chunked prefill, arXiv:2403.02310). 256 unless given. */
  readonly maxStepTokens?: number;
  /** Requests that may wait beside those for which there is a row. 256 unless given. */
  readonly maxWaiting?: number;
  /**
   * Tokens of keys and values that are kept in all. Unless given, four times the context, but no more than the larger of it and 16,384. Where they
   * are fewer than the model's context and that is not limited, it is limited to them. Requests are let in with room for what they have and some
   * more; where it runs out, who came last makes way.
   */
  readonly cacheTokens?: number | undefined;
  readonly cacheFormat?: "f32" | "f16";
  /** Tokens of a page, a power of two; 16 unless given. */
  readonly pageTokens?: number;
  /** Who finds the likeliest tokens: see `CacheSettings`. */
  readonly choices?: "device" | "host" | undefined;
}

/** Pages that must be free for a request beyond those of its prompt, if it may need them. */
const PAGES_AHEAD = 4;

/** How often a waiting request may be passed before those behind it have to wait, too. */
const MOST_PASSED = 64;

interface Sequence {
  readonly request: GenerationRequest;
  readonly sampler: Sampler;
  /** Ids that end it. */
  readonly ends: readonly number[];
  readonly stream: TokenStream;
  /** Prompt and answer. */
  readonly ids: number[];
  /** Tokens that it ends with at the latest. */
  readonly limit: number;
  /** Whose keys and values are in the cache. */
  computed: number;
  passed: number;
  hasStarted: boolean;
  place?: { lease: Lease; readonly row: number; readonly slot: number };
  readonly forget: () => void;
}

/** Requests join and leave between the steps of one batch; adapters come from a pool that is enabled. */
export class BatchEngine implements Engine {
  readonly model: PagedModel;
  readonly contextLength: number;
  readonly #options: Required<Pick<EngineOptions, "maxRows" | "maxStepTokens" | "maxWaiting">>;
  readonly #adapters: ServedAdapters | undefined;
  readonly #pool: PagePool;
  readonly #step: PagedStep;
  readonly #rows: number[];
  /** In the order in which they came. */
  readonly #waiting: Sequence[] = [];
  readonly #running: Sequence[] = [];
  /** What an adapter's keys and values go by; another one for a name that comes again. */
  readonly #roots = new Map<string, string>();
  readonly #leaving = new Map<string, (() => void)[]>();
  #versions = 0;
  #isClosed = false;
  /** Whether somebody came or something was freed since who waits was last looked at. */
  #isChanged = false;
  #failure: unknown;
  #loop: Promise<void> | undefined;
  #steps = 0;
  #promptTokens = 0;
  #reusedTokens = 0;
  #generatedTokens = 0;
  #preemptions = 0;

  /** Throws ShapeError for settings out of range. */
  constructor(model: PagedModel, options: EngineOptions = {}) {
    const { adapters, maxRows = 32, maxStepTokens = 256, maxWaiting = 256, pageTokens = 16 } = options;
    const { cacheFormat = "f32", choices } = options;
    const { contextLength, cacheTokens } = lengths(model, options);
    for (const [name, value] of Object.entries({ maxRows, maxStepTokens, contextLength, cacheTokens }))
      if (!Number.isInteger(value) || value < 1)
        throw new ShapeError(`BatchEngine: ${name} must be a whole number of at least 1, got ${value}`);
    if (contextLength > model.config.contextLength)
      throw new ShapeError(
        `BatchEngine: contextLength must be at most the model's ${model.config.contextLength}, got ${contextLength}`,
      );
    if (maxStepTokens < maxRows)
      throw new ShapeError(
        `BatchEngine: maxStepTokens must be at least maxRows = ${maxRows}, got ${maxStepTokens}: each row takes a token of a step`,
      );
    this.model = model;
    this.contextLength = contextLength;
    this.#options = { maxRows, maxStepTokens, maxWaiting };
    this.#adapters = adapters;
    const settings = {
      tokens: cacheTokens,
      pageTokens,
      sequences: maxRows,
      contextLength,
      format: cacheFormat,
      choices,
    };
    this.#step = new PagedStep(model, settings, adapters);
    this.#pool = new PagePool(this.#step.pages, pageTokens);
    this.#rows = Array.from({ length: maxRows }, (_, i) => maxRows - 1 - i);
  }

  get adapters(): readonly string[] {
    return (this.#adapters?.names ?? []).filter((name) => !this.#leaving.has(name));
  }

  get failure(): unknown {
    return this.#failure;
  }

  stats(): EngineStats {
    const counts = this.#adapters?.counts;
    return {
      running: this.#running.length,
      waiting: this.#waiting.length,
      kvPagesUsed: this.#pool.used,
      kvPages: this.#pool.count,
      adaptersResident: counts?.resident ?? 0,
      adapterLoads: counts?.loads ?? 0,
      adapterEvictions: counts?.evictions ?? 0,
      promptTokens: this.#promptTokens,
      cachedPromptTokens: this.#reusedTokens,
      generatedTokens: this.#generatedTokens,
      steps: this.#steps,
      preemptions: this.#preemptions,
      gpuBytes: this.model.gpu.counters().bytesLive - this.#step.planBytes,
    };
  }

  /**
   * Queues a request, whose tokens come as they are made: until one that ends the text (which is not given), maxTokens, or the end of the
   * context. Returning early from the iteration ends it, as does its signal: what it had is free before the next step.
   *
   * Throws ShapeError for settings out of range, an unknown adapter and what can never fit, QueueFull where too many wait.
   */
  generate(request: GenerationRequest): AsyncGenerator<SampledToken, void, undefined> {
    const { adapter, promptIds, maxTokens, signal } = request;
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#isClosed) throw new ShapeError("generate: the engine must be open, got one that was closed");
    this.#check(request);
    if (adapter !== undefined && !this.adapters.includes(adapter))
      throw new ShapeError(
        `generate: the adapter must be one of ${this.adapters.join(", ") || "none"}, got "${adapter}"`,
      );
    const ends = [...this.model.config.eosIds, ...(request.endIds ?? [])];
    const sampler = new Sampler(promptIds, request, ends);
    const stream = new TokenStream(() => this.#drop(sequence));
    if (this.#waiting.length >= this.#options.maxWaiting + this.#rows.length)
      throw new QueueFull(
        `generate: at most ${this.#options.maxWaiting} requests may wait, got one more. Try again later`,
      );
    const abort = (): void => {
      this.#drop(sequence);
      stream.end();
    };
    const sequence: Sequence = {
      ...{ request, sampler, ends, stream, computed: 0, passed: 0, hasStarted: false },
      ids: [...promptIds],
      limit: Math.min(promptIds.length + maxTokens, this.contextLength),
      forget: () => signal?.removeEventListener("abort", abort),
    };
    if (signal?.aborted) stream.end();
    else if (sequence.limit === promptIds.length) stream.end();
    else {
      signal?.addEventListener("abort", abort);
      this.#waiting.push(sequence);
      this.#isChanged = true;
      this.#loop ??= this.#run();
    }
    return stream;
  }

  /** Registers an adapter's directory under a name. Throws FormatError and ShapeError as `AdapterPool.register`, and without a pool. */
  async load(name: string, directory: Directory): Promise<void> {
    if (!this.#adapters) throw new ShapeError(`load: the engine must have a pool of adapters, got none for "${name}"`);
    await this.#adapters.register(name, await readAdapter(directory));
  }

  /** Makes an adapter's name unknown and waits for those who use it. Throws ShapeError where there is none. */
  async unload(name: string): Promise<void> {
    if (!this.adapters.includes(name)) throw new ShapeError(`unload: the adapter must be loaded, got "${name}"`);
    if (this.#isUsed(name)) await new Promise<void>((done) => this.#leaving.set(name, [done]));
    this.#leaving.delete(name);
    this.#roots.delete(name);
    this.#adapters?.unregister(name);
  }

  /** Takes no more requests, lets those that are there end, and frees the cache; the model and the adapters stay. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await this.#loop;
    this.#step.destroy();
  }

  #check({ promptIds, maxTokens }: GenerationRequest): void {
    const { vocabSize } = this.model.config;
    checkPrompt({ vocabSize, contextLength: this.contextLength }, promptIds, maxTokens);
    const tokens = Math.min(promptIds.length + maxTokens, this.contextLength);
    if (this.#pool.pagesFor(tokens) > this.#pool.count)
      throw new ShapeError(
        `generate: prompt and answer must fit into the cache of ${this.#pool.count * this.#pool.pageTokens} tokens, got ${tokens}. Ask for fewer, or give the engine more cacheTokens`,
      );
  }

  #rootOf(adapter: string | undefined): string {
    if (adapter === undefined) return "base";
    const known = this.#roots.get(adapter) ?? `adapter ${++this.#versions}`;
    this.#roots.set(adapter, known);
    return known;
  }

  #isUsed(adapter: string): boolean {
    return [...this.#running, ...this.#waiting].some(({ request }) => request.adapter === adapter);
  }

  /** Steps while there is something to do. */
  async #run(): Promise<void> {
    try {
      // Those who ask in the same turn share the first step.
      await Promise.resolve();
      for (this.#admit(); this.#running.length > 0; this.#admit()) await this.#advance();
      // With nobody running, room that is missing is not ours to wait for.
      for (const sequence of [...this.#waiting])
        this.#end(
          sequence,
          new ShapeError(
            `generate: the pool must have room for "${sequence.request.adapter}" where no request runs, got it in use by others`,
          ),
        );
    } catch (error) {
      this.#failure = error;
      for (const sequence of [...this.#running, ...this.#waiting]) this.#end(sequence, error);
    } finally {
      this.#loop = undefined;
    }
  }

  /** Lets those in that fit: of those whose adapter has fewest rows, who came first. */
  #admit(): void {
    if (!this.#isChanged) return;
    this.#isChanged = false;
    const rows = new Map<string | undefined, number>();
    const rowsOf = ({ request }: Sequence): number => rows.get(request.adapter) ?? 0;
    const count = (one: Sequence): Map<string | undefined, number> => rows.set(one.request.adapter, rowsOf(one) + 1);
    this.#running.forEach(count);
    const ready = new Set(this.#waiting);
    while (this.#rows.length > 0) {
      const [first] = this.#waiting;
      if (!first) return;
      let next: Sequence | undefined;
      for (const one of ready) if (!next || rowsOf(one) < rowsOf(next)) next = one;
      if (first.passed >= MOST_PASSED) next = ready.has(first) ? first : undefined;
      if (!next) return;
      ready.delete(next);
      if (!this.#enter(next)) continue;
      this.#waiting.splice(this.#waiting.indexOf(next), 1);
      this.#running.push(next);
      count(next);
      if (next !== first) first.passed++;
    }
  }

  /** Gives it pages, a row and its adapter, if there is room for all of them and nobody is computing what it can share. */
  #enter(sequence: Sequence): boolean {
    const { adapter } = sequence.request;
    if (this.#running.some((other) => this.#isComputing(other, sequence))) return false;
    const ahead = sequence.ids.length + PAGES_AHEAD * this.#pool.pageTokens;
    // The keys and values of the last token are never needed.
    const lease = this.#pool.lease(this.#rootOf(adapter), sequence.ids, Math.min(sequence.limit - 1, ahead));
    if (!lease) return false;
    const slot = adapter === undefined ? -1 : this.#adapters?.acquire(adapter);
    if (slot === undefined) {
      this.#pool.release(lease);
      return false;
    }
    const row = this.#rows.pop() as number;
    sequence.place = { lease, row, slot };
    sequence.computed = lease.reused;
    this.#step.setPages(row, lease.pages);
    if (sequence.hasStarted) return true;
    sequence.hasStarted = true;
    this.#promptTokens += sequence.ids.length;
    this.#reusedTokens += lease.reused;
    sequence.request.onStart?.();
    return true;
  }

  /** Gives each a page for its next token, those who came first before the others; where there is none, who came last makes way. */
  #makeRoom(): void {
    for (const sequence of [...this.#running])
      while (sequence.place && sequence.place.lease.pages.length < this.#pool.pagesFor(sequence.ids.length)) {
        const lease = this.#pool.grown(sequence.place.lease);
        if (lease) {
          sequence.place.lease = lease;
          this.#step.setPages(sequence.place.row, lease.pages);
        } else this.#preempt(this.#running.pop() as Sequence);
      }
  }

  /** Back into the queue, in front: what it has is computed again, as far as its pages are not known then (recomputation, arXiv:2309.06180 §4.5). */
  #preempt(sequence: Sequence): void {
    this.#free(sequence);
    sequence.computed = 0;
    this.#waiting.unshift(sequence);
    this.#preemptions++;
  }

  /** Whether the other has yet to compute pages that both of them begin with. */
  #isComputing(other: Sequence, { request, ids }: Sequence): boolean {
    const theirs = other.request.promptIds;
    if (other.computed >= theirs.length || other.request.adapter !== request.adapter) return false;
    let common = 0;
    while (common < Math.min(theirs.length, ids.length - 1) && ids[common] === theirs[common]) common++;
    return other.computed < common - (common % this.#pool.pageTokens);
  }

  /** One step: a token of each answer, and as much of the prompts as there is room for. */
  async #advance(): Promise<void> {
    this.#makeRoom();
    let room = this.#options.maxStepTokens;
    const tokens: StepToken[] = [];
    const rows: AskedRow[] = [];
    const asked: Sequence[] = [];
    const took = new Map<Sequence, number>();
    const isAnswering = ({ ids, computed }: Sequence): boolean => ids.length - computed === 1;
    const ordered = [...this.#running.filter(isAnswering), ...this.#running.filter((one) => !isAnswering(one))];
    for (const sequence of ordered) {
      const { ids, computed, place } = sequence;
      if (!place) continue;
      const count = Math.min(room, ids.length - computed);
      if (count === 0) continue;
      room -= count;
      for (let at = computed; at < computed + count; at++)
        tokens.push({ id: ids[at] as number, position: at, sequence: place.row, slot: place.slot });
      took.set(sequence, count);
      if (computed + count < ids.length) continue;
      const { sampler, request } = sequence;
      const isWhole = sampler.needsRow(request.logprobs);
      rows.push({ at: tokens.length - 1, temperature: sampler.temperature, isWhole });
      asked.push(sequence);
    }
    const choices = await this.#step.choices(tokens, rows);
    this.#steps++;
    for (const [sequence, count] of took) this.#advanced(sequence, count);
    const undecided = [...asked.keys()].filter((i) => !this.#deliver(asked[i] as Sequence, choices[i] as RowChoices));
    const whole = await this.#step.readRows(undecided);
    undecided.forEach((i, n) => {
      this.#deliver(asked[i] as Sequence, { ...(choices[i] as RowChoices), row: whole[n] as Float32Array });
    });
    if (rows.length === 0) await new Promise((done) => setTimeout(done)); // nothing was read back: let others run
  }

  /** So many more of its tokens are computed. Those of its prompt are there for others from now on. */
  #advanced(sequence: Sequence, count: number): void {
    sequence.computed += count;
    const { request, ids, computed, place } = sequence;
    if (!place || computed > request.promptIds.length) return;
    this.#pool.remember(this.#rootOf(request.adapter), ids.slice(0, computed), place.lease.pages);
    this.#isChanged = true;
  }

  /** False where the token cannot be told without the whole row. */
  #deliver(sequence: Sequence, choices: RowChoices): boolean {
    const { ids, request, sampler, stream, limit } = sequence;
    if (!sequence.place) return true; // dropped meanwhile
    let token: SampledToken | undefined;
    try {
      token = sampler.next(choices, request.logprobs);
    } catch (error) {
      this.#end(sequence, error); // of its constraint: the others go on
      return true;
    }
    if (!token) return false;
    if (sequence.ends.includes(token.id)) {
      this.#end(sequence);
      return true;
    }
    ids.push(token.id);
    this.#generatedTokens++;
    stream.push(token);
    if (ids.length >= limit || request.constraint?.isDone) this.#end(sequence);
    return true;
  }

  #end(sequence: Sequence, error?: unknown): void {
    this.#drop(sequence);
    sequence.stream.end(error);
  }

  /** Takes it out, and frees what it has. */
  #drop(sequence: Sequence): void {
    const { adapter } = sequence.request;
    sequence.forget();
    for (const list of [this.#waiting, this.#running]) {
      const at = list.indexOf(sequence);
      if (at >= 0) list.splice(at, 1);
    }
    this.#free(sequence);
    if (adapter !== undefined && !this.#isUsed(adapter)) for (const done of this.#leaving.get(adapter) ?? []) done();
  }

  /** Gives back its pages, row and adapter. */
  #free(sequence: Sequence): void {
    const { place, ids, computed, request } = sequence;
    this.#isChanged = true;
    if (!place) return;
    delete sequence.place;
    const root = request.adapter === undefined ? "base" : this.#roots.get(request.adapter);
    if (root && computed > 0) this.#pool.remember(root, ids.slice(0, computed), place.lease.pages);
    this.#pool.release(place.lease);
    this.#rows.push(place.row);
    if (place.slot >= 0) this.#adapters?.release(place.slot);
  }
}

/** What EngineOptions say of them, or by default. */
function lengths(
  { config }: Pick<PagedModel, "config">,
  { contextLength, cacheTokens }: EngineOptions,
): { readonly contextLength: number; readonly cacheTokens: number } {
  const most = contextLength ?? Math.min(config.contextLength, cacheTokens ?? config.contextLength);
  return { contextLength: most, cacheTokens: cacheTokens ?? Math.max(most, Math.min(4 * most, 16_384)) };
}

/** Bytes of an engine's cache: see `EngineOptions`. */
export function engineCacheBytes(model: Pick<PagedModel, "config">, options: EngineOptions = {}): number {
  const { cacheFormat: format = "f32", pageTokens = 16, maxRows = 32 } = options;
  const { contextLength, cacheTokens } = lengths(model, options);
  const tokens = Math.ceil(cacheTokens / pageTokens) * pageTokens;
  return cacheBytes(model, { tokens, pageTokens, sequences: maxRows, contextLength, format });
}
