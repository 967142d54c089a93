import { defineKernel, definePart, type Uniform } from "../gpu/kernel.ts";
import { dims2, empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import backwardSource from "./cross-entropy-backward.wgsl";
import pieceSource from "./cross-entropy-piece.wgsl";
import fourSource from "./parts/piece-four.wgsl";
import { reduce } from "./reduce.ts";
import hitsSource from "./token-hits.wgsl";

const piece = defineKernel("cross-entropy-piece", pieceSource);
const backward = defineKernel("cross-entropy-backward", backwardSource);
const hitsOf = defineKernel("token-hits", hitsSource);
const FOUR = [definePart("piece-four", fourSource)];

/** A piece of the vocabulary: the words from `first` on. With label smoothing, its ε and the words of all pieces. */
interface Piece {
  readonly first: number;
  readonly isLast: boolean;
  readonly smoothing?: { readonly e: number; readonly words: number } | undefined;
}

/**
 * Merges logits x [M,V] of a piece into the statistics of each row, sums [M,4]: of its softmax, (max, log of the sum under it) after the last
 * piece, which also gives the loss [M].
 */
export function addPiece(
  buffers: Readonly<Record<"x" | "labels" | "sums" | "loss", Tensor>>,
  { first, isLast, smoothing }: Piece,
  scale: Uniform,
): void {
  const { gpu } = buffers.x;
  const [M, V] = dims2("crossEntropy", "logits", buffers.x);
  const inFours = V % 4 === 0;
  const WG = gpu.isSoftware ? 4 : 256;
  const ends = { is_first: first === 0 ? 1 : 0, is_last: isLast ? 1 : 0 };
  const uniforms = { M, lanes: inFours ? V / 4 : V, V, first, ...ends, c: scale, e: 0, words: V, ...smoothing };
  piece(gpu, uniforms, buffers, [M * WG], { WG, SMOOTH: smoothing ? 1 : 0 }, inFours ? FOUR : []);
}

/** After the last `addPiece`, over the pieces again from the first: hits [M], 1 where the label is the first of the likeliest words, else 0. */
export function addHits(buffers: Readonly<Record<"x" | "labels" | "sums" | "hits", Tensor>>, first: number): void {
  const { gpu } = buffers.x;
  const [M, V] = dims2("crossEntropy", "logits", buffers.x);
  const WG = gpu.isSoftware ? 4 : 256;
  hitsOf(gpu, { M, V, first }, buffers, [M * WG], { WG });
}

/**
 * scale·Σ over rows with a label ≥ 0 of (log Σ exp(x) − x[label]), shape []; stats [rows,4] are kept for backward.
 *
 * x [...,V], labels i32 [...]; a negative label takes no part. Throws ShapeError if they do not fit.
 */
export function crossEntropy(x: Tensor, labels: Tensor, scale: Uniform): { loss: Tensor; stats: Tensor } {
  const [M] = dims2("crossEntropy", "logits", x);
  expectShape("crossEntropy", "labels must be the leading axes of logits", labels, x.shape.slice(0, -1));
  expectDType("crossEntropy", "labels", labels, "i32");
  const losses = empty(x.gpu, [M], "crossEntropy");
  const stats = empty(x.gpu, [M, 4], "crossEntropy");
  addPiece({ x, labels, sums: stats, loss: losses }, { first: 0, isLast: true }, scale);
  const loss = reduce("sum", losses);
  x.gpu.release(losses);
  return { loss, stats };
}

/** dx of `crossEntropy`, like x; dy has one element. */
export function crossEntropyBackward(dy: Tensor, x: Tensor, labels: Tensor, stats: Tensor, scale: Uniform): Tensor {
  const dx = empty(x.gpu, x.shape, "crossEntropyBackward");
  backward(x.gpu, { n: x.size, V: x.shape.at(-1) ?? 0, c: scale }, { x, labels, stats, dy, dx }, [x.size]);
  return dx;
}
