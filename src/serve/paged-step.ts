/** The device's side of generation for many: one forward pass over tokens of any sequences. */
import type { Gpu } from "../gpu/gpu.ts";
import type { Plan } from "../gpu/plan.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { pagedCopy } from "../kernels/paged.ts";
import { TOP, topLogits } from "../kernels/top-logits.ts";
import type { PagedRow } from "../models/causal.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, slice, type Tensor, tensor, VIEW_ALIGNMENT, view } from "../tensor/tensor.ts";
import { choicesOf, type RowChoices } from "./row-choices.ts";

/** What generation for many needs of a model. */
export interface PagedModel {
  readonly gpu: Gpu;
  readonly config: {
    readonly contextLength: number;
    readonly vocabSize: number;
    readonly eosIds: readonly number[];
    readonly layers: number;
    readonly kvHeads: number;
    readonly headDim: number;
  };
  pagedLogits(ids: Tensor, paged: PagedRow, rows: Tensor): Tensor;
}

/** Puts adapters into a forward pass whose rows have the slots in an i32 tensor [T], −1 for the base. */
export interface RowAdapters {
  during<T>(slots: Tensor, run: () => T): T;
}

export interface CacheSettings {
  /** Tokens that all sequences may have together. */
  readonly tokens: number;
  /** Tokens of a page, a power of two. */
  readonly pageTokens: number;
  /** Sequences at a time. */
  readonly sequences: number;
  /** The longest of them. */
  readonly contextLength: number;
  /** How keys and values are kept. */
  readonly format: "f32" | "f16";
  /**
   * Who finds the likeliest tokens of a row. Unless given the host on software adapters, which read rows back for the price of a copy and take 40
   * times as long as the host to find them; else the device.
   */
  readonly choices?: "device" | "host" | undefined;
}

/** A row of a pass whose next token is asked for. */
export interface AskedRow {
  /** Among the tokens of the pass. */
  readonly at: number;
  /** Of `RowChoices.temperedRest`, above 0. */
  readonly temperature: number;
  /** Whether all its logits are wanted. */
  readonly isWhole: boolean;
}

/** One token of a pass. */
export interface StepToken {
  readonly id: number;
  readonly position: number;
  /** Row of the page table. */
  readonly sequence: number;
  /** Of its adapter, or −1. */
  readonly slot: number;
}

/** Bytes of the key-value cache. */
export function cacheBytes({ config }: Pick<PagedModel, "config">, { tokens, format }: CacheSettings): number {
  const perToken = 2 * config.layers * config.kvHeads * config.headDim * (format === "f16" ? 2 : 4);
  return tokens * perToken;
}

const MOST_PLANS = 32;
const INPUTS = ["ids", "positions", "sequences", "slots", "rows"] as const;

/** Sizes that passes are rounded up to, so that there are few plans: 1, 2, 3, 4, 6, 8, 12, 16, 24, … */
function rounded(n: number): number {
  const power = 2 ** Math.ceil(Math.log2(n));
  return n <= 0.75 * power && power >= 4 ? 0.75 * power : power;
}

/** The cache in pages and the passes over it, each traced once for its sizes and replayed. */
export class PagedStep {
  readonly pages: number;
  readonly #model: PagedModel;
  readonly #adapters: RowAdapters | undefined;
  readonly #layers: PagedRow["layers"];
  readonly #tables: Tensor;
  readonly #contextLength: number;
  readonly #most: number;
  readonly #plans = new Map<string, { readonly plan: Plan; readonly inputs: Tensor; readonly logits: Tensor }>();
  readonly #workspace: GPUBuffer[] = [];
  readonly #choices: "device" | "host";
  /** The logits of the last pass. */
  #logits: Tensor | undefined;

