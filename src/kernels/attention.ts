import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./attention.wgsl";
import keyValueSource from "./attention-backward-kv.wgsl";
import querySource from "./attention-backward-q.wgsl";
import rowDotSource from "./row-dot.wgsl";

const forward = defineKernel("attention", source);
const backwardQuery = defineKernel("attention-backward-q", querySource);
const backwardKeyValue = defineKernel("attention-backward-kv", keyValueSource);
const rowDot = defineKernel("row-dot", rowDotSource);

/** What one attention call works on; `keyLength` of the S keys count. */
export interface AttentionInputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly scale: number;
  readonly keyLength: number;
}

/**
 * Causal attention with grouped queries: q [B,T,H,D], k and v [B,S,G,D] → o [B,T,H,D] and its log-sum-exp [B,T,H].
 *
 * Query t sees keys 0 … keyLength − T + t. Throws ShapeError if the shapes do not fit or D is not a multiple of 4.
 */
export function attention(inputs: AttentionInputs): { o: Tensor; lse: Tensor } {
  const { q, k, v } = inputs;
  const [B = 0, T = 0, H = 0, D = 0] = q.shape;
  if (q.shape.length !== 4 || D % 4 !== 0)
    throw new ShapeError(`attention: q must be [B,T,H,D] with D a multiple of 4, got [${q.shape}]`);
  const [, S = 0, G = 0] = k.shape;
  expectShape("attention", "k must be [B,S,G,D]", k, [B, S, G, D]);
  expectShape("attention", "v must be [B,S,G,D]", v, [B, S, G, D]);
  if (H % G !== 0) throw new ShapeError(`attention: query heads must be a multiple of key heads, got ${H} and ${G}`);
  const { keyLength } = inputs;
  if (keyLength < T || keyLength > S)
    throw new ShapeError(`attention: keyLength must be from T = ${T} to S = ${S}, got ${keyLength}`);
  const o = empty(q.gpu, q.shape, "attention");
  const lse = empty(q.gpu, [B, T, H], "attention");
  forward(q.gpu, dims(inputs, B * T * H), { q, k, v, o, lse }, [B * T * H], { D });
  return { o, lse };
}

/** delta [B,T,H] = Σ over D of dout∘o: what both backward passes share. */
export function attentionDelta(dout: Tensor, o: Tensor): Tensor {
  const delta = empty(o.gpu, o.shape.slice(0, -1), "attentionBackward");
  rowDot(o.gpu, { M: delta.size, N: o.shape.at(-1) ?? 0 }, { a: dout, b: o, y: delta }, [delta.size]);
  return delta;
}

/** dq of `attention`. */
export function attentionBackwardQuery(inputs: AttentionInputs, dout: Tensor, lse: Tensor, delta: Tensor): Tensor {
  const { q, k, v } = inputs;
  const dq = empty(q.gpu, q.shape, "attentionBackward");
  backwardQuery(q.gpu, dims(inputs, lse.size), { q, k, v, dout, lse, delta, dq }, [lse.size], { D: q.shape[3] ?? 0 });
  return dq;
}

/** dk and dv of `attention`, one dispatch. */
export function attentionBackwardKeyValue(
  inputs: AttentionInputs,
  dout: Tensor,
  lse: Tensor,
  delta: Tensor,
): { dk: Tensor; dv: Tensor } {
  const { q, k, v } = inputs;
  const [B = 0, S = 0, G = 0, D = 0] = k.shape;
  const dk = empty(k.gpu, k.shape, "attentionBackward");
  const dv = empty(k.gpu, k.shape, "attentionBackward");
  backwardKeyValue(k.gpu, dims(inputs, B * S * G), { q, k, v, dout, lse, delta, dk, dv }, [B * S * G], { D });
  return { dk, dv };
}

function dims({ q, k, scale, keyLength }: AttentionInputs, n: number): Record<string, number> {
  const [, T = 0, H = 0] = q.shape;
  const [, S = 0, G = 0] = k.shape;
  return { n, T, S, L: keyLength, H, G, s: scale };
}
