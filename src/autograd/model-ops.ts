/** The differentiable ops of transformers: norms, positions, attention, embeddings and their loss. */
import type { Uniform } from "../gpu/kernel.ts";
import * as attn from "../kernels/attention.ts";
import { binary } from "../kernels/binary.ts";
import * as entropy from "../kernels/cross-entropy.ts";
import * as drops from "../kernels/dropout.ts";
import * as table from "../kernels/embedding.ts";
import * as glu from "../kernels/gated.ts";
import { gatherRows as rowsByIndex } from "../kernels/gather-rows.ts";
import * as layer from "../kernels/layer-norm.ts";
import * as fused from "../kernels/linear-cross-entropy.ts";
import { reduce } from "../kernels/reduce.ts";
import * as rms from "../kernels/rms-norm.ts";
import * as rotary from "../kernels/rope.ts";
import { isPacked } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { dims2, type Tensor, view } from "../tensor/tensor.ts";
import { adding, isSeed, once, record } from "./engine.ts";

/** RMSNorm over the last axis: x·rsqrt(mean(x²) + eps)·(offset + w). x [...,H], weight [H]. Keeps x and one number per row. */
export function rmsNorm(x: Tensor, weight: Tensor, eps: number, offset = 0): Tensor {
  const { y, r } = rms.rmsNorm(x, weight, eps, offset);
  return record("rmsNorm", y, [x, weight], (dy) => [
    adding((sum) => rms.rmsNormBackward(dy, x, weight, r, offset, sum)),
    () => rms.rmsNormBackwardWeight(dy, x, r),
  ]);
}

/** x + delta and its `rmsNorm`, in one pass: a residual connection and the norm behind it. Keeps the sum and one number per row. */
export function addRmsNorm(
  x: Tensor,
  delta: Tensor,
  weight: Tensor,
  eps: number,
  offset = 0,
): { sum: Tensor; y: Tensor } {
  const { y, r, sum } = rms.rmsNorm(x, weight, eps, offset, delta);
  record("add", sum, [x, delta], (dy) => [() => dy, () => dy]);
  record("rmsNorm", y, [sum, weight], (dy) => [
    adding((more) => rms.rmsNormBackward(dy, sum, weight, r, offset, more)),
    () => rms.rmsNormBackwardWeight(dy, sum, r),
  ]);
  return { sum, y };
}

/** f(gate)∘up, the gated unit of SwiGLU and GEGLU. Keeps gate and up. Throws ShapeError unless their shapes are equal. */
export function gated(gate: Tensor, up: Tensor, activation: glu.GateActivation): Tensor {
  return record("gated", glu.gated(gate, up, activation), [gate, up], (dy) => {
    const both = once(() => glu.gatedBackward(dy, gate, up, activation));
    return [() => both().dgate, () => both().dup];
  });
}

/** mask∘x/(1 − p), as `kernels/dropout.ts` says. Keeps nothing: the mask is made again in the backward pass. */
export function dropout(x: Tensor, p: number, key: drops.DropoutKey): Tensor {
  return record("dropout", drops.dropout(x, p, key), [x], (dy) => [adding((sum) => drops.dropout(dy, p, key, sum))]);
}

/** x + most·u, as `kernels/dropout.ts` says: noise, whose gradient is that of x. Keeps nothing. */
export function addNoise(x: Tensor, most: number, key: drops.DropoutKey): Tensor {
  return record("addNoise", drops.addNoise(x, most, key), [x], (dy) => [() => dy]);
}

/** LayerNorm over the last axis: (x − mean)·rsqrt(var + eps)·w + b. x [...,H], weight and bias [H]. Keeps x and two numbers per row. */
export function layerNorm(x: Tensor, weight: Tensor, bias: Tensor, eps: number): Tensor {
  const { y, stats } = layer.layerNorm(x, weight, bias, eps);
  return record("layerNorm", y, [x, weight, bias], (dy) => [
    () => layer.layerNormBackward(dy, x, weight, stats),
    () => layer.layerNormBackwardWeight(dy, x, stats),
    () => reduce("sum", view(dy, dims2("layerNorm", "dy", dy)), 0),
  ]);
}

/**
 * Rotary position embedding of x [B,T,H,D]: pair (i, i + E/2) turns by the angle of its position, whose cos and sin [P,E/2] are given;
 * what is behind the first E elements of a head stays.
 * Row t is at position `at` + t, or at[b,t] where that is i32 [B,T]: packed rows, in which each segment begins at 0.
 *
 * Keeps nothing of x. Throws ShapeError when a position is past the tables; those of a tensor are not looked at.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor, at: number | Tensor = 0): Tensor {
  const y = rotary.rope(x, cos, sin, at, 1);
  return record("rope", y, [x], (dy) => [() => rotary.rope(dy, cos, sin, at, -1)]);
}

/** Rows of weight [V,H], or of pieces of it one behind the other, by ids (i32): [...ids.shape, H]. */
export function embedding(weight: Tensor | readonly Tensor[], ids: Tensor): Tensor {
  const pieces = piecesOf(weight);
  const inputs = pieces.map(({ W }) => W);
  return record("embedding", table.embedding(pieces, ids), inputs, (dy) =>
    pieces.map((piece) => () => table.embeddingBackward(dy, ids, piece)),
  );
}

