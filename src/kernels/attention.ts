import { defineKernel, definePart, type Kernel, type Tuned } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./attention.wgsl";
import keyValueSource from "./attention-backward-kv.wgsl";
import querySource from "./attention-backward-q.wgsl";
import deltaSource from "./attention-delta.wgsl";
import { CPU_WIDE, mostOperations } from "./matmul-plans.ts";
import teamSource from "./parts/attention-team.wgsl";

const forward = defineKernel("attention", source);
const backwardQuery = defineKernel("attention-backward-q", querySource);
const backwardKeyValue = defineKernel("attention-backward-kv", keyValueSource);
const rowDot = defineKernel("attention-delta", deltaSource);
const TEAM = [definePart("attention-team", teamSource)];

/** What one attention call works on. */
export interface AttentionInputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly scale: number;
  /** How many of the S keys count. Query t is at position p = keyLength − T + t and sees no key past p. */
  readonly keyLength: number;
  /** How many keys up to its own position a query sees: p − window + 1 … p. All unless given. */
  readonly window?: number | undefined;
  /** The first key that each query sees: i32 [B,T], not decreasing along T and at most p, neither of which is checked. 0 unless given. */
  readonly starts?: Tensor | undefined;
  /** Every query sees every key of its row, of which there are lengths[b]: i32 [B], each from 1 to keyLength, which is not checked. */
  readonly lengths?: Tensor | undefined;
  /** c > 0: a score x becomes c·tanh(x/c) (Gemma 2, arXiv:2408.00118 §2). */
  readonly softCap?: number | undefined;
}

/**
 * Attention with grouped queries, causal unless there are lengths: q [B,T,H,D], k and v [B,S,G,D] → o [B,T,H,D] and its log-sum-exp [B,T,H].
 *
 * Throws ShapeError if the shapes do not fit, D is not a multiple of 4, or window or softCap is not above 0.
 */
export function attention(inputs: AttentionInputs): { o: Tensor; lse: Tensor } {
  const { q, k, v, starts, lengths, keyLength, window = 1, softCap = 1 } = inputs;
  const [B = 0, T = 0, H = 0, D = 0] = q.shape;
  if (q.shape.length !== 4 || D % 4 !== 0)
    throw new ShapeError(`attention: q must be [B,T,H,D] with D a multiple of 4, got [${q.shape}]`);
  const [, S = 0, G = 0] = k.shape;
  expectShape("attention", "k must be [B,S,G,D]", k, [B, S, G, D]);
  expectShape("attention", "v must be [B,S,G,D]", v, [B, S, G, D]);
  if (H % G !== 0) throw new ShapeError(`attention: query heads must be a multiple of key heads, got ${H} and ${G}`);
  if (keyLength < T || keyLength > S)
    throw new ShapeError(`attention: keyLength must be from T = ${T} to S = ${S}, got ${keyLength}`);
  if (!Number.isInteger(window) || window < 1)
    throw new ShapeError(`attention: window must be a whole number of keys from 1 on, got ${window}`);
  if (!(softCap > 0)) throw new ShapeError(`attention: softCap must be above 0, got ${softCap}`);
  if (starts) {
    expectShape("attention", "starts must be [B,T]", starts, [B, T]);
    expectDType("attention", "starts", starts, "i32");
  }
  if (lengths) {
    if (starts || inputs.window) throw new ShapeError("attention: lengths take no window and no starts, got one");
    expectShape("attention", "lengths must be [B]", lengths, [B]);
    expectDType("attention", "lengths", lengths, "i32");
  }
  const o = empty(q.gpu, q.shape, "attention");
  const lse = empty(q.gpu, [B, T, H], "attention");
  run(forward, inputs, { o, lse }, B * H, T, 4);
  return { o, lse };
}

/** lse and delta = Σ over D of dout∘o, [B,T,H,2]: what both backward passes share. */
export function attentionDelta(dout: Tensor, o: Tensor, lse: Tensor): Tensor {
  const stats = empty(o.gpu, [...lse.shape, 2], "attentionBackward");
  rowDot(o.gpu, { n: lse.size, D: o.shape[3] ?? 0 }, { dout, o, lse, stats }, [lse.size]);
  return stats;
}

/** dq of `attention`. */
export function attentionBackwardQuery(inputs: AttentionInputs, dout: Tensor, stats: Tensor): Tensor {
  const [B = 0, T = 0, H = 0] = inputs.q.shape;
  const dq = empty(dout.gpu, inputs.q.shape, "attentionBackward");
  run(backwardQuery, inputs, { dout, stats, dq }, B * H, T, 2);
  return dq;
}

/** dk and dv of `attention`, one dispatch. */
export function attentionBackwardKeyValue(
  inputs: AttentionInputs,
  dout: Tensor,
  stats: Tensor,
): { dk: Tensor; dv: Tensor } {
  const { k } = inputs;
  const [B = 0, S = 0, G = 0] = k.shape;
  const dk = empty(k.gpu, k.shape, "attentionBackward");
  const dv = empty(k.gpu, k.shape, "attentionBackward");
  run(backwardKeyValue, inputs, { dout, stats, dk, dv }, B * G, S, 2);
  return { dk, dv };
}

/**
 * Tiles of `rows` queries (or keys) of each of `heads` go to a thread each on a CPU adapter, where vec4s of `quads` times 4 keys at a time
 * make up for accumulators in memory, else to a workgroup. A single row has a tile of its own; eight rows take two to three times as long to
 * compile as four and pay where there is much to do.
 */
function run(
  kernel: Kernel,
  inputs: AttentionInputs,
  buffers: Readonly<Record<string, Tensor>>,
  heads: number,
  rows: number,
  quads: number,
): void {
  const { q, k, v, scale, keyLength, window, starts, lengths, softCap } = inputs;
  const [, T = 0, H = 0, D = 0] = q.shape;
  const [, S = 0, G = 0] = k.shape;
  const { isSoftware } = q.gpu;
  const isWide = isSoftware && 2 * q.size * keyLength >= CPU_WIDE;
  const R = rows === 1 ? 1 : isWide ? 8 : 4;
  const [WX, WY] = isSoftware ? [1, 1] : R === 1 ? [32, 1] : [8, 8];
  const n = heads * Math.ceil(rows / (R * WY));
  const WG = isSoftware ? 8 : WX * WY;
  const tuned: Tuned = {
    ...{ R, Q: isSoftware ? quads : 1, WX, WY, WG, CAP: softCap ? 1 : 0 },
    ...{ BOUNDED: window || starts ? 1 : 0, SEGMENTED: starts ? 1 : 0, BOTH_WAYS: lengths ? 1 : 0 },
  };
  const uniforms = { T, S, L: keyLength, H, G, D, window: window ?? keyLength, s: scale, c: softCap ?? 1 };
  // Of scores and of sums, as if every key were seen.
  const dispatches = Math.ceil((2 * 2 * q.size * keyLength) / mostOperations(q.gpu));
  const tiles = Math.ceil(n / Math.max(1, dispatches));
  for (let first = 0; first < n; first += tiles) {
    const end = Math.min(n, first + tiles);
    kernel(
      q.gpu,
      { ...uniforms, first, n: end },
      { q, k, v, starts: starts ?? lengths ?? q, ...buffers },
      [(end - first) * (isSoftware ? 1 : WG)],
      tuned,
      isSoftware ? [] : TEAM,
    );
  }
}
