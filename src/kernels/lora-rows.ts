import { defineKernel, definePart, type Part, type Tuned } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { blockRows, dims2, empty, expectDType, expectShape, slice, type Tensor } from "../tensor/tensor.ts";
import expandSource from "./lora-expand-rows.wgsl";
import shrinkSource from "./lora-shrink-rows.wgsl";
import rowsSource from "./parts/lora-rows.wgsl";
import pagesF16Source from "./parts/pages-f16.wgsl";
import raggedXSource from "./parts/ragged-x.wgsl";
import unitPartSource from "./parts/row-units.wgsl";
import unitsSource from "./row-units.wgsl";

const shrink = defineKernel("lora-shrink-rows", shrinkSource);
const expand = defineKernel("lora-expand-rows", expandSource);
const findUnits = defineKernel("row-units", unitsSource);
const ROWS = definePart("lora-rows", rowsSource);
const UNITS = definePart("row-units", unitPartSource);
const PAGES_F16 = definePart("pages-f16", pagesF16Source);
/** Of products too: x whose rows are not a multiple of 4 elements. */
export const RAGGED_X: Part = definePart("ragged-x", raggedXSource);

/** Each row of a product by its own adapter: (x·wᵀ + Σ_j u_j·b[page_j])∘(1 + b[gain]) before bias, activation and residual. */
export interface LowRankRows {
  /** Of `loraShrinkRows`, for this module. */
  readonly u: Tensor;
  /** [pages, 4·⌈N/4⌉] in f32, or [pages, 2·⌈N/4⌉] words (i32) of two f16: page p has a row of s·Bᵀ, or DoRA's m/‖W + s·B·A‖ − 1. */
  readonly b: Tensor;
  /** Of `rowUnits`, for CPU adapters. */
  readonly units?: Tensor | undefined;
}

/** Words of a page's row of so many elements: whole fours, as f32 or packed f16. */
export const pageWords = (elements: number, dtype: "f32" | "f16"): number =>
  Math.ceil(elements / 4) * (dtype === "f16" ? 2 : 4);

const dtypeOf = ({ dtype }: Tensor): "f32" | "f16" => (dtype === "i32" ? "f16" : "f32");

/**
 * u[g,t,j] = Σ_k a[page_j,g,k]·x[t,k]: each row of x by A of its own adapter, for G modules that read the same x, in one dispatch (two with
 * units, which do not change a bit).
 *
 * x [...,K]   a [pages,G,4·⌈K/4⌉] f32, zeros from K on, or packed f16 (i32, half as many words)   table [slots,R+2] i32: rank, the page of
 * DoRA's gain or −1, pages   slots [M] i32, −1: none   →   for each module u [M,2·(1+R)], which has what `LowRankRows` needs of the rows.
 *
 * A row costs what its own rank does. No uniform depends on the adapters: a traced step takes others when table, slots and pages change.
 * Slots and pages are not checked. Throws ShapeError if the shapes do not fit.
 */
export function loraShrinkRows(
  x: Tensor,
  a: Tensor,
  table: Tensor,
  slots: Tensor,
  units?: Tensor,
  { TJ, WG }: ShrinkPlan = SHRINKS[x.gpu.isSoftware ? "software" : "hardware"],
): Tensor[] {
  const { gpu } = x;
  const [M, K] = dims2("loraShrinkRows", "x", x);
  const [pages = 0, G = 0] = a.shape;
  const R = (table.shape[1] ?? 0) - 2;
  expectDType("loraShrinkRows", "x", x, "f32");
  expectShape("loraShrinkRows", "a must be [pages,G,words of K]", a, [pages, G, pageWords(K, dtypeOf(a))]);
  expectDType("loraShrinkRows", "table", table, "i32");
  if (table.shape.length !== 2 || R < 1)
    throw new ShapeError(`loraShrinkRows: table must be [slots,R+2], R at least 1, got [${table.shape}]`);
  expectDType("loraShrinkRows", "slots", slots, "i32");
  expectShape("loraShrinkRows", "slots must be [M]", slots, [M]);
  const P = G === 1 ? M : blockRows(M, 2 * (1 + R));
  const u = empty(gpu, [G, P, 2 * (1 + R)], "loraShrinkRows");
  const parts = [...(K % 4 === 0 ? [] : [RAGGED_X]), ...pageParts(a)];
  for (const { TM, unitParts, reads } of rowTiles("loraShrinkRows", units, M)) {
    const threads = [M * WG, Math.ceil(R / TJ), G] as const;
    const buffers = { x, a, table, slots, u, ...reads };
    shrink(gpu, { M, K, G, R, P }, buffers, threads, { TM, TJ, WG }, [...parts, ...unitParts]);
  }
  return Array.from({ length: G }, (_, g) => slice(u, g * P * 2 * (1 + R), [M, 2 * (1 + R)]));
}

