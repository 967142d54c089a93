import type { Gpu, HasBuffer } from "../gpu/gpu.ts";
import { defineKernel, definePart, type Part } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { empty, expectDType, expectShape, rowsOf, type Shape, type Tensor, view } from "../tensor/tensor.ts";
import { narrow16 } from "./cast.ts";
import {
  checkLowRankRows,
  type Epilogue,
  type LowRankRows,
  loraExpandRows,
  lowRankRowParts,
  RAGGED_X,
} from "./lora-rows.ts";
import {
  defaultPlan,
  type MatmulPlan,
  type MatmulShape,
  mostOperations,
  plans,
  shapeClass,
  suits,
  unitsTile,
} from "./matmul-plans.ts";
import registersSource from "./matmul-registers.wgsl";
import rowsSource from "./matmul-rows.wgsl";
import splitsSource from "./matmul-splits.wgsl";
import tiledSource from "./matmul-tiled.wgsl";
import unitsSource from "./matmul-units.wgsl";
import blockedSource from "./parts/blocked.wgsl";
import epilogueSource from "./parts/epilogue.wgsl";
import halfSource from "./parts/half.wgsl";
import levelsSource from "./parts/nf4-levels.wgsl";
import quadsSource from "./parts/quads.wgsl";
import raggedLowSource from "./parts/ragged-low.wgsl";
import raggedWSource from "./parts/ragged-w.wgsl";
import raggedYSource from "./parts/ragged-y.wgsl";
import subgroupSumsSource from "./parts/subgroup-sums.wgsl";
import unarySource from "./unary.wgsl";
import { unpackMatrix, withPlainScales } from "./unpack.ts";
import { weightParts } from "./weight-parts.ts";

const tiled = defineKernel("matmul-tiled", tiledSource);
const registers = defineKernel("matmul-registers", registersSource);
const rows = defineKernel("matmul-rows", rowsSource);
const units = defineKernel("matmul-units", unitsSource);
const splits = defineKernel("matmul-splits", splitsSource);

const NF4_LEVELS = definePart("nf4-levels", levelsSource);
const RAGGED_W = definePart("ragged-w", raggedWSource);
const RAGGED_LOW = [definePart("ragged-low", raggedLowSource), definePart("low-elements", tiledSource, ["u4", "b4"])];
const RAGGED_Y = definePart("ragged-y", raggedYSource);
const BLOCKED_X = definePart("blocked-x", blockedSource, ["x_at"]);
const BLOCKED_Y = definePart("blocked-y", blockedSource, ["y_at"]);
const HALF = definePart("half", halfSource);
const QUADS = definePart("quads", quadsSource);
const SUBGROUP_SUMS = definePart("subgroup-sums", subgroupSumsSource);
const EPILOGUE = [
  definePart("epilogue", epilogueSource),
  definePart("activation", unarySource, ["OP", "ROOT", "CUBIC", "sigmoid", "normal", "activate"]),
];
const ACTIVATIONS = { silu: 0, gelu: 1, geluTanh: 2 } as const;

/** BLAS letters for (x, w): "n" as stored, "t" transposed. */
export type Layout = "nn" | "nt" | "tn";

/** R more columns of the product: `scale · u·b`, with u [M,R] and b [R,N] (stored [N,R] under "nt"). */
export interface LowRank {
  readonly u: Tensor;
  readonly b: Tensor;
  readonly scale: number;
}

export interface MatmulOptions {
  /** Factor on x·w; 1 unless given. */
  readonly scale?: number;
  readonly lowRank?: LowRank;
  /** Another low-rank term for each row of y, and a factor on their sum: of one product without `lowRank`. */
  readonly lowRankRows?: LowRankRows;
  /** [N], added to every row. */
  readonly bias?: Tensor;
  /** Applied after the bias: x·σ(x), x·Φ(x), or the latter's approximation by tanh. */
  readonly activation?: keyof typeof ACTIVATIONS;
  /** Of y's shape, added last. */
  readonly residual?: Tensor;
  /** Where y goes, of its shape and in no operand's buffer; a new tensor unless given. */
  readonly out?: Tensor;
  /**
   * The columns of y, or of x under "tn", are in G blocks, each a matrix of its own: y is `out` [G,P,N/G], whose rows from the M-th on
   * keep their content, or x is [G,P,M/G], whose rows from the K-th on are not read.
   */
  readonly blocked?: boolean;
  /** How to compute it, in place of the tuned or the documented default plan. */
  readonly plan?: MatmulPlan;
}

