/**
 * Chooses between ways to compute the same thing by timing them on this device, once per class of shapes.
 *
 * Nothing is timed on its own: `tune(run)` notes what `run` needs and times that. Choices are kept per adapter in a store, a file
 * in Node and Deno and `localStorage` in a page, and are found there by the next `openGpu`, unless `tune: "off"`.
 */
import { GpuError } from "./errors.ts";
import type { Gpu } from "./gpu.ts";

/** A way to compute something. */
export interface Candidate {
  /** Names it in the store. */
  readonly name: string;
}

/** Something to try candidates on. */
export interface Trial<C> {
  /** Encodes one run. */
  readonly run: (candidate: C) => void;
  /** Frees what the trial made. */
  readonly done: () => void;
}

export interface Question<C extends Candidate> {
  /** The default first. */
  readonly candidates: readonly C[];
  readonly trial: () => Trial<C>;
}

/** Where choices are kept from one process to the next: one text for all adapters. */
export interface TuneStore {
  load(): string | undefined;
  save(text: string): void;
}

/** What one class of shapes came to: milliseconds by candidate, and the one chosen. */
export interface Tuning {
  readonly key: string;
  readonly chosen: string;
  readonly timesMs: Readonly<Record<string, number>>;
}

type Choices = Record<string, string>;

/** Finds the fastest way to compute each class of products on this device by trying them, and remembers it. */
export class Tuner {
  readonly #gpu: Gpu;
  readonly #adapter: string;
  readonly #store: TuneStore | undefined;
  readonly #chosen = new Map<string, Candidate>();
  readonly #names: Choices;
  #noted: Map<string, () => Question<Candidate>> | undefined;
  readonly #remembered = new Map<string, unknown>();

  /** Without a store (`tune: "off"`) nothing is ever chosen. */
  constructor(gpu: Gpu, store: TuneStore | undefined) {
    const { vendor, architecture, device, description } = gpu.info;
    this.#gpu = gpu;
    this.#adapter = [gpu.runtime, vendor, architecture, device, description].join("|");
    this.#store = store;
    this.#names = parse(store?.load())[this.#adapter] ?? {};
  }

