/**
 * Every kernel as it stands and every variant of the products that ships: what the compilers of all runtimes must accept. Portable.
 *
 * Variants are not listed by their parts: products are asked for, by plans and operands that take each path at least once, and what
 * would be sent to a device is kept.
 */

import adamw from "../../src/kernels/adamw.wgsl";
import addInto from "../../src/kernels/add-into.wgsl";
import {
  attentionBackwardKeyValue as attentionBackwardKeyValueOf,
  attentionBackwardQuery as attentionBackwardQueryOf,
  attention as attentionOf,
} from "../../src/kernels/attention.ts";
import attention from "../../src/kernels/attention.wgsl";
import attentionBackwardKv from "../../src/kernels/attention-backward-kv.wgsl";
import attentionBackwardQ from "../../src/kernels/attention-backward-q.wgsl";
import attentionDelta from "../../src/kernels/attention-delta.wgsl";
import { addInto as addIntoOf, axpy as axpyOf } from "../../src/kernels/axpy.ts";
import axpy from "../../src/kernels/axpy.wgsl";
import { binary as binaryOf, expand } from "../../src/kernels/binary.ts";
import binary from "../../src/kernels/binary.wgsl";
import clipFactor from "../../src/kernels/clip-factor.wgsl";
import copyRows from "../../src/kernels/copy-rows.wgsl";
import crossEntropyBackward from "../../src/kernels/cross-entropy-backward.wgsl";
import crossEntropyPiece from "../../src/kernels/cross-entropy-piece.wgsl";
import crossEntropyPieceBackward from "../../src/kernels/cross-entropy-piece-backward.wgsl";
import { gainBackward as gainBackwardOf, gain as gainOf } from "../../src/kernels/dora.ts";
import doraNorms from "../../src/kernels/dora-norms.wgsl";
import { addNoise as addNoiseOf, dropout as dropoutOf } from "../../src/kernels/dropout.ts";
import dropout from "../../src/kernels/dropout.wgsl";
import embedding from "../../src/kernels/embedding.wgsl";
import embeddingBackward from "../../src/kernels/embedding-backward.wgsl";
import gain from "../../src/kernels/gain.wgsl";
import gainBackward from "../../src/kernels/gain-backward.wgsl";
import { gatedBackward as gatedBackwardOf, gated as gatedOf } from "../../src/kernels/gated.ts";
import gated from "../../src/kernels/gated.wgsl";
import gatedBackward from "../../src/kernels/gated-backward.wgsl";
import { gatherRows as gatherRowsOf } from "../../src/kernels/gather-rows.ts";
import gatherRows from "../../src/kernels/gather-rows.wgsl";
import layerNorm from "../../src/kernels/layer-norm.wgsl";
import layerNormBackward from "../../src/kernels/layer-norm-backward.wgsl";
import layerNormBackwardWeight from "../../src/kernels/layer-norm-backward-weight.wgsl";
import { linearCrossEntropy as linearCrossEntropyOf } from "../../src/kernels/linear-cross-entropy.ts";
import { loraDy as loraDyOf, loraDyPlans } from "../../src/kernels/lora-dy.ts";
import loraDy from "../../src/kernels/lora-dy.wgsl";
import loraDySums from "../../src/kernels/lora-dy-sums.wgsl";
import loraExpandRowsSource from "../../src/kernels/lora-expand-rows.wgsl";
import { loraShrinkRows, rowUnits } from "../../src/kernels/lora-rows.ts";
import loraShrinkRowsSource from "../../src/kernels/lora-shrink-rows.wgsl";
import { type Layout, type LowRank, type MatmulOptions, matmul } from "../../src/kernels/matmul.ts";
import { type MatmulPlan, type MatmulShape, plans } from "../../src/kernels/matmul-plans.ts";
import matmulRegisters from "../../src/kernels/matmul-registers.wgsl";
import matmulRows from "../../src/kernels/matmul-rows.wgsl";
import matmulSplits from "../../src/kernels/matmul-splits.wgsl";
import matmulTiled from "../../src/kernels/matmul-tiled.wgsl";
import narrow16 from "../../src/kernels/narrow16.wgsl";
import { pagedAttention as pagedAttentionOf, pagedWrite as pagedWriteOf } from "../../src/kernels/paged.ts";
import pagedAttention from "../../src/kernels/paged-attention.wgsl";
import pagedCombine from "../../src/kernels/paged-combine.wgsl";
import pagedCopy from "../../src/kernels/paged-copy.wgsl";
import pagedWrite from "../../src/kernels/paged-write.wgsl";
import recordStep from "../../src/kernels/record-step.wgsl";
import { reduce as reduceOf } from "../../src/kernels/reduce.ts";
import reduce from "../../src/kernels/reduce.wgsl";
import reduceRows from "../../src/kernels/reduce-rows.wgsl";
import {
  rmsNormBackward as rmsNormBackwardOf,
  rmsNormBackwardWeight as rmsNormBackwardWeightOf,
  rmsNorm as rmsNormOf,
} from "../../src/kernels/rms-norm.ts";
import rmsNorm from "../../src/kernels/rms-norm.wgsl";
import rmsNormBackward from "../../src/kernels/rms-norm-backward.wgsl";
import rmsNormBackwardWeight from "../../src/kernels/rms-norm-backward-weight.wgsl";
import { rope as ropeOf } from "../../src/kernels/rope.ts";
import rope from "../../src/kernels/rope.wgsl";
import rowUnitsSource from "../../src/kernels/row-units.wgsl";
import softCapSource from "../../src/kernels/soft-cap.wgsl";
import softmax from "../../src/kernels/softmax.wgsl";
import softmaxBackward from "../../src/kernels/softmax-backward.wgsl";
import squareSums from "../../src/kernels/square-sums.wgsl";
import tokenHits from "../../src/kernels/token-hits.wgsl";
import { topLogits as topLogitsOf } from "../../src/kernels/top-logits.ts";
import topLogits from "../../src/kernels/top-logits.wgsl";
import transpose from "../../src/kernels/transpose.wgsl";
import unary from "../../src/kernels/unary.wgsl";
import { unpackMatrix, withPlainScales } from "../../src/kernels/unpack.ts";
import unpack from "../../src/kernels/unpack.wgsl";
import unpackScales from "../../src/kernels/unpack-scales.wgsl";
import widen16 from "../../src/kernels/widen16.wgsl";
import type { PackedFormat, PackedMatrix } from "../../src/tensor/packed.ts";
import { empty, type Tensor } from "../../src/tensor/tensor.ts";
import { Recorder, type RecorderSettings, type Sent } from "./recorder.ts";

