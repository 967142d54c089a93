/** Several adapters whose rows go through their base in one batch. */
import type { Linear, LinearAdapter } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import { dims2, type Tensor } from "../tensor/tensor.ts";
import type { LoraAdapter } from "./adapter.ts";
import { type Lane, laneLinears } from "./lane-linear.ts";

/** A layer, or layers that read the same input and of which each adapter's A's are one matrix. */
interface Unit {
  readonly names: readonly string[];
  readonly layers: readonly Linear[];
}

/**
 * Adapters of one model, each of a rank, an alpha and values of its own, that compute at once: within `during` the first rows of a batch go through
 * the first adapter, the next ones through the second and so on, and each W of the base is multiplied once for all of them.
 *
 * They are disabled, and may be enabled, one or several, between two calls of `during`: to evaluate one, say.
 */
export class SharedBase {
  readonly adapters: readonly LoraAdapter[];
  readonly #units: readonly Unit[];

  /**
   * Throws ShapeError unless all of them only add B·A, without dropout, to the same linear layers of one model, whose sizes are multiples of
   * four, and none is merged or detached.
   */
  constructor(adapters: readonly LoraAdapter[]) {
    const [first] = adapters;
    if (!first || new Set(adapters).size !== adapters.length)
      throw new ShapeError(`SharedBase: each adapter must come once, got ${first ? "one twice" : "none"}`);
    for (const [i, adapter] of adapters.entries()) {
      const more = whatElse(adapter);
      if (more !== undefined)
        throw new ShapeError(
          `SharedBase: adapters of one batch only add B·A to linear layers, got ${more} in number ${i + 1}. Train it apart`,
        );
      demandSameLayers(first, adapter, i);
    }
    for (const [name, { layer }] of first.pairs)
      if (layer.weight.shape.some((size) => size % 4 !== 0))
        throw new ShapeError(
          `SharedBase: sizes of a layer must be multiples of 4, got ${name} [${layer.weight.shape}]. Train the adapters apart`,
        );
    for (const adapter of adapters) adapter.disable();
    this.adapters = adapters;
    this.#units = unitsOf(first, adapters);
  }

  /**
   * Runs f. The batches that go through the model meanwhile have `rows[i]` rows of adapter i, those of the first adapter first; an adapter with 0
   * rows takes no part. Throws ShapeError where an adapter is enabled on one of the layers, and for batches of other numbers of rows.
   */
  during<T>(rows: readonly number[], f: () => T): T {
    for (const { names, layers } of this.#units)
      layers.forEach((layer, i) => {
        if (layer.adapters)
          throw new ShapeError(`SharedBase: no adapter may be enabled meanwhile, got one on ${names[i]}. Disable it`);
      });
    for (const unit of this.#units) this.#hook(unit, rows);
    try {
      return f();
    } finally {
      for (const { layers } of this.#units) for (const layer of layers) layer.adapters = undefined;
    }
  }

  #hook({ names, layers }: Unit, rows: readonly number[]): void {
    const group = {
      layers,
      apply: (x: Tensor): Tensor[] => {
        const all = layers.map(({ weight: W, bias }) => ({ W, bias }));
        return laneLinears(x, all, this.#lanes(x, rows, names));
      },
    };
    layers.forEach((layer, i) => {
      const adapter: LinearAdapter = {
        apply: (x, W, bias) => laneLinears(x, [{ W, bias }], this.#lanes(x, rows, names.slice(i, i + 1)))[0] as Tensor,
        add: () => {
          throw new ShapeError(`SharedBase: no adapter may be enabled meanwhile, got one on ${names[i]}. Disable it`);
        },
        group,
      };
      layer.adapters = [adapter];
    });
  }

  #lanes(x: Tensor, rows: readonly number[], names: readonly string[]): Lane[] {
    const [M] = dims2("SharedBase", "x", x);
    const count = rows.reduce((sum, n) => sum + n, 0);
    if (rows.length !== this.adapters.length || x.shape[0] !== count)
      throw new ShapeError(
        `SharedBase: a batch must have the ${count} rows of its ${this.adapters.length} adapters, got [${x.shape}] and rows of ${rows.length}`,
      );
    let end = 0;
    return this.adapters.flatMap((adapter, i): Lane[] => {
      const own = ((rows[i] ?? 0) * M) / count;
      const first = end;
      end += own;
      const pairs = names.flatMap((name) => adapter.pairs.get(name) ?? []);
      const [pair] = pairs;
      if (own === 0 || !pair) return [];
      const A = pairs.length > 1 ? stackOf(adapter, names) : pair.A;
      return A ? [{ first, rows: own, A, pairs, scale: adapter.factor * pair.scale }] : [];
    });
  }
}

/** The A's of these layers as one matrix, where they are. */
const stackOf = ({ groups }: LoraAdapter, names: readonly string[]): Tensor | undefined =>
  groups.find((group) => String(group.names) === String(names))?.A;

function unitsOf({ pairs }: LoraAdapter, adapters: readonly LoraAdapter[]): Unit[] {
  const [first] = adapters;
  const together = (first?.groups ?? []).filter(({ names }) => adapters.every((adapter) => stackOf(adapter, names)));
  const grouped = new Set(together.flatMap(({ names }) => names));
  const alone = [...pairs.keys()].filter((name) => !grouped.has(name)).map((name) => [name]);
  return [...together.map(({ names }) => names), ...alone].map((names) => ({
    names,
    layers: names.flatMap((name) => pairs.get(name)?.layer ?? []),
  }));
}

/** What an adapter does besides adding B·A to linear layers, in words. */
function whatElse({ config, pairs, tables, saved, tokens, beginnings }: LoraAdapter): string | undefined {
  const found: Readonly<Record<string, boolean>> = {
    DoRA: [...pairs.values()].some(({ magnitude }) => magnitude),
    "a trained bias": [...pairs.values()].some(({ bias, loraBias }) => bias ?? loraBias),
    "a start from the base": beginnings.size > 0,
    dropout: (config.dropout ?? 0) > 0,
    "a trained copy": saved.size > 0,
    "LoRA of a table": tables.size > 0,
    "rows of tokens": tokens.size > 0,
  };
  return Object.keys(found).find((what) => found[what]);
}

function demandSameLayers(first: LoraAdapter, other: LoraAdapter, i: number): void {
  const differs = [...new Set([...first.pairs.keys(), ...other.pairs.keys()])].find(
    (name) => first.pairs.get(name)?.layer !== other.pairs.get(name)?.layer,
  );
  if (differs !== undefined)
    throw new ShapeError(
      `SharedBase: adapters of one batch must be on the same layers, got ${differs} in one of number 1 and number ${i + 1} alone. Train them apart`,
    );
}