/**
 * y = act(scale·op(x)·op(w) + lowRank.scale·u·b + bias) + residual, one dispatch (two where k is split; several, by rows, where it takes
 * long). With `lowRankRows` what is added to the product, and its factor, are each row's own: part of it, or on CPU adapters a pass after it.
 *
 * "nn": x [M,K], w [K,N]. "nt": x [M,K], w [N,K]. "tn": x [K,M], w [K,N]. All give y [M,N]. Further leading axes are batches:
 * those of x and w must be equal, or w has none and serves every batch (x's are then rows of one product). A low-rank term
 * and batches exclude each other. w may be a packed matrix, which is widened as it is read (NF4 on software adapters before: `isWidenedFirst`). f32
 * throughout, sums included.
 * Throws ShapeError if the shapes do not fit.
 */
export function matmul(
  x: Tensor,
  w: Tensor | PackedMatrix,
  layout: Layout = "nn",
  options: MatmulOptions = {},
): Tensor {
  const { gpu } = x;
  const { scale = 1, lowRank, lowRankRows, blocked = false } = options;
  const { M, N, K, batch, shape } = sizes(blocked && layout === "tn" ? joined(x, w) : x.shape, w, layout);
  const R = lowRank?.u.shape.at(-1) ?? 0;
  expectDType("matmul", "x", x, "f32");
  if (!isPacked(w)) expectDType("matmul", "w", w, "f32");
  if (lowRank) {
    if (batch > 1)
      throw new ShapeError(`matmul: a low-rank term needs unbatched operands, got x [${x.shape}] and w [${w.shape}]`);
    expectShape("matmul", "u must be [M,R]", lowRank.u, [
      ...(lowRank.u.shape.length > 2 ? shape.slice(0, -1) : [M]),
      R,
    ]);
    const [rule, b] = layout === "nt" ? ["b must be [N,R]", [N, R]] : ["b must be [R,N]", [R, N]];
    expectShape("matmul", rule as string, lowRank.b, b as number[]);
  }
  if (lowRankRows) {
    if (batch > 1 || lowRank)
      throw new ShapeError(
        `matmul: low-rank terms by rows need one product without another such term, got x [${x.shape}] and w [${w.shape}]${lowRank ? " with one" : ""}`,
      );
    checkLowRankRows("matmul", lowRankRows, M, N);
  }
  if (options.bias) expectShape("matmul", "bias must be [N]", options.bias, [N]);
  if (options.residual) expectShape("matmul", "residual must have the shape of y", options.residual, shape);
  if (blocked && layout !== "tn") {
    if (!options.out) throw new ShapeError("matmul: blocked columns of y need an out, got none");
    const [G = 1, P = 0] = options.out.shape;
    expectShape("matmul", "out must be [G,P,N/G], P at least M,", options.out, [G, Math.max(P, batch * M), N / G]);
  } else if (options.out) expectShape("matmul", "out must have the shape of y", options.out, shape);
  const y = options.out ?? empty(gpu, shape, "matmul");
  if (y.size === 0) return y;
  if (lowRankRows && gpu.isSoftware && !options.plan && !blocked && N % 4 === 0) {
    matmul(x, w, layout, { scale, out: y });
    loraExpandRows(y, lowRankRows, epilogueOf(options, x));
    return y;
  }
  if (isPacked(w) && !options.plan && isWidenedFirst(w, M)) {
    gpu.scope(() => void matmul(x, unpackMatrix(w), layout, { ...options, out: y }));
    return y;
  }
  const isBlocked = blocked && (layout === "tn" ? x : y).shape[0] !== 1;
  const product: MatmulShape = { layout, M, N, K, R, batch, format: isPacked(w) ? w.format : "f32", isBlocked };
  const key = `matmul ${layout} ${product.format} ${M} ${N} ${K} ${R} ${batch}${isBlocked ? " blocked" : ""}`;
  const plan = options.plan ?? gpu.tuner.remember(key, () => choosePlan(gpu, product));
  if (!suits(plan, product))
    throw new ShapeError(
      `matmul: the plan "${plan.name}" takes whole tiles of one product with f32 or f16 weights, got "${layout}" ${M}×${N}×${K} of rank ${R}, ${batch} in all, ${product.format}. Leave the plan out`,
    );
  const most = layout === "tn" || batch > 1 || blocked ? M : rowsAtATime(gpu, product);
  gpu.scope(() => {
    const stored = isPacked(w) && M > READ_ONCE ? withPlainScales(w) : w;
    if (most >= M) return run(gpu, product, plan, x, stored, y, options);
    for (let first = 0; first < M; first += most) {
      const count = Math.min(most, M - first);
      const part = (t: Tensor): Tensor => rowsOf(view(t, [M, t.size / M]), first, count);
      const { residual } = options;
      run(gpu, { ...product, M: count }, plan, part(x), stored, part(y), {
        ...options,
        ...(lowRank && { lowRank: { ...lowRank, u: part(lowRank.u) } }),
        ...(lowRankRows && { lowRankRows: { ...lowRankRows, u: part(lowRankRows.u) } }),
        ...(residual && { residual: part(residual) }),
      });
    }
  });
  return y;
}