/** The files of `src/kernels` by name. */
export const KERNELS: Readonly<Record<string, string>> = {
  adamw,
  "add-into": addInto,
  "record-step": recordStep,
  attention,
  "attention-backward-kv": attentionBackwardKv,
  "attention-backward-q": attentionBackwardQ,
  "attention-delta": attentionDelta,
  axpy,
  binary,
  "clip-factor": clipFactor,
  "copy-rows": copyRows,
  "cross-entropy-backward": crossEntropyBackward,
  "cross-entropy-piece": crossEntropyPiece,
  "cross-entropy-piece-backward": crossEntropyPieceBackward,
  "dora-norms": doraNorms,
  dropout,
  embedding,
  "embedding-backward": embeddingBackward,
  gain,
  "gain-backward": gainBackward,
  "gather-rows": gatherRows,
  gated,
  "gated-backward": gatedBackward,
  "layer-norm": layerNorm,
  "layer-norm-backward": layerNormBackward,
  "layer-norm-backward-weight": layerNormBackwardWeight,
  "lora-dy": loraDy,
  "lora-dy-sums": loraDySums,
  "lora-expand-rows": loraExpandRowsSource,
  "lora-shrink-rows": loraShrinkRowsSource,
  "matmul-registers": matmulRegisters,
  "matmul-rows": matmulRows,
  "matmul-splits": matmulSplits,
  "matmul-tiled": matmulTiled,
  narrow16,
  "paged-attention": pagedAttention,
  "paged-combine": pagedCombine,
  "paged-copy": pagedCopy,
  "paged-write": pagedWrite,
  reduce,
  "reduce-rows": reduceRows,
  "rms-norm": rmsNorm,
  "rms-norm-backward": rmsNormBackward,
  "rms-norm-backward-weight": rmsNormBackwardWeight,
  rope,
  "row-units": rowUnitsSource,
  "soft-cap": softCapSource,
  softmax,
  "softmax-backward": softmaxBackward,
  "square-sums": squareSums,
  "token-hits": tokenHits,
  "top-logits": topLogits,
  transpose,
  unary,
  unpack,
  "unpack-scales": unpackScales,
  widen16,
};

/** A text on its way to a compiler, arrays and loops written out. */
export interface Variant extends Sent {
  /** Features without which no compiler takes it. */
  readonly needs: readonly GPUFeatureName[];
}

