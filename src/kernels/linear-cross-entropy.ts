import { defineKernel, definePart, type Uniform } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { dims2, empty, expectDType, expectShape, rowsOf, slice, type Tensor } from "../tensor/tensor.ts";
import { addInto } from "./axpy.ts";
import { addHits, addPiece } from "./cross-entropy.ts";
import pieceBackwardSource from "./cross-entropy-piece-backward.wgsl";
import { type Layout, matmul } from "./matmul.ts";
import backwardFourSource from "./parts/piece-backward-four.wgsl";
import { reduce } from "./reduce.ts";
import { softCap } from "./soft-cap.ts";

const pieceBackward = defineKernel("cross-entropy-piece-backward", pieceBackwardSource);
const BACKWARD_FOUR = [definePart("piece-backward-four", backwardFourSource)];

/** Logits that exist at a time. */
const LOGIT_BYTES = 32 * 2 ** 20;
/** Rows of a chunk are a multiple of this, so that chunks of anything start at a multiple of 256 bytes. */
const ROW_STEP = 64;

/** The output projection [V,C], or pieces of it: see `piecesOf`. */
export type Head = Tensor | PackedMatrix | readonly (Tensor | PackedMatrix)[];

/** What is added to the logits: scale·u·Xᵀ, u [M,r], X [V,r]. */
export interface LogitUpdate {
  readonly u: Tensor;
  readonly X: Tensor;
  readonly scale: number;
}

/** What the loss may differ in. */
export interface CrossEntropyOptions {
  /** c: a logit x counts as c·tanh(x/c). */
  readonly logitCap?: number | undefined;
  /** Of an adapted head. */
  readonly updates?: readonly LogitUpdate[] | undefined;
  /** ε: the loss is (1 − ε)·(−log p of the label) + ε·(the mean of −log p over all words), as in PyTorch. 0 unless given. */
  readonly labelSmoothing?: number | undefined;
}

export interface LinearCrossEntropy {
  readonly loss: Tensor;
  /** What it is the sum of: that of each row, [M]. */
  readonly losses: Tensor;
  /** Rows whose label is the first of the likeliest words, shape [], if they were wanted. */
  readonly hits: Tensor | undefined;
  /** d(loss)/dh, if it was wanted. */
  readonly dh: Tensor | undefined;
  /** d(loss)/dW of each piece that is not packed, if it was wanted. */
  readonly dW: readonly Tensor[];
  /** Those of each update, if they were wanted. */
  readonly du: readonly (Tensor | undefined)[];
  readonly dX: readonly (Tensor | undefined)[];
}

/**
 * scale·Σ over rows with a label ≥ 0 of −log softmax(h·Wᵀ)[label], shape [], and its gradients, without the logits ever being stored whole.
 *
 * With a logitCap c a logit x counts as c·tanh(x/c). h [M,C], pieces of W [Vᵢ,C], labels i32 [M]. The rows are gone through in chunks whose logits take 32 MiB, 64 rows at least:
 * logits (with `updates`, h·Wᵀ + Σ s·u·Xᵀ), the statistics of their softmax, gradients in place, and dh, dW, du and dX from them. After Liger Kernel (arXiv:2410.10989 §3.2), with the
 * vocabulary in pieces too. Throws ShapeError if the shapes do not fit, and unless 0 ≤ ε < 1.
 */