/**
 * Whether such a product of M rows makes an f32 copy of w for as long as it takes. A software adapter widens NF4 by arithmetic that nothing hides, once
 * for each tile of rows; from so many rows on, once for all is less. The copy has bounds: what 4 bits save is memory.
 */
const isWidenedFirst = ({ gpu, format, shape: [N, K] }: PackedMatrix, M: number): boolean =>
  gpu.isSoftware && format === "nf4" && M >= 128 && N * K <= 2 ** 22;

/** Rows up to which each element of w is read once: with more, scales that are quantised too are made f32 before. */
const READ_ONCE = 16;

/** Rows of y that one dispatch may compute, so that no page or driver waits for it too long. Whole tiles of every plan, and views of whole rows. */
function rowsAtATime(gpu: Gpu, { N, K, R }: MatmulShape): number {
  const step = 128;
  return Math.max(1, Math.floor(mostOperations(gpu) / (2 * N * Math.max(1, K + R)) / step)) * step;
}

/** The tuned plan, or the default one. A class of shapes holds some that not all its plans suit. */
function choosePlan(gpu: Gpu, product: MatmulShape): MatmulPlan {
  const tuned = gpu.tuner.choose(shapeClass(product), () => ({
    candidates: plans(gpu, product),
    trial: () => trial(gpu, product),
  }));
  return tuned && suits(tuned, product) ? tuned : defaultPlan(gpu, product);
}

/** What is done to finished elements: parts of a kernel, their constants, and what they read (x where nothing is). */
function epilogueOf({ bias, activation, residual }: MatmulOptions, x: Tensor): Epilogue {
  const reads = { bias: bias ?? x, residual: residual ?? x };
  if (!bias && !activation && !residual) return { parts: [], tuned: {}, reads };
  const tuned = {
    ...{ BIAS: bias ? 1 : 0, RESIDUAL: residual ? 1 : 0 },
    ...{ ACT: activation ? 1 : 0, OP: activation ? ACTIVATIONS[activation] : 0 },
  };
  return { parts: EPILOGUE, tuned, reads };
}

