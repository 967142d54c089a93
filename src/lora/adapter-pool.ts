/** Many adapters of one model at once: each row of a batch by its own. */
import { matmul as product } from "../autograd/basic-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import { doraNorms } from "../kernels/dora.ts";
import { loraShrinkRows, pageWords, rowUnits } from "../kernels/lora-rows.ts";
import { matmul } from "../kernels/matmul.ts";
import { type LinearAdapter, linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import { dims2, empty, expectDType, readAll, type Tensor, tensor, view } from "../tensor/tensor.ts";
import { settingsOf } from "./config.ts";
import { rowSquares } from "./dora-linear.ts";
import { demandRoom, enter, type Guest, leave } from "./members.ts";
import {
  demandMixable,
  extentOf,
  type PageDtype,
  type PageGroup,
  type PageRows,
  pageGroups,
  pageRows,
  pagesOf,
} from "./page-rows.ts";
import type { HasLinears } from "./parts.ts";
import type { PlainAdapter } from "./plain-adapter.ts";

export interface PoolOptions {
  /** Ranks that are resident together at most; a DoRA adapter takes one more. */
  readonly pages: number;
  /** The largest rank of an adapter. What a batch costs depends on the ranks of its own adapters, not on this. */
  readonly maxRank: number;
  /** Adapters that are resident together at most; as many as pages unless given. */
  readonly slots?: number;
  /** How pages are stored; f32 unless given. f16 halves them and rounds A, s·B and DoRA's m/n − 1. */
  readonly dtype?: PageDtype;
}

export interface PoolCounts {
  readonly registered: number;
  readonly resident: number;
  /** Residents that are in use. */
  readonly used: number;
  readonly freePages: number;
  /** Copies to the device, and residents that had to go, since the pool was made. */
  readonly loads: number;
  readonly evictions: number;
  /** Of the pool, and of the registered adapters' copies. */
  readonly gpuBytes: number;
  readonly hostBytes: number;
}

/** Bytes that a pool takes on the GPU for linear layers W [N,K], as `linearSizes` has them: pages · Σ (K + N), and its table. */
export function poolBytes(
  sizes: Iterable<readonly number[]>,
  { pages, maxRank, slots = pages, dtype = "f32" }: PoolOptions,
): number {
  let words = 0;
  for (const [N = 0, K = 0] of sizes) words += pageWords(N, dtype) + pageWords(K, dtype);
  return 4 * (pages * words + slots * (maxRank + 2));
}

/** A group's pages on the device. */
interface Pages {
  readonly group: PageGroup;
  /** [pages,G,words of K] */
  readonly a: Tensor;
  /** [pages,words of N] */
  readonly b: readonly Tensor[];
}

/** Of a pass: slots [M], and which of them are computed together. */
interface Rows {
  readonly slots: Tensor;
  readonly units: Tensor | undefined;
}

interface Resident {
  readonly slot: number;
  /** By rank, then the gain's. */
  readonly pages: readonly number[];
  uses: number;
}

/**
 * Adapters of one model, of which many are registered (on the host), some resident (in pages on the GPU), and any of those in one batch:
 * y = (x·Wᵀ + Σ_j u_j·b[page_j])∘gain + bias, where rank, pages and gain are each row's own (`loraShrinkRows`, `LowRankRows`).
 *
 * A page holds one rank of every linear layer: a row of A and one of s·Bᵀ. Page numbers are the same for all layers, so any free pages will do
 * for any adapter. DoRA takes a page more for its factors. Loading an adapter writes pages and a row of a table: it waits for no batch, makes no
 * pipeline, and traced steps take it as they are.
 *
 * A row without an adapter has the bits that the model without the pool gives it in a batch of that size. Forward only.
 */
export class AdapterPool {
  /** The largest rank of an adapter. */
  readonly maxRank: number;
  readonly #gpu: Gpu;
  readonly #model: HasLinears;
  readonly #pageCount: number;
  readonly #dtype: PageDtype;
  readonly #pages: readonly Pages[];
  /** [slots, maxRank + 2]: rank, the gain's page or −1, pages. */
  readonly #table: Tensor;
  readonly #registered = new Map<string, PageRows>();
  /** Least recently used first. */
  readonly #residents = new Map<string, Resident>();
  /** In order. */
  readonly #freePages: number[];
  readonly #freeSlots: number[];
  readonly #guests: readonly Guest[];
  readonly #adapters: ReadonlyMap<string, LinearAdapter>;
  /** ‖W‖² of the rows of layers that DoRA was on. */
  readonly #squares = new Map<string, Tensor>();
  #isEnabled = false;
  #rows: Rows | undefined;
  #loads = 0;
  #evictions = 0;

  /**
   * Makes the pages; `enable` puts the pool to work. The weights of the model's linear layers must stay what they are.
   *
   * Throws ShapeError for counts that are no whole numbers above 0 and GpuError where the pages are too large.
   */
  constructor(model: HasLinears, { pages, maxRank, slots = pages, dtype = "f32" }: PoolOptions) {
    for (const [name, count] of Object.entries({ pages, maxRank, slots }))
      if (!Number.isInteger(count) || count < 1)
        throw new ShapeError(`AdapterPool: ${name} must be a whole number of at least 1, got ${count}`);
    const gpu = [...model.linears.values()][0]?.weight.gpu;
    if (!gpu) throw new ShapeError("AdapterPool: the model must have linear layers, got none");
    this.#gpu = gpu;
    this.#model = model;
    this.maxRank = maxRank;
    this.#pageCount = pages;
    this.#dtype = dtype;
    const stored = dtype === "f16" ? "i32" : "f32";
    const made = gpu.scope(() => ({
      table: tensor(gpu, new Int32Array(slots * (maxRank + 2)), [slots, maxRank + 2]),
      pages: pageGroups(model).map((group) => ({
        a: empty(gpu, [pages, group.modules.length, pageWords(group.K, dtype)], "AdapterPool", stored),
        b: group.modules.map(({ N }) => empty(gpu, [pages, pageWords(N, dtype)], "AdapterPool", stored)),
      })),
    }));
    this.#table = made.table;
    this.#pages = pageGroups(model).map((group, i) => ({ group, ...(made.pages[i] as Omit<Pages, "group">) }));
    this.#freePages = Array.from({ length: pages }, (_, page) => page);
    this.#freeSlots = Array.from({ length: slots }, (_, slot) => slot);
    this.#guests = [...model.linears].map(([name, layer]) => ({ name, modules: [layer], adds: () => false }));
    this.#adapters = new Map(this.#pages.flatMap((of) => this.#adaptersOf(of)));
  }

  /** Of the registered adapters. */
  get names(): string[] {
    return [...this.#registered.keys()];
  }

  get counts(): PoolCounts {
    const residents = [...this.#residents.values()];
    const sum = (sizes: readonly number[]): number => sizes.reduce((a, b) => a + b, 0);
    return {
      registered: this.#registered.size,
      resident: residents.length,
      used: residents.filter(({ uses }) => uses > 0).length,
      freePages: this.#freePages.length,
      loads: this.#loads,
      evictions: this.#evictions,
      gpuBytes: sum(this.#owned().map(({ sizeBytes }) => sizeBytes)),
      hostBytes: sum([...this.#registered.values()].map(({ sizeBytes }) => sizeBytes)),
    };
  }

  /**
   * Takes a copy of the adapter, as rows of pages, under this name. DoRA's factors are computed on the device, once: hence a promise. Without
   * them the adapter is there as soon as the call returns.
   *
   * Throws FormatError for what cannot be mixed (trained copies and biases, rows of tokens, LoRA of an embedding or the head) and for modules
   * that the model does not have; ShapeError for a name that is taken and for a rank that the pool has no room for.
   */
  async register(name: string, adapter: PlainAdapter): Promise<void> {
    this.#demandFree(name);
    demandMixable(name, adapter, this.#model);
    const extent = extentOf(adapter);
    if (extent.rank > this.maxRank)
      throw new ShapeError(
        `register: the rank of "${name}" must be at most ${this.maxRank}, got ${extent.rank}. Make the pool with a larger maxRank, or merge the adapter into a model of its own`,
      );
    if (pagesOf(extent) > this.#pageCount)
      throw new ShapeError(
        `register: "${name}" must fit ${this.#pageCount} pages, got ${pagesOf(extent)}. Make the pool with more pages`,
      );
    const gains = extent.hasGain ? await this.#gains(adapter) : new Map<string, Float32Array>();
    this.#demandFree(name);
    const groups = this.#pages.map(({ group }) => group);
    this.#registered.set(name, pageRows(name, adapter, groups, this.#dtype, gains));
  }

  #demandFree(name: string): void {
    if (this.#registered.has(name))
      throw new ShapeError(`register: names must differ, got "${name}" again. Unregister the other first`);
  }

  /** m/‖W + s·B·A‖ of every module that has a magnitude. */
  async #gains({ modules, config }: PlainAdapter): Promise<Map<string, Float32Array>> {
    const gpu = this.#gpu;
    const gains = new Map<string, Tensor>();
    for (const [module, { A, B, magnitude: m }] of modules) {
      const W = this.#model.linears.get(module)?.weight;
      if (!m || !W) continue;
      const squares = this.#squares.get(module) ?? rowSquares(W);
      this.#squares.set(module, squares);
      const matrix = ({ rows, columns, values }: typeof A): Tensor => tensor(gpu, values, [rows, columns]);
      const { scale } = settingsOf(config, module);
      const norms = () => doraNorms(W, matrix(A), matrix(B), squares, scale, tensor(gpu, m.values, [m.columns])).gain;
      gains.set(module, gpu.scope(norms));
    }
    try {
      const values = await readAll([...gains.values()]);
      return new Map([...gains.keys()].map((module, i) => [module, values[i] as Float32Array]));
    } finally {
      gpu.release(...gains.values());
    }
  }

  /** Forgets the adapter. Throws ShapeError for one that is not registered and while it is in use. */
  unregister(name: string): void {
    this.#demandKnown("unregister", name);
    const uses = this.#residents.get(name)?.uses ?? 0;
    if (uses > 0)
      throw new ShapeError(
        `unregister: "${name}" must be released first, got it in use ${uses === 1 ? "once" : `${uses} times`}`,
      );
    this.#drop(name);
    this.#registered.delete(name);
  }

  #demandKnown(call: string, name: string): PageRows {
    const rows = this.#registered.get(name);
    if (!rows) throw new ShapeError(`${call}: the adapter must be registered, got "${name}"`);
    return rows;
  }

  /**
   * Makes the adapter resident, for which those that were used least recently go if nobody uses them, and counts a use. Gives the slot that
   * rows name it by until as many `release`s; undefined, and nothing has changed, where there is no room as long as others are in use.
   *
   * Throws ShapeError for one that is not registered.
   */
  acquire(name: string): number | undefined {
    const rows = this.#demandKnown("acquire", name);
    const resident = this.#residents.get(name) ?? this.#load(name, rows);
    if (!resident) return undefined;
    resident.uses++;
    this.#touch(name, resident);
    return resident.slot;
  }

  /** Counts a use less. Throws ShapeError for a slot that nobody uses. */
  release(slot: number): void {
    const [name, resident] = [...this.#residents].find(([, one]) => one.slot === slot) ?? [];
    if (name === undefined || !resident?.uses) throw new ShapeError(`release: the slot must be in use, got ${slot}`);
    resident.uses--;
    this.#touch(name, resident);
  }

  #touch(name: string, resident: Resident): void {
    this.#residents.delete(name);
    this.#residents.set(name, resident);
  }

  #load(name: string, rows: PageRows): Resident | undefined {
    const count = pagesOf(rows);
    const idle = [...this.#residents].filter(([, { uses }]) => uses === 0);
    const lacks = (morePages: number, moreSlots: number): boolean =>
      this.#freePages.length + morePages < count || this.#freeSlots.length + moreSlots < 1;
    if (
      lacks(
        idle.reduce((sum, [, one]) => sum + one.pages.length, 0),
        idle.length,
      )
    )
      return undefined;
    for (const [other] of idle) {
      if (!lacks(0, 0)) break;
      this.#drop(other);
      this.#evictions++;
    }
    const pages = this.#takePages(count);
    const slot = this.#freeSlots.shift() as number;
    for (const [i, { a, b }] of this.#pages.entries()) {
      const from = rows.groups[i];
      this.#write(a, pages.slice(0, rows.rank), from?.a);
      for (const [g, to] of b.entries()) this.#write(to, pages, from?.b[g]);
    }
    const entry = Int32Array.of(
      rows.rank,
      rows.hasGain ? (pages[rows.rank] as number) : -1,
      ...pages.slice(0, rows.rank),
    );
    this.#gpu.write(this.#table, entry, 4 * slot * (this.maxRank + 2));
    this.#loads++;
    const resident = { slot, pages, uses: 0 };
    this.#residents.set(name, resident);
    return resident;
  }

  /** In a row where that can be had: a row is one copy. */
  #takePages(count: number): number[] {
    const free = this.#freePages;
    const isRun = (page: number, i: number): boolean => free[i + count - 1] === page + count - 1;
    return free.splice(Math.max(0, free.findIndex(isRun)), count);
  }

  /** Rows into pages, those in a row at once. */
  #write(to: Tensor, pages: readonly number[], rows: Uint8Array | undefined): void {
    const rowBytes = to.sizeBytes / this.#pageCount;
    let first = 0;
    for (let i = 1; i <= pages.length; i++) {
      if (pages[i] === (pages[i - 1] as number) + 1) continue;
      const bytes = rows?.subarray(first * rowBytes, i * rowBytes) ?? new Uint8Array((i - first) * rowBytes);
      this.#gpu.write(to, bytes, (pages[first] as number) * rowBytes);
      first = i;
    }
  }

  #drop(name: string): void {
    const resident = this.#residents.get(name);
    if (!resident) return;
    this.#residents.delete(name);
    this.#freePages.push(...resident.pages);
    this.#freePages.sort((a, b) => a - b);
    this.#freeSlots.push(resident.slot);
  }

  /** Puts the pool on the model's linear layers. Throws ShapeError where an adapter is on one of them, or is merged into it. */
  enable(): void {
    if (this.#isEnabled) return;
    demandRoom("enable", this, this.#guests);
    for (const guest of this.#guests) enter(this, guest);
    for (const [name, adapter] of this.#adapters) {
      const layer = this.#model.linears.get(name);
      if (layer) layer.adapters = [adapter];
    }
    this.#isEnabled = true;
  }

  /** The model computes as if the pool were not there. */
  disable(): void {
    if (!this.#isEnabled) return;
    for (const guest of this.#guests) leave(this, guest);
    for (const layer of this.#model.linears.values()) layer.adapters = undefined;
    this.#isEnabled = false;
  }

  /**
   * Runs a forward pass whose rows have these slots, −1 for none: i32, one for each row of what the layers read, [B,T] for tokens [B,T].
   * Outside of it the layers compute as without adapters.
   *
   * Throws ShapeError unless it is enabled, and while another pass runs.
   */
  during<T>(slots: Tensor, run: () => T): T {
    if (!this.#isEnabled || this.#rows)
      throw new ShapeError(
        `during: the pool must be enabled and idle, got it ${this.#rows ? "within another pass" : "disabled"}`,
      );
    expectDType("during", "slots", slots, "i32");
    const units = this.#gpu.isSoftware && slots.size > 1 ? rowUnits(slots) : undefined;
    this.#rows = { slots: view(slots, [slots.size]), units };
    try {
      return run();
    } finally {
      this.#rows = undefined;
      if (units) this.#gpu.release(units);
    }
  }

  #adaptersOf({ group: { modules }, a, b }: Pages): (readonly [string, LinearAdapter])[] {
    const layers = modules.map(({ layer }) => layer);
    const shrunk = (x: Tensor, { slots, units }: Rows): Tensor[] => {
      const [M] = dims2("AdapterPool", "x", x);
      if (M !== slots.size)
        throw new ShapeError(`AdapterPool: each row of x needs a slot, got ${slots.size} slots and x [${x.shape}]`);
      if (x.requiresGrad)
        throw new ShapeError(
          "AdapterPool: a pool is for inference, got an x that requires a gradient. Train by attachLora",
        );
      return loraShrinkRows(x, a, this.#table, slots, units);
    };
    const expanded = (x: Tensor, g: number, u: Tensor, W = layers[g]?.weight, bias = layers[g]?.bias): Tensor =>
      matmul(x, W as Tensor, "nt", {
        lowRankRows: { u, b: b[g] as Tensor, units: this.#rows?.units },
        ...(bias && { bias }),
      });
    const apply = (x: Tensor): Tensor[] => {
      const rows = this.#rows;
      if (!rows) return layers.map((layer) => linear(layer, x));
      return this.#gpu.scope(() => shrunk(x, rows).map((u, g) => expanded(x, g, u)));
    };
    return modules.map(({ name }, g) => [
      name,
      {
        apply: (x, W, bias) => {
          const rows = this.#rows;
          if (!rows) return product(x, W, "nt", bias);
          return this.#gpu.scope(() => expanded(x, g, shrunk(x, rows)[g] as Tensor));
        },
        add: () => {
          throw new ShapeError(`AdapterPool: a pool must be the only adapter of a layer, got another on ${name}`);
        },
        ...(layers.length > 1 && { group: { layers, apply } }),
      },
    ]);
  }

  #owned(): Tensor[] {
    return [this.#table, ...this.#pages.flatMap(({ a, b }) => [a, ...b]), ...this.#squares.values()];
  }

  /** Takes the pool off and frees what it has. */
  destroy(): void {
    this.disable();
    this.#gpu.release(...this.#owned());
    this.#registered.clear();
    this.#residents.clear();
  }
}