  /** Throws ShapeError for settings out of range, GpuError where the cache does not fit. */
  constructor(model: PagedModel, settings: CacheSettings, adapters?: RowAdapters) {
    const { tokens, pageTokens, sequences, contextLength, format } = settings;
    const { gpu, config } = model;
    const { kvHeads, headDim } = config;
    if (!Number.isInteger(Math.log2(pageTokens)))
      throw new ShapeError(`cache: pageTokens must be a power of two, got ${pageTokens}`);
    this.#model = model;
    this.#adapters = adapters;
    this.#choices = settings.choices ?? (gpu.isSoftware ? "host" : "device");
    this.#contextLength = contextLength;
    this.pages = Math.ceil(tokens / pageTokens);
    this.#most = Math.ceil(contextLength / pageTokens);
    const layerBytes = cacheBytes({ config: { ...config, layers: 1 } }, settings) / 2;
    const limit = gpu.limits.maxStorageBufferBindingSize;
    if (layerBytes > limit)
      throw new ShapeError(
        `cache: keys of one layer must fit into ${limit} bytes on this device, got ${layerBytes} for ${tokens} tokens. Keep fewer tokens, or f16`,
      );
    const one = (): Tensor =>
      format === "f16"
        ? empty(gpu, [this.pages, pageTokens, kvHeads, headDim / 2], "key-value pages", "i32")
        : empty(gpu, [this.pages, pageTokens, kvHeads, headDim], "key-value pages");
    this.#layers = Array.from({ length: config.layers }, () => ({ k: one(), v: one() }));
    this.#tables = tensor(gpu, new Int32Array(sequences * this.#most), [sequences, this.#most]);
    try {
      this.#planFor(1, 1); // a model that cannot be served says so here
    } catch (error) {
      this.destroy();
      throw error;
    }
  }

