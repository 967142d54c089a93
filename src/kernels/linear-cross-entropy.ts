import { defineKernel, definePart, type Uniform } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { dims2, empty, expectDType, expectShape, rowsOf, slice, type Tensor } from "../tensor/tensor.ts";
import { addPiece } from "./cross-entropy.ts";
import pieceBackwardSource from "./cross-entropy-piece-backward.wgsl";
import { matmul } from "./matmul.ts";
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

export interface LinearCrossEntropy {
  readonly loss: Tensor;
  /** d(loss)/dh, if it was wanted. */
  readonly dh: Tensor | undefined;
  /** d(loss)/dW of each piece that is not packed, if it was wanted. */
  readonly dW: readonly Tensor[];
}

/**
 * scale·Σ over rows with a label ≥ 0 of −log softmax(h·Wᵀ)[label], shape [], and its gradients, without the logits ever being stored whole.
 *
 * With a logitCap c a logit x counts as c·tanh(x/c). h [M,C], pieces of W [Vᵢ,C], labels i32 [M]. The rows are gone through in chunks whose logits take 32 MiB, 64 rows at least:
 * logits, the statistics of their softmax, gradients in place, and dh from them. After Liger Kernel (arXiv:2410.10989 §3.2), with the
 * vocabulary in pieces too. Throws ShapeError if the shapes do not fit.
 */
export function linearCrossEntropy(
  h: Tensor,
  head: Head,
  labels: Tensor,
  scale: Uniform,
  wants: { readonly dh: boolean; readonly dW: boolean },
  logitCap?: number,
  logitBytes: number = LOGIT_BYTES,
): LinearCrossEntropy {
  const { gpu } = h;
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
  const dh = wants.dh ? empty(gpu, [M, C], "linearCrossEntropy") : undefined;
  const dW: Tensor[] = [];
  for (let at = 0; at < M; at += chunk) {
    const rows = Math.min(chunk, M - at);
    const part = { h: rowsOf(h, at, rows), labels: slice(labels, at, [rows]), loss: slice(losses, at, [rows]) };
    const sums = empty(gpu, [rows, 4], "linearCrossEntropy");
    const logits = pieces.map(({ W, first }, i) => {
      const x = matmul(part.h, W, "nt");
      if (logitCap !== undefined) softCap(x, logitCap);
      addPiece({ x, labels: part.labels, sums, loss: part.loss }, { first, isLast: i === pieces.length - 1 }, scale);
      return x;
    });
    let sum: Tensor | undefined;
    let trained = 0;
    for (const [i, { W, first, rows: v }] of pieces.entries()) {
      const x = logits[i] as Tensor;
      if (wants.dh || wants.dW) {
        const inFours = v % 4 === 0;
        const lanes = inFours ? v / 4 : v;
        const uniforms = { n: rows * lanes, V: lanes, first, c: scale, cap: logitCap ?? 1 };
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
      gpu.release(x);
    }
    gpu.release(sums);
  }
  const loss = reduce("sum", losses);
  gpu.release(losses);
  return { loss, dh, dW };
}