export function linearCrossEntropy(
  h: Tensor,
  head: Head,
  labels: Tensor,
  scale: Uniform,
  wants: { readonly dh: boolean; readonly dW: boolean; readonly hits?: boolean },
  { logitCap, updates = [], labelSmoothing: e = 0 }: CrossEntropyOptions = {},
  logitBytes: number = LOGIT_BYTES,
): LinearCrossEntropy {
  const { gpu } = h;
  if (!(e >= 0 && e < 1))
    throw new ShapeError(`linearCrossEntropy: labelSmoothing must be at least 0 and below 1, got ${e}`);
  const [M, C] = dims2("linearCrossEntropy", "h", h);
  const pieces = piecesOf(head);
  for (const { W } of pieces)
    if (W.shape.length !== 2 || W.shape[1] !== C)
      throw new ShapeError(`linearCrossEntropy: W must be [V,C] with C = ${C}, got [${W.shape}]`);
  expectShape("linearCrossEntropy", "labels must be [M]", labels, [M]);
  expectDType("linearCrossEntropy", "labels", labels, "i32");
  const V = pieces.reduce((sum, { rows }) => sum + rows, 0);
  const chunk = Math.max(1, Math.floor(logitBytes / (4 * V * ROW_STEP))) * ROW_STEP;
  const losses = empty(gpu, [M], "linearCrossEntropy");
  const hits = wants.hits ? empty(gpu, [M], "linearCrossEntropy") : undefined;
  const smoothing = e > 0 ? { e, words: V } : undefined;
  const dh = wants.dh ? empty(gpu, [M, C], "linearCrossEntropy") : undefined;
  const dW: Tensor[] = [];
  const like = (t: Tensor): Tensor | undefined =>
    t.requiresGrad ? empty(gpu, t.shape, "linearCrossEntropy") : undefined;
  const du = updates.map(({ u }) => like(u));
  const dX = updates.map(({ X }) => like(X));
  for (let at = 0; at < M; at += chunk) {
    const rows = Math.min(chunk, M - at);
    const part = { h: rowsOf(h, at, rows), labels: slice(labels, at, [rows]), loss: slice(losses, at, [rows]) };
    const sums = empty(gpu, [rows, 4], "linearCrossEntropy");
    const parts = updates.map(({ u, X, scale: s }) => ({ u: rowsOf(u, at, rows), X, s }));
    const logits = pieces.map(({ W, first, rows: v }, i) => {
      let x = matmul(part.h, W, "nt");
      for (const { u, X, s } of parts) {
        const before = x;
        x = matmul(u, rowsOf(X, first, v), "nt", { scale: s, residual: before });
        gpu.release(before);
      }
      if (logitCap !== undefined) softCap(x, logitCap);
      const isLast = i === pieces.length - 1;
      addPiece({ x, labels: part.labels, sums, loss: part.loss }, { first, isLast, smoothing }, scale);
      return x;
    });
    if (hits)
      logits.forEach((x, i) => {
        addHits({ x, labels: part.labels, sums, hits: slice(hits, at, [rows]) }, pieces[i]?.first ?? 0);
      });
    let sum: Tensor | undefined;
    let trained = 0;
    for (const [i, { W, first, rows: v }] of pieces.entries()) {
      const x = logits[i] as Tensor;
      const isWanted = wants.dh || wants.dW || [...du, ...dX].some(Boolean);
      if (isWanted) {
        const inFours = v % 4 === 0;
        const lanes = inFours ? v / 4 : v;
        const uniforms = { n: rows * lanes, V: lanes, first, c: scale, cap: logitCap ?? 1, own: 1 - e, rest: e / V };
        pieceBackward(
          gpu,
          uniforms,
          { labels: part.labels, sums, x },
          [rows * lanes],
          { CAP: logitCap === undefined ? 0 : 1 },
          inFours ? BACKWARD_FOUR : [],
        );
      }
      if (dh) {
        const out = i === pieces.length - 1 ? { out: rowsOf(dh, at, rows) } : {};
        const next = matmul(x, W, "nn", { ...(sum && { residual: sum }), ...out });
        if (sum) gpu.release(sum);
        sum = next;
      }
      if (wants.dW && !isPacked(W)) {
        const before = dW[trained];
        dW[trained++] = matmul(x, part.h, "tn", before && { residual: before });
        if (before) gpu.release(before);
      }
      parts.forEach(({ u, X, s }, j) => {
        const [ofU, ofX] = [du[j], dX[j]];
        if (ofU) addUp(x, rowsOf(X, first, v), "nn", s, rowsOf(ofU, at, rows), i === 0);
        if (ofX) addUp(x, u, "tn", s, rowsOf(ofX, first, v), at === 0);
      });
      gpu.release(x);
    }
    gpu.release(sums);
  }
  const loss = reduce("sum", losses);
  const hitCount = hits && reduce("sum", hits);
  if (hits) gpu.release(hits);
  return { loss, losses, hits: hitCount, dh, dW, du, dX };
}

/** y = s·op(x)·w, or y + s·op(x)·w after the first time. */
function addUp(x: Tensor, w: Tensor, layout: Layout, s: number, y: Tensor, isFirst: boolean): void {
  if (isFirst) matmul(x, w, layout, { scale: s, out: y });
  else y.gpu.scope(() => addInto(matmul(x, w, layout, { scale: s }), y));
}
