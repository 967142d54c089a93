import { defineKernel, definePart, type Part, type Tuned } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { blockRows, dims2, empty, expectDType, expectShape, slice, type Tensor } from "../tensor/tensor.ts";
import expandSource from "./lora-expand-rows.wgsl";
import shrinkSource from "./lora-shrink-rows.wgsl";
import rowsSource from "./parts/lora-rows.wgsl";
import pagesF16Source from "./parts/pages-f16.wgsl";
import raggedXSource from "./parts/ragged-x.wgsl";

const shrink = defineKernel("lora-shrink-rows", shrinkSource);
const expand = defineKernel("lora-expand-rows", expandSource);
const ROWS = definePart("lora-rows", rowsSource);
const PAGES_F16 = definePart("pages-f16", pagesF16Source);
/** Of products too: x whose rows are not a multiple of 4 elements. */
export const RAGGED_X: Part = definePart("ragged-x", raggedXSource);

/** Each row of a product by its own adapter: (x·wᵀ + Σ_j u_j·b[page_j])∘(1 + b[gain]) before bias, activation and residual. */
export interface LowRankRows {
  /** Of `loraShrinkRows`, for this module. */
  readonly u: Tensor;
  /** [pages, 4·⌈N/4⌉] in f32, or [pages, 2·⌈N/4⌉] words (i32) of two f16: page p has a row of s·Bᵀ, or DoRA's m/‖W + s·B·A‖ − 1. */
  readonly b: Tensor;
}

/** Words of a page's row of so many elements: whole fours, as f32 or packed f16. */
export const pageWords = (elements: number, dtype: "f32" | "f16"): number =>
  Math.ceil(elements / 4) * (dtype === "f16" ? 2 : 4);

const dtypeOf = ({ dtype }: Tensor): "f32" | "f16" => (dtype === "i32" ? "f16" : "f32");

/**
 * u[g,t,j] = Σ_k a[page_j,g,k]·x[t,k]: each row of x by A of its own adapter, for G modules that read the same x, in one dispatch.
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
  shrink(gpu, { M, K, G, R, P }, { x, a, table, slots, u }, [M * WG, Math.ceil(R / TJ), G], { TJ, WG }, parts);
  return Array.from({ length: G }, (_, g) => slice(u, g * P * 2 * (1 + R), [M, 2 * (1 + R)]));
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

/** Fours of a row that a workgroup of `loraExpandRows` makes at most: TN × its threads. */
const EXPAND = { TN: 8, WG: 4 };

/** Adds them to a finished product y [M,N] in place, N a multiple of 4. What an epilogue reads comes with its parts. */
export function loraExpandRows(y: Tensor, { u, b }: LowRankRows, { parts, tuned, reads }: Epilogue): void {
  const N = y.shape.at(-1) ?? 0;
  const threads = [Math.ceil(N / 4 / EXPAND.TN), y.size / N] as const;
  const uniforms = { N, low: (u.shape.at(-1) ?? 0) / 2 };
  expand(y.gpu, uniforms, { u, b, y, ...reads }, threads, { ...EXPAND, ...tuned }, [...pageParts(b), ...parts]);
}

/** Throws ShapeError unless u and b are for a product [M,N]. */
export function checkLowRankRows(op: string, { u, b }: LowRankRows, M: number, N: number): void {
  const [pages = 0] = b.shape;
  expectShape(op, "u of rows must be [M,2·(1+R)]", u, [M, u.shape.at(-1) ?? 0]);
  expectDType(op, "u of rows", u, "f32");
  expectShape(op, "b of rows must be [pages,words of N]", b, [pages, pageWords(N, dtypeOf(b))]);
}