/** How w may be stored. */
export const STORED: readonly {
  readonly name: string;
  readonly format: "f32" | PackedFormat;
  readonly doubleQuant?: boolean;
}[] = [
  { name: "f32", format: "f32" },
  { name: "f16", format: "f16" },
  { name: "bf16", format: "bf16" },
  { name: "int8", format: "int8" },
  { name: "nf4", format: "nf4" },
  { name: "nf4, scales quantised", format: "nf4", doubleQuant: true },
];
const F32 = STORED.slice(0, 1);
const PACKED = STORED.slice(1);
export const LAYOUTS: readonly Layout[] = ["nn", "nt", "tn"];

/** A packed w is a frozen weight: products with it go forward, "nt", or back, "nn". */
export const storedFor = (layout: Layout): typeof STORED => (layout === "tn" ? F32 : STORED);

/** Small: what a tile's width changes in a text is how often lines repeat. */
export const TILED: MatmulPlan = {
  name: "tiled",
  family: "tiled",
  tuned: { BK: 8, TM: 4, TN: 4, WX: 4, WY: 4 },
  splits: 1,
};
export const SPLIT: MatmulPlan = { ...TILED, name: "tiled, k split", splits: 3 };
export const HALF: MatmulPlan = { ...TILED, name: "tiled, half", half: true };
export const REGISTERS: MatmulPlan = {
  name: "registers",
  family: "registers",
  tuned: { TM: 4, TN: 4, WG: 4 },
  splits: 1,
};
const QUADS: MatmulPlan = { ...REGISTERS, name: "registers, by quads", subgroups: true };
export const ROWS: MatmulPlan = { name: "rows", family: "rows", tuned: { TM: 2, TN: 2, WG: 32 }, splits: 1 };
export const SUBGROUP_ROWS: MatmulPlan = { ...ROWS, name: "rows, by subgroups", subgroups: true };

/** Sizes of which none, one or all are multiples of 4. */
const EVEN = { M: 8, N: 12, K: 16 };
const ODD = { M: 9, N: 13, K: 17 };
const RAGGED = [{ ...EVEN, M: 9 }, { ...EVEN, N: 13 }, { ...EVEN, K: 17 }, ODD];
/** Sizes for each line of the table of default plans: few rows, skinny either way, small, middling, large. */
const CLASSES = [
  ...[1, 4, 16].map((M) => ({ M, N: 2048, K: 2048 })),
  { M: 512, N: 16, K: 2048 },
  { M: 16, N: 2048, K: 512 },
  { M: 64, N: 64, K: 64 },
  { M: 512, N: 576, K: 576 },
  { M: 4096, N: 4096, K: 4096 },
];

type Sizes = Readonly<Record<"M" | "N" | "K", number>>;

/** The texts of all products, each once, with widths that are small. */
export function matmulVariants(): Variant[] {
  const recorder = new Recorder();
  const finish = (sizes: Sizes): MatmulOptions => ({
    bias: empty(recorder, [sizes.N], "variants"),
    residual: empty(recorder, [sizes.M, sizes.N], "variants"),
    activation: "silu",
  });
  const f32 = { format: "f32" } as const;
  const make = (stored: Stored, layout: Layout, sizes: Sizes, options: MatmulOptions): void => {
    const [x, w] = operands(recorder, stored, layout, sizes);
    matmul(x, w, layout, options);
  };
  for (const layout of LAYOUTS) {
    const lowRank = (R: number): LowRank => ({
      u: empty(recorder, [EVEN.M, R], "variants"),
      b: empty(recorder, layout === "nt" ? [EVEN.N, R] : [R, EVEN.N], "variants"),
      scale: 1,
    });
    const all = [TILED, SPLIT, HALF, REGISTERS, QUADS, ...(layout === "nt" ? [ROWS, SUBGROUP_ROWS] : [])];
    for (const stored of storedFor(layout)) for (const plan of all) make(stored, layout, EVEN, { plan });
    for (const plan of all) {
      for (const R of [4, 3]) make(f32, layout, EVEN, { plan, lowRank: lowRank(R) });
      make(f32, layout, EVEN, { plan, ...finish(EVEN) });
      for (const sizes of RAGGED) make(f32, layout, sizes, { plan });
      make(f32, layout, ODD, { plan, ...finish(ODD) });
      for (const columns of [4, 3]) {
        const sizes = { ...EVEN, ...(layout === "tn" ? { M: 2 * columns } : { N: 2 * columns }) };
        const w = empty(recorder, layout === "nt" ? [sizes.N, sizes.K] : [sizes.K, sizes.N], "variants");
        const blocks = empty(recorder, [2, 16, columns], "variants");
        if (layout === "tn") matmul(blocks, w, layout, { plan, blocked: true });
        else matmul(empty(recorder, [sizes.M, sizes.K], "variants"), w, layout, { plan, blocked: true, out: blocks });
      }
    }
    // A packed w has rows of multiples of 4: of N, or of K under "nt".
    const ragged = layout === "nt" ? { ...EVEN, N: 13 } : { ...EVEN, K: 17 };
    for (const stored of storedFor(layout))
      for (const plan of [TILED, REGISTERS]) make(stored, layout, ragged, { plan });
  }
  // What a row's own adapter adds: forward alone, with a bias at most.
  for (const plan of [TILED, SPLIT, HALF, REGISTERS, QUADS, ROWS, SUBGROUP_ROWS])
    for (const [words, dtype] of [
      [4, "f32"],
      [2, "i32"],
    ] as const)
      for (const stored of STORED) {
        const lowRankRows = {
          u: empty(recorder, [EVEN.M, 10], "variants"),
          b: empty(recorder, [3, words * (EVEN.N / 4)], "variants", dtype),
        };
        make(stored, "nt", EVEN, { plan, lowRankRows });
        const { bias } = finish(EVEN);
        if (stored.format === "f32" && bias) make(stored, "nt", EVEN, { plan, lowRankRows, bias });
      }
  for (const plan of [TILED, REGISTERS])
    for (const activation of ["gelu", "geluTanh"] as const) make(f32, "nn", EVEN, { plan, activation });
  return variantsOf(recorder);
}