/**
 * [M+1,4] i32: which rows `loraShrinkRows` and a product compute together, so that they read an adapter's pages once. Of M slots. A row has the
 * same bits whatever others there are.
 */
export function rowUnits(slots: Tensor): Tensor {
  const made = empty(slots.gpu, [slots.size + 1, 4], "rowUnits", "i32");
  findUnits(slots.gpu, { M: slots.size }, { slots, units: made }, [1]);
  return made;
}

/** The dispatches that take all rows: each alone, or with units those that are alone and those that are not. */
function rowTiles(op: string, units: Tensor | undefined, M: number) {
  if (!units) return [{ TM: 1, unitParts: [], reads: {} }];
  expectDType(op, "units", units, "i32");
  expectShape(op, "units must be [M+1,4]", units, [M + 1, 4]);
  return [1, 4].map((TM) => ({ TM, unitParts: [UNITS], reads: { units } }));
}

/** Values of a row that a workgroup makes, and its threads. */
export type ShrinkPlan = Readonly<Record<"TJ" | "WG", number>>;

/** On a CPU adapter lanes read along k, so that a cache line is used up at once. */
export const SHRINKS: Readonly<Record<"hardware" | "software", ShrinkPlan>> = {
  hardware: { TJ: 4, WG: 64 },
  software: { TJ: 8, WG: 4 },
};

const pageParts = (pages: Tensor): readonly Part[] => (dtypeOf(pages) === "f16" ? [PAGES_F16] : []);

/** What a product takes to add it. */
export const lowRankRowParts = ({ b }: LowRankRows): readonly Part[] => [ROWS, ...pageParts(b)];

/** What a kernel does to finished elements. */
export interface Epilogue {
  readonly parts: readonly Part[];
  readonly tuned: Tuned;
  readonly reads: Readonly<Record<string, Tensor>>;
}

/** Rows to a loop of a workgroup's, where it takes units: those of the other kind it goes through for nothing, so there are few. */
const ROWS_LOOPED = 16;

/** Adds them to a finished product y [M,N] in place, N a multiple of 4, where a CPU adapter would gather for an epilogue of the product. */
export function loraExpandRows(y: Tensor, { u, b, units }: LowRankRows, { parts, tuned, reads }: Epilogue): void {
  const N = y.shape.at(-1) ?? 0;
  const M = y.size / N;
  const uniforms = { M, N, low: (u.shape.at(-1) ?? 0) / 2 };
  for (const { TM, unitParts, reads: unitReads } of rowTiles("loraExpandRows", units, M)) {
    const TN = TM > 1 ? 4 : 8;
    const threads = [N / 4 / TN, units ? Math.ceil(M / ROWS_LOOPED) : M] as const;
    const buffers = { u, b, y, ...unitReads, ...reads };
    expand(y.gpu, uniforms, buffers, threads, { TM, TN, ...tuned }, [...pageParts(b), ...unitParts, ...parts]);
  }
}

/** Throws ShapeError unless u and b are for a product [M,N]. */
export function checkLowRankRows(op: string, { u, b }: LowRankRows, M: number, N: number): void {
  const [pages = 0] = b.shape;
  expectShape(op, "u of rows must be [M,2·(1+R)]", u, [M, u.shape.at(-1) ?? 0]);
  expectDType(op, "u of rows", u, "f32");
  expectShape(op, "b of rows must be [pages,words of N]", b, [pages, pageWords(N, dtypeOf(b))]);
}