  /** The candidate chosen for this key, or undefined where none was: the caller then takes its default. */
  choose<C extends Candidate>(key: string, question: () => Question<C>): C | undefined {
    if (!this.#store) return undefined;
    const known = this.#chosen.get(key);
    if (known) return known as C;
    const name = this.#names[key];
    const found = name === undefined ? undefined : question().candidates.find((candidate) => candidate.name === name);
    if (found) this.#chosen.set(key, found);
    else this.#noted?.set(key, question as unknown as () => Question<Candidate>);
    return found;
  }

  /** What `make` decided for this key, with `choose` or without: decided once, and again after each tuning. */
  remember<T>(key: string, make: () => T): T {
    if (this.#noted) return make(); // which has to ask
    if (!this.#remembered.has(key)) this.#remembered.set(key, make());
    return this.#remembered.get(key) as T;
  }

  /**
   * Runs `run` once, in a scope, times the candidates of everything it asked for and had no choice yet, and keeps the fastest.
   *
   * With `tune: "off"` it does nothing.
   */
  async tune(run: () => unknown, onTuned?: (tuning: Tuning) => void): Promise<Tuning[]> {
    if (!this.#store) return [];
    const noted = new Map<string, () => Question<Candidate>>();
    this.#noted = noted;
    try {
      this.#gpu.scope(() => {
        run();
      });
    } finally {
      this.#noted = undefined;
    }
    const tunings: Tuning[] = [];
    for (const [key, question] of noted) {
      const { candidates, trial } = question();
      const tuning = await this.#measure(key, candidates, trial());
      const chosen = candidates.find(({ name }) => name === tuning.chosen);
      if (chosen) this.#chosen.set(key, chosen);
      this.#remembered.clear();
      this.#names[key] = tuning.chosen;
      tunings.push(tuning);
      onTuned?.(tuning);
    }
    if (tunings.length > 0) {
      const all = parse(this.#store.load()); // another process may have written meanwhile
      all[this.#adapter] = { ...all[this.#adapter], ...this.#names };
      this.#store.save(`${JSON.stringify(all, undefined, 1)}\n`);
    }
    return tunings;
  }

  /**
   * Times the candidates in turns; the best of its turns is a candidate's time, for noise only ever adds. Those far behind after
   * one run take no further part.
   */
  async #measure(key: string, candidates: readonly Candidate[], trial: Trial<Candidate>): Promise<Tuning> {
    const gpu = this.#gpu;
    const timesMs: Record<string, number> = {};
    try {
      for (const candidate of candidates) {
        await gpu.time(() => trial.run(candidate)); // compiles
        timesMs[candidate.name] = await gpu.time(() => trial.run(candidate));
      }
      const best = Math.min(...Object.values(timesMs));
      const runs = Math.max(1, Math.min(MOST_RUNS, Math.ceil(BATCH_MS / Math.max(best, 1e-3))));
      const close = candidates.filter(({ name }) => (timesMs[name] ?? 0) <= FAR_BEHIND * Math.max(best, CLOCK_MS));
      for (let turn = 0; turn < TURNS; turn++)
        for (const candidate of close) {
          const ms = await gpu.time(() => {
            for (let i = 0; i < runs; i++) trial.run(candidate);
          });
          timesMs[candidate.name] = Math.min(
            turn === 0 ? Number.POSITIVE_INFINITY : (timesMs[candidate.name] ?? 0),
            ms / runs,
          );
        }
    } finally {
      trial.done();
    }
    const [fastest] = candidates.toSorted((a, b) => (timesMs[a.name] ?? 0) - (timesMs[b.name] ?? 0));
    return { key, chosen: fastest?.name ?? "", timesMs };
  }
}

const TURNS = 3;
/** Some clocks tell no less: a run may seem to take none. */
const CLOCK_MS = 0.1;
const BATCH_MS = 5;
const FAR_BEHIND = 3;
const MOST_RUNS = 200;

/** Choices by adapter. What cannot be read is as good as nothing: it will be measured again. */
function parse(text: string | undefined): Record<string, Choices> {
  try {
    const value: unknown = JSON.parse(text ?? "{}");
    return typeof value === "object" && value !== null ? (value as Record<string, Choices>) : {};
  } catch {
    return {};
  }
}

/** `tune.json` in LOWRANK_CACHE or the user's cache directory, or `localStorage`. undefined where there is neither. */
export function defaultTuneStore(): TuneStore | undefined {
  const get = (globalThis as { process?: NodeJS.Process }).process?.getBuiltinModule;
  if (!get) {
    const storage = (globalThis as { localStorage?: Storage }).localStorage;
    return storage && { load: () => storage.getItem(KEY) ?? undefined, save: (text) => storage.setItem(KEY, text) };
  }
  const [fs, os, path] = [get("fs"), get("os"), get("path")];
  const root =
    process.env.LOWRANK_CACHE ?? path.join(process.env.XDG_CACHE_HOME ?? path.join(os.homedir(), ".cache"), "lowrank");
  const file = path.join(root, "tune.json");
  return {
    load: () => (fs.existsSync(file) ? fs.readFileSync(file, "utf8") : undefined),
    save: (text) => {
      try {
        fs.mkdirSync(root, { recursive: true });
        const partial = `${file}.${process.pid}`;
        fs.writeFileSync(partial, text);
        fs.renameSync(partial, file);
      } catch (error) {
        const reason = error instanceof Error ? error.message : String(error);
        throw new GpuError(
          `tune: what was tuned must be kept in ${file}, got ${reason}. Set LOWRANK_CACHE to a directory`,
        );
      }
    },
  };
}

const KEY = "lowrank tune";