/** The texts of the other kernels that are put together from parts. */
export function otherVariants(): Variant[] {
  const onGpu = new Recorder();
  for (const stored of PACKED) {
    const w = operands(onGpu, stored, "nn", EVEN)[1] as PackedMatrix;
    unpackMatrix(w);
    withPlainScales(w);
  }
  for (const columns of [8, 7])
    for (const rank of [4, 3])
      for (const plan of loraDyPlans(onGpu, { M: 2, N: columns, R: rank }))
        loraDyOf(
          ...([empty(onGpu, [2, columns], "variants"), empty(onGpu, [columns, rank], "variants")] as const),
          ...([empty(onGpu, [2, rank], "variants"), 1, plan] as const),
        );
  topLogitsOf(empty(onGpu, [2, 1025], "variants"), empty(onGpu, [2], "variants"));
  const onCpu = new Recorder({ isSoftware: true });
  for (const recorder of [onGpu, onCpu])
    for (const K of [8, 7])
      for (const [words, dtype] of [
        [8, "f32"],
        [4, "i32"],
      ] as const) {
        const [x, a] = [empty(recorder, [2, K], "variants"), empty(recorder, [3, 2, words], "variants", dtype)];
        const [table, slots] = [empty(recorder, [2, 6], "variants", "i32"), empty(recorder, [2], "variants", "i32")];
        for (const units of recorder === onGpu ? [undefined] : [undefined, rowUnits(slots)]) {
          const [u] = loraShrinkRows(x, a, table, slots, units);
          if (recorder === onGpu || K !== 8) continue;
          const lowRankRows = { u: u as Tensor, b: empty(recorder, [3, words], "variants", dtype), units };
          for (const bias of [undefined, empty(recorder, [8], "variants")])
            matmul(x, empty(recorder, [8, 8], "variants"), "nt", { lowRankRows, ...(bias && { bias }) });
        }
      }
  for (const recorder of [onGpu, onCpu]) {
    for (const T of [1, 3])
      for (const window of [undefined, 2])
        for (const softCap of [undefined, 2])
          for (const starts of [undefined, empty(recorder, [1, T], "variants", "i32")]) {
            const q = empty(recorder, [1, T, 2, 8], "variants");
            const inputs = { q, k: q, v: q, scale: 1, keyLength: T, window, softCap, starts };
            attentionOf(inputs);
            attentionBackwardQueryOf(inputs, q, q);
            attentionBackwardKeyValueOf(inputs, q, q);
          }
    const rows = empty(recorder, [1], "variants", "i32");
    const tokens = { sequences: rows, positions: rows, tables: empty(recorder, [1, 1], "variants", "i32") };
    for (const dtype of ["f32", "i32"] as const) {
      const k = empty(recorder, [2, 4, 1, dtype === "f32" ? 8 : 4], "variants", dtype);
      const keys = empty(recorder, [1, 1, 8], "variants");
      pagedWriteOf(keys, keys, { k, v: k }, tokens);
      for (const softCap of [undefined, 2])
        for (const H of [1, 2, 3, 4, 5, 6, 7, 8])
          for (const together of new Set([1, Math.floor(8 / H)])) {
            const plan = { heads: H, tokens: together, splits: 2 };
            pagedAttentionOf(empty(recorder, [1, H, 8], "variants"), { k, v: k }, tokens, { softCap, plan });
          }
    }
    for (const D of [6, 8])
      for (const at of [0, empty(recorder, [1, 3], "variants", "i32")]) {
        const table = empty(recorder, [4, D / 2], "variants");
        ropeOf(empty(recorder, [1, 3, 2, D], "variants"), table, table, at, 1);
      }
  }
  for (const recorder of [onGpu, onCpu])
    for (const columns of [8, 7]) {
      const x = empty(recorder, [2, columns], "variants");
      axpyOf(1, x, 1, x);
      addIntoOf(x, axpyOf(1, x, 1, x));
      gatherRowsOf(x, empty(recorder, [3], "variants", "i32"));
      const [h, labels] = [empty(recorder, [2, 4], "variants"), empty(recorder, [2], "variants", "i32")];
      const W = empty(recorder, [columns, 4], "variants");
      for (const labelSmoothing of [0, 0.1])
        linearCrossEntropyOf(h, W, labels, 1, { dh: true, dW: false, hits: true }, { labelSmoothing });
      gatedOf(x, x, "silu");
      gatedBackwardOf(x, x, x, "silu");
      if (columns % 4 === 0) addNoiseOf(x, 0.5, { seed: 1, step: 1, stream: 1 });
      for (const acc of [undefined, x]) dropoutOf(x, 0.5, { seed: 1, step: 1, stream: 1 }, acc);
      const w = empty(recorder, [columns], "variants");
      gainOf(x, w, w);
      gainBackwardOf(x, x, w, w);
      rmsNormBackwardWeightOf(x, x, x);
      for (const more of [undefined, x]) {
        rmsNormOf(x, w, 1e-5, 0, more);
        rmsNormBackwardOf(x, x, w, x, 0, more);
      }
      for (const op of ["add", "sub", "mul"] as const) binaryOf(op, x, x);
      expand(x, [3, 2, columns]);
      for (const op of ["sum", "max"] as const) reduceOf(op, x, -1);
    }
  const all = [...variantsOf(onGpu), ...variantsOf(onCpu)];
  return [...new Map(all.map((one) => [one.key, one])).values()];
}