  /** Bytes that traced passes keep for the next ones of their sizes. */
  get planBytes(): number {
    const own = [...this.#plans.values()].flatMap(({ inputs, logits }) => [inputs.buffer, logits.buffer]);
    return [...own, ...this.#workspace].reduce((sum, { size }) => sum + size, 0);
  }

  /** Says which pages a sequence has. */
  setPages(sequence: number, pages: readonly number[]): void {
    this.#model.gpu.write(this.#tables, Int32Array.from(pages), 4 * sequence * this.#most);
  }

  /** Copies pages, none of which may be in two pairs. */
  copyPages(pairs: readonly (readonly [from: number, to: number])[]): void {
    if (pairs.length === 0) return;
    const { gpu } = this.#model;
    gpu.scope(() => {
      const all = tensor(gpu, Int32Array.from(pairs.flat()), [pairs.length, 2]);
      for (const layer of this.#layers) pagedCopy(layer, all);
    });
  }

  /**
   * One pass: keys and values of the tokens go into the cache, and the logits [V] of those at `rows` come back, in that order. Tokens of a
   * sequence must be in order and follow what its cache has.
   */
  async run(tokens: readonly StepToken[], rows: readonly number[]): Promise<Float32Array[]> {
    this.#pass(tokens, rows);
    return this.readRows([...rows.keys()]);
  }

  /** A pass as `run`, of whose rows only what a choice mostly takes comes back: in one readback. */
  async choices(tokens: readonly StepToken[], asked: readonly AskedRow[]): Promise<RowChoices[]> {
    const { gpu, config } = this.#model;
    const logits = this.#pass(
      tokens,
      asked.map(({ at }) => at),
    );
    const [N, V] = [asked.length, config.vocabSize];
    if (N === 0) return [];
    if (this.#choices === "host") {
      const rows = await this.readRows([...asked.keys()]);
      return rows.map((row, i) => choicesOf(row, asked[i]?.temperature ?? 1));
    }
    const temperatures = tensor(
      gpu,
      asked.map(({ temperature }) => temperature),
      [N],
    );
    const lists = topLogits(slice(logits, 0, [N, V]), temperatures);
    const whole = [...asked.keys()].filter((i) => asked[i]?.isWhole);
    const reading = gpu.read([lists, ...whole.map((i) => this.#row(i))]);
    gpu.release(temperatures, lists);
    const [words = new ArrayBuffer(0), ...rows] = await reading;
    return asked.map((_, i) => {
      const at = i * 4 * (lists.shape[1] ?? 0);
      const count = Math.min(TOP, V);
      const [rest = Number.NaN, temperedRest = Number.NaN] = new Float32Array(words, at + 8 * TOP, 2);
      const row = rows[whole.indexOf(i)];
      return {
        ids: new Int32Array(words, at, count),
        logits: new Float32Array(words, at + 4 * TOP, count),
        ...{ rest, temperedRest, isAll: V <= TOP },
        ...(row && { row: new Float32Array(row) }),
      };
    });
  }

  /** All logits [V] of some rows of the last pass, by their places among those that it was asked for. */
  async readRows(rows: readonly number[]): Promise<Float32Array[]> {
    if (rows.length === 0) return [];
    const read = await this.#model.gpu.read(rows.map((i) => this.#row(i)));
    return read.map((bytes) => new Float32Array(bytes));
  }

  #row(i: number): { buffer: GPUBuffer; offsetBytes: number; sizeBytes: number } {
    const sizeBytes = 4 * this.#model.config.vocabSize;
    return { buffer: (this.#logits as Tensor).buffer, offsetBytes: i * sizeBytes, sizeBytes };
  }

  /** Encodes a pass, whose logits come first in what is returned. */
  #pass(tokens: readonly StepToken[], rows: readonly number[]): Tensor {
    const { gpu } = this.#model;
    const [T, N] = [rounded(tokens.length), rounded(Math.max(1, rows.length))];
    const { plan, inputs, logits } = this.#planFor(T, N);
    const width = inputs.shape[1] ?? 0;
    const values = new Int32Array(inputs.size);
    const put = (line: number, list: readonly number[], rest: number): void => {
      values.fill(rest, line * width, (line + 1) * width);
      values.set(list, line * width);
    };
    put(
      0,
      tokens.map(({ id }) => id),
      0,
    );
    put(
      1,
      tokens.map(({ position }) => position),
      0,
    );
    put(
      2,
      tokens.map(({ sequence }) => sequence),
      -1,
    );
    put(
      3,
      tokens.map(({ slot }) => slot),
      -1,
    );
    put(4, rows, 0);
    gpu.write(inputs, values);
    plan.run();
    this.#logits = logits;
    return logits;
  }

  destroy(): void {
    for (const one of this.#plans.values()) this.#forget(one);
    const { gpu } = this.#model;
    gpu.release(this.#tables, ...this.#layers.flatMap(({ k, v }) => [k, v]));
    gpu.release(...this.#workspace.map((buffer) => ({ buffer })));
  }

  #planFor(T: number, N: number): { readonly plan: Plan; readonly inputs: Tensor; readonly logits: Tensor } {
    const key = `${T} ${N}`;
    const found = this.#plans.get(key);
    if (found) {
      this.#plans.delete(key); // and to the end: the first is the one that was not used for longest
      this.#plans.set(key, found);
      return found;
    }
    const { gpu, config } = this.#model;
    const width = Math.ceil((4 * Math.max(T, N)) / VIEW_ALIGNMENT) * (VIEW_ALIGNMENT / 4);
    const inputs = tensor(gpu, new Int32Array(INPUTS.length * width), [INPUTS.length, width]);
    const logits = empty(gpu, [N, config.vocabSize], "logits");
    const line = (name: (typeof INPUTS)[number], length: number): Tensor =>
      slice(inputs, INPUTS.indexOf(name) * width, [length]);
    const paged: PagedRow = {
      layers: this.#layers,
      contextLength: this.#contextLength,
      sequences: line("sequences", T),
      positions: line("positions", T),
      tables: this.#tables,
    };
    const forward = (): void => {
      const y = this.#model.pagedLogits(view(line("ids", T), [1, T]), paged, line("rows", N));
      copyTo(y, logits);
    };
    const step = (): void => (this.#adapters ? this.#adapters.during(line("slots", T), forward) : forward());
    let plan: Plan;
    try {
      plan = gpu.trace(step, this.#workspace);
    } catch (error) {
      gpu.release(inputs, logits);
      throw error;
    }
    const made = { plan, inputs, logits };
    this.#plans.set(key, made);
    const [oldest] = this.#plans;
    if (this.#plans.size > MOST_PLANS && oldest) {
      this.#plans.delete(oldest[0]);
      this.#forget(oldest[1]);
    }
    return made;
  }

  #forget({ plan, inputs, logits }: { readonly plan: Plan; readonly inputs: Tensor; readonly logits: Tensor }): void {
    plan.destroy();
    this.#model.gpu.release(inputs, logits);
  }
}
