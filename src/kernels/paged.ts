/** Attention over keys and values in pages: see paged-write.wgsl and paged-attention.wgsl. */
import { defineKernel, definePart, type Part } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import narrowSource from "./narrow16.wgsl";
import attentionSource from "./paged-attention.wgsl";
import combineSource from "./paged-combine.wgsl";
import copySource from "./paged-copy.wgsl";
import writeSource from "./paged-write.wgsl";
import teamSource from "./parts/attention-team.wgsl";
import halfSource from "./parts/paged-f16.wgsl";

const write = defineKernel("paged-write", writeSource);
const copy = defineKernel("paged-copy", copySource);
const attention = defineKernel("paged-attention", attentionSource);
const combine = defineKernel("paged-combine", combineSource);
const TEAM = definePart("attention-team", teamSource, [
  ...["tile", "rows", "unit_of", "meet", "share", "shared_at", "share_row", "row_at"],
]);
const NARROW = [
  definePart("paged-f16", halfSource, ["Cached", "narrow"]),
  definePart("to-f16", narrowSource, ["round_off", "to_f16"]),
];
const WIDEN = definePart("paged-f16", halfSource, ["Cached", "widened"]);

/** Keys and values of a layer: f32 [P,page,G,D], or i32 words of two f16 each, [P,page,G,D/2]. */
export interface Pages {
  readonly k: Tensor;
  readonly v: Tensor;
}

/** Which pages tokens belong to. Values are not looked at: a page or a position out of range reads and writes anywhere in the pages. */
export interface PagedTokens {
  /** i32 [T]: the row of `tables` of each token, or −1 for a token that does not count. */
  readonly sequences: Tensor;
  /** i32 [T]: of each token within its sequence, from 0. */
  readonly positions: Tensor;
  /** i32 [S,most]: the pages of each sequence, in order. */
  readonly tables: Tensor;
}

function check(op: string, { k, v }: Pages, tokens: PagedTokens, T: number, G: number, D: number): { bits: number } {
  const [P = 0, page = 0] = k.shape;
  const width = k.dtype === "i32" ? D / 2 : D;
  if (D % 4 !== 0) throw new ShapeError(`${op}: D must be a multiple of 4, got ${D}`);
  const bits = Math.log2(page);
  if (!Number.isInteger(bits)) throw new ShapeError(`${op}: a page must hold a power of two of tokens, got ${page}`);
  expectShape(op, "k must be [P,page,G,D] (D/2 words of f16)", k, [P, page, G, width]);
  expectShape(op, "v must have the shape of k", v, k.shape);
  expectDType(op, "v", v, k.dtype);
  for (const name of ["sequences", "positions", "tables"] as const) expectDType(op, name, tokens[name], "i32");
  expectShape(op, "sequences must be [T]", tokens.sequences, [T]);
  expectShape(op, "positions must be [T]", tokens.positions, [T]);
  if (tokens.tables.shape.length !== 2)
    throw new ShapeError(`${op}: tables must be [S,most], got [${tokens.tables.shape}]`);
  return { bits };
}

/** Puts keys and values, each [T,G,D], into their places, in one dispatch. Throws ShapeError if the shapes do not fit. */
export function pagedWrite(keys: Tensor, values: Tensor, pages: Pages, tokens: PagedTokens): void {
  const [T = 0, G = 0, D = 0] = keys.shape;
  const { bits } = check("pagedWrite", pages, tokens, T, G, D);
  expectShape("pagedWrite", "values must have the shape of keys", values, keys.shape);
  const W4 = (G * D) / 4;
  const buffers = { keys, values, ...tokens, k_pages: pages.k, v_pages: pages.v };
  const parts: readonly Part[] = pages.k.dtype === "i32" ? NARROW : [];
  write(keys.gpu, { n: T * W4, W4, most: tokens.tables.shape[1] ?? 0, bits }, buffers, [T * W4], {}, parts);
}

/** Copies whole pages: pairs i32 [n,2], of which each is (from, to); no page may be in two pairs. Throws ShapeError if the shapes do not fit. */
export function pagedCopy({ k, v }: Pages, pairs: Tensor): void {
  const [n = 0] = pairs.shape;
  expectShape("pagedCopy", "pairs must be [n,2]", pairs, [n, 2]);
  expectDType("pagedCopy", "pairs", pairs, "i32");
  expectShape("pagedCopy", "v must have the shape of k", v, k.shape);
  const W = k.size / (k.shape[0] ?? 1);
  copy(k.gpu, { n: n * W, W }, { pairs, k, v }, [n * W]);
}