/** The texts of every plan that is a default or that tuning tries, for f32, on a GPU or on a CPU adapter: with their true widths. */
export function planVariants(settings: RecorderSettings): Variant[] {
  const recorder = new Recorder(settings);
  for (const layout of LAYOUTS)
    for (const sizes of CLASSES) {
      const shape: MatmulShape = { layout, ...sizes, R: 0, batch: 1, format: "f32" };
      for (const plan of plans(recorder, shape)) {
        const [x, w] = operands(recorder, { format: "f32" }, layout, sizes);
        matmul(x, w, layout, { plan });
      }
    }
  // The levels of NF4 take memory beside the sums of few rows.
  for (const M of [9, 16]) {
    const sizes = { M, N: 2048, K: 2048 };
    const shape: MatmulShape = { layout: "nt", ...sizes, R: 0, batch: 1, format: "nf4" };
    for (const plan of plans(recorder, shape)) {
      const [x, w] = operands(recorder, { format: "nf4" }, "nt", sizes);
      matmul(x, w, "nt", { plan });
    }
  }
  return variantsOf(recorder);
}

type Stored = Omit<(typeof STORED)[number], "name">;

function operands(
  gpu: Recorder,
  { format, doubleQuant = false }: Stored,
  layout: Layout,
  { M, N, K }: Sizes,
): [x: Tensor, w: Tensor | PackedMatrix] {
  const x = empty(gpu, layout === "tn" ? [K, M] : [M, K], "variants");
  const shape: [number, number] = layout === "nt" ? [N, K] : [K, N];
  if (format === "f32") return [x, empty(gpu, shape, "variants")];
  const words = empty(gpu, [1], "variants", "i32");
  return [x, { gpu, format, shape, words, scales: words, group: 4, doubleQuant }];
}

function variantsOf({ dispatches }: Recorder): Variant[] {
  const sent = new Map(dispatches.map((dispatch) => [dispatch.sent.key, dispatch.sent]));
  return [...sent.values()].map((one) => ({
    ...one,
    needs: [...one.source.matchAll(/^enable (\w+);$/gm)].map(([, name]) =>
      name === "f16" ? "shader-f16" : "subgroups",
    ),
  }));
}
