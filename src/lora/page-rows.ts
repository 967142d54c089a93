/** An adapter as rows of pages: what an `AdapterPool` copies to the device. Host only. */
import { encodeFloats } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { pageWords } from "../kernels/lora-rows.ts";
import { listSome } from "../nn/checkpoint.ts";
import type { Linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import { settingsOf } from "./config.ts";
import type { HasLinears } from "./parts.ts";
import type { PlainAdapter, PlainModule } from "./plain-adapter.ts";
import { tablesOf } from "./tables.ts";

/** How values of pages are stored. */
export type PageDtype = "f32" | "f16";

/** Modules that read one input, whose A's share pages. */
export interface PageGroup {
  readonly K: number;
  readonly modules: readonly { readonly name: string; readonly layer: Linear; readonly N: number }[];
}

/** The linear layers of a model by what they read, each once. */
export function pageGroups({ linears, groups = [] }: HasLinears): PageGroup[] {
  const grouped = new Set(groups.flat());
  return [...groups, ...[...linears.keys()].filter((name) => !grouped.has(name)).map((name) => [name])].flatMap(
    (names) => {
      const modules = names.flatMap((name) => {
        const layer = linears.get(name);
        return layer ? [{ name, layer, N: layer.weight.shape[0] ?? 0 }] : [];
      });
      const [first] = modules;
      return first ? [{ K: first.layer.weight.shape[1] ?? 0, modules }] : [];
    },
  );
}

/** Rows for consecutive pages, in the pool's type; undefined where all of them are zeros. */
type Rows = Uint8Array<ArrayBuffer> | undefined;

export interface PageRows {
  /** The largest of its modules. */
  readonly rank: number;
  /** Whether a page follows for DoRA's m/‖W + s·B·A‖ − 1. */
  readonly hasGain: boolean;
  /** By group: A [rank,G,K], and for each module s·Bᵀ [rank,N], with the gain a row more. */
  readonly groups: readonly { readonly a: Rows; readonly b: readonly Rows[] }[];
  readonly sizeBytes: number;
}

/** Pages that the adapter takes. */
export const pagesOf = ({ rank, hasGain }: Pick<PageRows, "rank" | "hasGain">): number => rank + (hasGain ? 1 : 0);

/** The largest rank of its modules, and whether it is a DoRA. */
export function extentOf({ modules }: PlainAdapter): Pick<PageRows, "rank" | "hasGain"> {
  const all = [...modules.values()];
  return { rank: Math.max(...all.map(({ A }) => A.rows)), hasGain: all.some(({ magnitude }) => magnitude) };
}

/**
 * Throws FormatError for what an adapter has beside pairs and magnitudes of linear layers, and for modules that the model does not have or
 * has in other sizes.
 */
export function demandMixable(name: string, adapter: PlainAdapter, model: HasLinears): void {
  const { modules, embeddings = new Set(), others = new Map() } = adapter;
  const tables = tablesOf(model);
  const strange = [
    ...[...modules].flatMap(([module, { loraBias, bias }]) => [
      ...(loraBias ? [`a bias of B of ${module}`] : []),
      ...(bias ? [`a bias of ${module}`] : []),
      ...(embeddings.has(module) || tables.has(module) ? [`LoRA of ${module}`] : []),
    ]),
    ...[...others.keys()].map((other) => `a trained ${other}`),
  ];
  if (strange.length > 0)
    throw new FormatError(
      `register: "${name}" must be LoRA or DoRA of linear layers alone to be mixed with others, got ${listSome(strange, 3)}. Use it alone, or merge it into a model of its own`,
    );
  const unknown = [...modules.keys()].filter((module) => !model.linears.has(module));
  if (unknown.length > 0)
    throw new FormatError(
      `register: the modules of "${name}" must be linear layers of the model, got ${listSome(unknown, 3)}. Is it an adapter of this model?`,
    );
  for (const [module, { A, B }] of modules) {
    const [N, K] = model.linears.get(module)?.weight.shape ?? [];
    if (B.rows !== N || A.columns !== K)
      throw new FormatError(
        `register: ${module} of "${name}" must be of a layer [${N},${K}], got one of [${B.rows},${A.columns}]. Is it an adapter of this model?`,
      );
  }
}

/**
 * The rows of an adapter. `gains` are DoRA's factors by module name.
 *
 * Throws ShapeError where a value is beyond f16 and pages are in that.
 */
export function pageRows(
  name: string,
  adapter: PlainAdapter,
  groups: readonly PageGroup[],
  dtype: PageDtype,
  gains: ReadonlyMap<string, Float32Array>,
): PageRows {
  const { rank, hasGain } = extentOf(adapter);
  let sizeBytes = 0;
  const encode = (values: Float32Array): Rows => {
    if (dtype === "f16" && values.some((value) => !(Math.abs(value) < LEAST_BEYOND_F16)))
      throw new ShapeError(
        `register: values of "${name}" must be below ${LEAST_BEYOND_F16} in a pool in f16, got one beyond. Make the pool in f32`,
      );
    const bytes = encodeFloats(dtype === "f16" ? "F16" : "F32", values);
    sizeBytes += bytes.byteLength;
    return bytes;
  };
  const made = groups.map(({ K, modules }) => {
    const found = modules.map(({ name: module }) => adapter.modules.get(module));
    return {
      a: found.some((one) => one) ? encode(rowsOfA(found, rank, K)) : undefined,
      b: modules.map(({ name: module, N }, g) => {
        const own = found[g];
        if (!own) return undefined;
        return encode(
          rowsOfB(own, settingsOf(adapter.config, module).scale, rank + (hasGain ? 1 : 0), N, gains.get(module)),
        );
      }),
    };
  });
  return { rank, hasGain, groups: made, sizeBytes };
}

/** 65519.99… is the last that rounds to f16's largest. */
const LEAST_BEYOND_F16 = 65520;

/** Elements of a row of f32, and of f16 alike: whole fours. */
const padded = (elements: number): number => pageWords(elements, "f32");

function rowsOfA(modules: readonly (PlainModule | undefined)[], rank: number, K: number): Float32Array {
  const [G, stride] = [modules.length, padded(K)];
  const rows = new Float32Array(rank * G * stride);
  for (const [g, module] of modules.entries())
    for (let j = 0; j < (module?.A.rows ?? 0); j++)
      rows.set((module as PlainModule).A.values.subarray(j * K, (j + 1) * K), (j * G + g) * stride);
  return rows;
}

function rowsOfB({ B }: PlainModule, s: number, count: number, N: number, gain?: Float32Array): Float32Array {
  const stride = padded(N);
  const rows = new Float32Array(count * stride);
  const r = B.columns;
  for (let n = 0; n < N; n++) for (let j = 0; j < r; j++) rows[j * stride + n] = s * (B.values[n * r + j] as number);
  const last = (count - 1) * stride;
  if (gain) for (let n = 0; n < N; n++) rows[last + n] = (gain[n] as number) - 1;
  return rows;
}