/** How attention over pages is computed. */
export interface PagedPlan {
  /** Query heads of a key head and tokens of a sequence, all of whose rows share what they read. */
  readonly heads: number;
  readonly tokens: number;
  /** Parts of a token's keys that are worked on at the same time. */
  readonly splits: number;
}

const MOST_ROWS = 8;
/** Fewer tokens are taken to be of a sequence each. */
const PROMPT = 64;
/** SHARE of the kernel. */
const SHARE = 128;

/**
 * For T tokens' H query heads over G key heads and sequences of which a token sees up to `longest` keys: tiles of up to 8 rows, heads
 * first, and as many splits as make 1024 workgroups, of at least 128 keys of the longest sequence each. On a CPU adapter, 16 threads.
 */
export function pagedPlan(isSoftware: boolean, T: number, H: number, G: number, longest: number): PagedPlan {
  const heads = Math.max(...[1, 2, 3, 4, 5, 6, 7, 8].filter((n) => (H / G) % n === 0));
  const tokens = T < PROMPT ? 1 : Math.floor(MOST_ROWS / heads);
  const units = Math.ceil(T / tokens) * (H / heads);
  const splits = Math.floor(Math.min((isSoftware ? 16 : 1024) / units, longest / SHARE));
  return { heads, tokens, splits: Math.max(1, splits) };
}

export interface PagedAttentionOptions {
  /** 1/√D unless given. */
  readonly scale?: number | undefined;
  /** How many keys up to its own position a token sees; all unless given. */
  readonly window?: number | undefined;
  /** c > 0: a score x becomes c·tanh(x/c). */
  readonly softCap?: number | undefined;
  /** `pagedPlan` unless given. */
  readonly plan?: PagedPlan | undefined;
}

/**
 * Causal attention of each token over the keys of its sequence, with grouped queries: q [T,H,D] → o [T,H,D]. No gradient.
 *
 * Throws ShapeError if the shapes do not fit.
 */
export function pagedAttention(
  q: Tensor,
  pages: Pages,
  tokens: PagedTokens,
  { scale, window, softCap, plan }: PagedAttentionOptions = {},
): Tensor {
  const { gpu } = q;
  const [T = 0, H = 0, D = 0] = q.shape;
  const G = pages.k.shape[2] ?? 0;
  const { bits } = check("pagedAttention", pages, tokens, T, G, D);
  if (H % G !== 0)
    throw new ShapeError(`pagedAttention: query heads must be a multiple of key heads, got ${H} and ${G}`);
  if (window !== undefined && !(Number.isInteger(window) && window >= 1))
    throw new ShapeError(`pagedAttention: window must be a whole number of keys from 1 on, got ${window}`);
  if (softCap !== undefined && !(softCap > 0))
    throw new ShapeError(`pagedAttention: softCap must be above 0, got ${softCap}`);
  const { isSoftware } = gpu;
  const most = tokens.tables.shape[1] ?? 0;
  const longest = Math.min(window ?? Number.POSITIVE_INFINITY, most << bits);
  const { heads, tokens: together, splits } = plan ?? pagedPlan(isSoftware, T, H, G, longest);
  if ((H / G) % heads !== 0)
    throw new ShapeError(`pagedAttention: plan.heads must divide ${H / G} heads of a key head, got ${heads}`);
  const o = empty(gpu, q.shape, "pagedAttention");
  const parted = splits > 1 ? empty(gpu, [splits, T, H, D + 4], "pagedAttention") : o;
  const [WX, WG] = isSoftware ? [1, 8] : [32, 32];
  const parts = [...(isSoftware ? [] : [TEAM]), ...(pages.k.dtype === "i32" ? [WIDEN] : [])];
  const n = (splits * together * Math.ceil(T / together) * H) / heads;
  const uniforms = {
    n,
    T,
    H,
    G,
    D,
    most,
    bits,
    window: longest,
    splits,
    s: scale ?? 1 / Math.sqrt(D),
    c: softCap ?? 1,
  };
  const buffers = { q, k: pages.k, v: pages.v, ...tokens, o: parted };
  const tuned = { R: heads * together, HEADS: heads, WX, WG, CAP: softCap ? 1 : 0 };
  attention(gpu, uniforms, buffers, [isSoftware ? n : n * WG], tuned, parts);
  if (splits === 1) return o;
  const vectors = (T * H * D) / 4;
  combine(gpu, { n: vectors, D4: D / 4, splits }, { parts: parted, o }, [vectors]);
  return o;
}