/** Encodes the product by a plan into y. */
function run(
  gpu: Gpu,
  { layout, M, N, K, R, batch }: MatmulShape,
  plan: MatmulPlan,
  x: Tensor,
  w: Tensor | PackedMatrix,
  y: Tensor,
  options: MatmulOptions,
): void {
  const { scale = 1, lowRank, lowRankRows, blocked } = options;
  const { u, b } = lowRankRows ?? lowRank ?? { u: x, b: x };
  const { tuned } = plan;
  const [X_T, W_T] = [layout === "tn" ? 1 : 0, layout === "nt" ? 1 : 0];
  const packed = isPacked(w) ? w : undefined;
  const [G = 1, P = 0, block = 0] = blocked ? (X_T ? x : y).shape : [];
  const operandParts = [
    ...((X_T ? M / G : K) % 4 === 0 ? [] : [RAGGED_X]),
    ...(packed || (W_T ? K : N) % 4 === 0 ? [] : [RAGGED_W]),
    ...(G > 1 && X_T ? [BLOCKED_X] : []),
  ];
  const raggedY = (columns: number): readonly Part[] => (columns % 4 === 0 ? [] : [RAGGED_Y]);
  const blockedY = G > 1 && !X_T ? [BLOCKED_Y] : [];
  const yParts = [...raggedY(blockedY.length > 0 ? block : N), ...blockedY];
  const rowPairs = (lowRankRows?.u.shape[1] ?? 0) / 2;
  // The kernels compute s·(x·w + c·u·b).
  const [k, s, c] = scale === 0 && lowRank ? [0, 1, lowRank.scale] : [K, scale, (lowRank?.scale ?? 0) / scale];
  const uniforms = {
    ...{ M, N, K: k, R, s, c: lowRank ? c : 0, x_batch: M * K, w_batch: K * N },
    ...{ splits: plan.splits, group_bits: Math.log2(packed?.group ?? 1), block, block_size: P * block, low: rowPairs },
  };
  const weight = packed ? weightParts(packed) : [];
  const levels = packed?.format === "nf4" ? [NF4_LEVELS] : [];
  const epilogue = epilogueOf(options, x);
  const finish = {
    parts: [...(lowRankRows ? lowRankRowParts(lowRankRows) : []), ...epilogue.parts],
    tuned: epilogue.tuned,
  };
  const rest = { u, b, ...epilogue.reads };
  const buffers: Record<string, HasBuffer> = {
    ...{ x, w: packed?.words ?? (w as Tensor), y, scales: packed?.scales ?? x },
    ...rest,
  };
  const addUp = (sums: Tensor, pieces: number): void => {
    const n = batch * M * N;
    const dims = { n, M, N, P: pieces, block, block_size: P * block, low: rowPairs };
    splits(gpu, dims, { parts: sums, y, ...rest }, [n], finish.tuned, [...blockedY, ...finish.parts]);
  };
  const { TM = 1, TN = 1 } = tuned;
  const LOW_RANK = R > 0 ? 1 : 0;

  switch (plan.family) {
    case "tiled": {
      const parts = [...weight, ...levels, ...operandParts, ...(plan.half ? [HALF] : [])];
      const threads = [Math.ceil(N / TN), Math.ceil(M / TM), batch * plan.splits] as const;
      const variant = { ...tuned, X_T, W_T, LOW_RANK };
      if (plan.splits === 1) {
        tiled(gpu, uniforms, buffers, threads, { ...variant, ...finish.tuned }, [...parts, ...yParts, ...finish.parts]);
        return;
      }
      gpu.scope(() => {
        const sums = empty(gpu, [batch, plan.splits, M, N], "matmul");
        tiled(gpu, uniforms, { ...buffers, y: sums }, threads, variant, [...parts, ...raggedY(N)]);
        addUp(sums, plan.splits);
      });
      return;
    }
    case "registers": {
      const low = R % 4 === 0 && (R === 0 || W_T || N % 4 === 0) ? [] : RAGGED_LOW;
      const parts = [
        ...weight,
        ...operandParts,
        ...low,
        ...yParts,
        ...(plan.subgroups ? [QUADS] : []),
        ...finish.parts,
      ];
      const variant = { ...tuned, READS: plan.subgroups ? 1 : 2, X_T, W_T, LOW_RANK, ...finish.tuned };
      const threads = [4 * Math.ceil(N / (2 * TN)), Math.ceil(M / (2 * TM)), batch] as const;
      registers(gpu, uniforms, buffers, threads, variant, parts);
      return;
    }
    case "units": {
      const tile = unitsTile(tuned);
      const threads = [(N / tile.N) * (tuned.WG ?? 1), M / tile.M] as const;
      gpu.scope(() => {
        const left = narrow16(x, "f16");
        const right = packed?.words ?? narrow16(w as Tensor, "f16");
        const pair = lowRank ? { u: narrow16(u, "f16"), b: narrow16(b, "f16") } : { u: left, b: left };
        const isFinished = finish.parts.length === 0;
        const sums = isFinished ? y : empty(gpu, y.shape, "matmul");
        units(gpu, uniforms, { x: left, w: right, ...pair, y: sums }, threads, { ...tuned, X_T, W_T });
        if (!isFinished) addUp(sums, 1);
      });
      return;
    }
    case "rows": {
      const sums = plan.subgroups ? [SUBGROUP_SUMS] : [];
      const parts = [...weight, ...levels, ...operandParts, ...blockedY, ...sums, ...finish.parts];
      const threads = [Math.ceil(N / TN) * (tuned.WG ?? 1), Math.ceil(M / TM), batch] as const;
      rows(gpu, uniforms, buffers, threads, { ...tuned, LOW_RANK, ...finish.tuned }, parts);
    }
  }
}