/** What may be left out of `attention`: scale is 1/√D, keyLength S, and there is no window, no start and no cap unless given. */
export type AttentionOptions = Partial<Omit<attn.AttentionInputs, "q" | "k" | "v">>;

/**
 * Attention with grouped queries, causal unless there are lengths: softmax(scale·q·kᵀ)·v. q [B,T,H,D], k and v [B,S,G,D] → [B,T,H,D].
 *
 * Query t is at position p = keyLength − T + t and sees keys max(starts[b,t], p − window + 1) … p; query head h uses key head ⌊h·G/H⌋.
 * With lengths it sees keys 0 … lengths[b] − 1. Packed rows: starts is where the segment of each position begins. No T×S tensor is made, forward or backward; q, k, v, the result and
 * one number per row are kept. Throws ShapeError if the shapes do not fit or D is not a multiple of 4.
 */
export function attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = {}): Tensor {
  const { scale = 1 / Math.sqrt(q.shape.at(-1) ?? 1), keyLength = k.shape[1] ?? 0 } = options;
  const inputs = { ...options, q, k, v, scale, keyLength };
  const { o, lse } = attn.attention(inputs);
  return record("attention", o, [q, k, v], (dy) => {
    const stats = once(() => attn.attentionDelta(dy, o, lse));
    const kv = once(() => attn.attentionBackwardKeyValue(inputs, dy, stats()));
    return [() => attn.attentionBackwardQuery(inputs, dy, stats()), () => kv().dk, () => kv().dv];
  });
}

/**
 * Cross-entropy of logits [...,V] against labels i32 [...]: scale·Σ −log softmax(logits)[label], shape [].
 *
 * Rows with a negative label (−100 by custom) take no part. For the mean, scale is 1 / the number of labels that count. Keeps the
 * logits. Throws ShapeError if the shapes do not fit.
 */
export function crossEntropy(logits: Tensor, labels: Tensor, scale: Uniform = 1): Tensor {
  const { loss, stats } = entropy.crossEntropy(logits, labels, scale);
  return record("crossEntropy", loss, [logits], (dy) => [
    () => entropy.crossEntropyBackward(dy, logits, labels, stats, scale),
  ]);
}

/**
 * Rows of x [M,H] by `ids` i32 [N], zeros for a negative id: [N,H]. `inverse` [M] says where each row of x went, or −1: no row may go
 * to two places. Keeps nothing of x.
 */
export function gatherRows(x: Tensor, ids: Tensor, inverse: Tensor): Tensor {
  return record("gatherRows", rowsByIndex(x, ids), [x], (dy) => [() => view(rowsByIndex(dy, inverse), x.shape)]);
}

/**
 * `crossEntropy` of h·Wᵀ, without the logits ever being stored whole: see `kernels/linear-cross-entropy.ts`. h [M,C], labels i32 [M].
 *
 * Of an adapted head the logits are h·Wᵀ + Σ s·u·Xᵀ. The gradients are worked out in the forward pass, where the logits of a chunk are
 * there, and kept: of h, and of W, u and X unless they are frozen.
 */
export function linearCrossEntropy(...inputs: Parameters<typeof linearCrossEntropies>): Tensor {
  const { loss, losses } = linearCrossEntropies(...inputs);
  loss.gpu.release(losses);
  return loss;
}

/** `linearCrossEntropy`, and beside it the loss of each row, [M], which has no gradient of its own. */
export function linearCrossEntropies(
  h: Tensor,
  head: fused.Head,
  labels: Tensor,
  scale: Uniform = 1,
  options: fused.CrossEntropyOptions = {},
): { loss: Tensor; losses: Tensor } {
  const { updates = [] } = options;
  const trained = piecesOf(head).flatMap(({ W }) => (isPacked(W) ? [] : [W]));
  const wants = { dh: h.requiresGrad, dW: trained.some((W) => W.requiresGrad) };
  const made = fused.linearCrossEntropy(h, head, labels, scale, wants, options);
  const { loss, losses, dh, dW, du, dX } = made;
  const inputs = [h, ...trained, ...updates.map(({ u }) => u), ...updates.map(({ X }) => X)];
  const gradients = [dh, ...(wants.dW ? dW : trained.map(() => undefined)), ...du, ...dX];
  const weighted = (i: number, dy: Tensor): Tensor => {
    const gradient = gradients[i] as Tensor;
    return isSeed(dy) ? gradient : binary("mul", gradient, dy);
  };
  record("linearCrossEntropy", loss, inputs, (dy) => inputs.map((_, i) => () => weighted(i, dy)));
  return { loss, losses };
}