/** Operands of such a product, for the tuner to time plans on. */
function trial(
  gpu: Gpu,
  product: MatmulShape,
): { readonly run: (plan: MatmulPlan) => void; readonly done: () => void } {
  const { layout, M, N, K, R, batch, format } = product;
  const pair = (m: number, n: number): number[] => [...(batch > 1 ? [batch] : []), m, n];
  const x = empty(gpu, layout === "tn" ? pair(K, M) : pair(M, K), "tune");
  const [a, c] = layout === "nt" ? [N, K] : [K, N];
  const bits = { f32: 32, f16: 16, bf16: 16, int8: 8, nf4: 4 }[format];
  const store = empty(gpu, [Math.ceil((a * c * batch * bits) / 32)], "tune", format === "f32" ? "f32" : "i32");
  const scales = empty(gpu, [Math.ceil((a * c) / 64)], "tune");
  const lowRank = {
    u: empty(gpu, [M, R], "tune"),
    b: empty(gpu, layout === "nt" ? [N, R] : [R, N], "tune"),
    scale: 1,
  };
  const y = empty(gpu, pair(M, N), "tune");
  const buffers = [x, store, scales, lowRank.u, lowRank.b, y];
  // Operands near 1: zeros run faster than data on some devices, and what was left in a buffer may be denormal.
  for (const t of buffers) gpu.write(t, noise(t.sizeBytes));
  const w: Tensor | PackedMatrix =
    format === "f32" ? store : { gpu, format, shape: [a, c], words: store, scales, group: 64, doubleQuant: false };
  return {
    run: (plan) => run(gpu, product, plan, x, w, y, R > 0 ? { lowRank } : {}),
    done: () => gpu.release(...buffers),
  };
}

function noise(sizeBytes: number): Float32Array {
  return Float32Array.from({ length: sizeBytes / 4 }, (_, i) => ((i * 2654435761) % 1024) / 1024 - 0.5);
}

/** [K,M], what x of G blocks [G,P,M/G] is one matrix of. */
function joined(x: Tensor, w: Tensor | PackedMatrix): Shape {
  const [G = 1, P = 0, columns = 0] = x.shape;
  const K = w.shape[0] ?? 0;
  expectShape("matmul", "x must be [G,P,M/G], P at least K,", x, [G, Math.max(P, K), columns]);
  return [K, G * columns];
}

function sizes(x: Shape, w: Tensor | PackedMatrix, layout: Layout) {
  if (layout === "tn" && isPacked(w))
    throw new ShapeError(`matmul: a packed w takes "nn" or "nt", got "tn" with w [${w.shape}]`);
  if (x.length < 2 || w.shape.length < 2)
    throw new ShapeError(`matmul: x and w must have at least two axes, got [${x}] and [${w.shape}]`);
  const [wa = 0, wb = 0] = w.shape.slice(-2);
  const [N, K] = layout === "nt" ? [wa, wb] : [wb, wa];
  const lead = x.slice(0, -2);
  const [xa = 0, xb = 0] = x.slice(-2);
  const fold = w.shape.length === 2 && layout !== "tn"; // leading axes of x are more rows of one product
  const [M, xK] = layout === "tn" ? [xb, xa] : [fold ? lead.reduce((a, b) => a * b, xa) : xa, xb];
  if (xK !== K)
    throw new ShapeError(
      `matmul: the inner sizes of "${layout}" must be equal, got x [${x}] with ${xK} and w [${w.shape}] with ${K}`,
    );
  const batches = w.shape.slice(0, -2);
  if (!fold && `${batches}` !== `${lead}`)
    throw new ShapeError(`matmul: the leading axes of x and w must be equal, got x [${x}] and w [${w.shape}]`);
  return fold
    ? { M, N, K, batch: 1, shape: [...x.slice(0, -1), N] }
    : { M, N, K, batch: lead.reduce((a, b) => a * b, 1), shape: [...lead, M, N] };
}
