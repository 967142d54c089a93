import { adding, once, record } from "../autograd/engine.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { type DropoutKey, dropout } from "../kernels/dropout.ts";
import { loraDy } from "../kernels/lora-dy.ts";
import { matmul } from "../kernels/matmul.ts";
import { sumTo } from "../kernels/reduce.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { blockRows, dims2, empty, rowsOf, slice, type Tensor, tensor, view } from "../tensor/tensor.ts";

/** One linear layer and its pair A [R,K], B [N,R]. */
export interface LoraLayer {
  /** [N,K]; a packed one is widened as it is read. */
  readonly W: Tensor | PackedMatrix;
  readonly A: Tensor;
  readonly B: Tensor;
  /** [N] */
  readonly bias?: Tensor | undefined;
}

/** Dropout of what A multiplies, as in PEFT: of x on its way to A, not to W. */
export interface LoraDropout {
  readonly p: number;
  readonly key: DropoutKey;
}

/**
 * LoRA linear layer: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ + bias.        arXiv:2106.09685 §4.1; s = alpha / r
 *
 * x [...,K]   W [N,K]   A [R,K]   B [N,R]   bias [N]   →   y [...,N]. `loraLinears` of one layer: see there.
 */
export function loraLinear(
  x: Tensor,
  W: Tensor | PackedMatrix,
  A: Tensor,
  B: Tensor,
  s: number,
  bias?: Tensor,
  drop?: LoraDropout,
): Tensor {
  const [y] = loraLinears(x, [{ W, A, B, bias }], A, s, drop);
  return y as Tensor;
}

/**
 * LoRA linear layers that read the same x, of one rank: yᵢ = x·Wᵢᵀ + s·uᵢ·Bᵢᵀ + biasᵢ, uᵢ = x·Aᵢᵀ.
 *
 *     A [G·R,K]   their Aᵢ, which are views of it, one below the other
 *     u [G,P,R]   = x·Aᵀ, in one product that reads x once; kept from forward, for dB. uᵢ is its i-th block; of P rows M are used
 *     v [G,P,R]   vᵢ = s·dyᵢ·Bᵢ, the gradient of u; computed once, for dx = Σᵢ dyᵢ·Wᵢ + vᵢ·Aᵢ and dA = vᵀ·x, again one product
 *
 * 1 + G dispatches forward; each W is read once and each y written once, for the low-rank term is R more columns of the same product. A W
 * may be packed (f16, bf16, int8, nf4): it is widened as it is read, forward and for dx.
 *
 * With dropout (one layer) u = x̂·Aᵀ, x̂ = mask∘x/(1 − p). The backward pass makes the mask again: dA = vᵀ·x̂, dx = dy·W + mask∘(v·A)/(1 − p).
 *
 * Gradients of the Aᵢ are views of one tensor. Throws ShapeError if the shapes do not fit.
 */
export function loraLinears(
  x: Tensor,
  layers: readonly LoraLayer[],
  A: Tensor,
  s: number,
  drop?: LoraDropout,
): Tensor[] {
  if (drop && layers.length !== 1) throw new ShapeError(`loraLinears: dropout takes one layer, got ${layers.length}`);
  const dropped = (t: Tensor, sum?: Tensor): Tensor => (drop ? dropout(t, drop.p, drop.key, sum) : t);
  const pairs = layers.map((layer) => layer.A);
  const shrunk = shrink(x, A, pairs, dropped);

  return layers.map(({ W, A: own, B, bias }, i) => {
    const u = shrunk.block(i);
    const y = matmul(x, W, "nt", { lowRank: { u, b: B, scale: s }, ...(bias && { bias }) });
    const base = isPacked(W) ? [] : [W]; // a packed one is always frozen
    return record("loraLinear", y, [shrunk.u, x, B, ...(bias ? [bias] : []), ...base], (dy) => {
      const { v, dB } = throughB(dy, B, u, s, shrunk.u.requiresGrad || x.requiresGrad);
      const du = adding((sum) => shrunk.gradient(i, v, sum)); // [G,P,R]
      const dx = adding((sum) => {
        const low = v();
        const residual = sum ? { residual: sum } : {};
        if (!drop) return matmul(dy, W, "nn", { lowRank: { u: low, b: own, scale: 1 }, ...residual });
        return x.gpu.scope(() => dropped(matmul(low, own), matmul(dy, W, "nn", residual)));
      }); // [...,K]
      const dW = () => matmul(rows(dy), rows(x), "tn"); // [N,K], never run while W is frozen
      return [du, dx, dB, ...(bias ? [() => sumTo(dy, bias.shape)] : []), dW];
    });
  });
}

const rows = (t: Tensor): Tensor => view(t, dims2("loraLinear", "t", t));

/** u = x·Aᵀ of layers that read the same x. */
export interface Shrunk {
  /** [G,P,R] */
  readonly u: Tensor;
  /** uᵢ [...,R] */
  block(i: number): Tensor;
  /** Has `v` put the gradient of uᵢ into that of u, which is `sum` where there is one. */
  gradient(i: number, v: (out: Tensor) => void, sum?: Tensor): Tensor;
}

/** x·Aᵀ in one product, A [G·R,K] the Aᵢ one below the other, and their gradients vᵀ·x; `dropped` is done to x on its way. */
export function shrink(
  x: Tensor,
  A: Tensor,
  pairs: readonly Tensor[],
  dropped: (x: Tensor) => Tensor = (t) => t,
): Shrunk {
  const { gpu } = x;
  const G = pairs.length;
  const [M] = dims2("loraLinear", "x", x);
  const R = dims2("loraLinear", "A", A)[0] / G;
  const P = G === 1 ? M : blockRows(M, R);
  const block = (t: Tensor, i: number): Tensor => slice(t, i * P * R, [...x.shape.slice(0, -1), R]);

  const u = empty(gpu, [G, P, R], "loraLinear");
  gpu.scope(() => void matmul(dropped(x), A, "nt", { out: u, blocked: true }));
  const filled = new Set<number>();
  record("loraShrink", u, pairs, (v) => {
    // A layer that nothing came of has no gradient.
    for (let i = 0; i < G; i++)
      if (!filled.has(i)) copyTo(tensor(gpu, new Float32Array(M * R), [M, R]), view(block(v, i), [M, R]));
    const dA = once(() => gpu.scope(() => matmul(v, rows(dropped(x)), "tn", { blocked: true }))); // [G·R,K]
    return pairs.map((_, i) => () => rowsOf(dA(), i * R, R));
  });
  return {
    u,
    block: (i) => block(u, i),
    gradient: (i, v, sum = empty(gpu, u.shape, "loraLinear")) => {
      filled.add(i);
      v(block(sum, i));
      return sum;
    },
  };
}

/**
 * What comes of dy [...,N] on its way through s·u·Bᵀ: v = s·dy·B, the gradient of u, and dB = s·dyᵀ·u, each once. v goes to the `out` that it is
 * first asked for with.
 */
export function throughB(
  dy: Tensor,
  B: Tensor,
  u: Tensor,
  s: number,
  wantsV: boolean,
): { readonly v: (out?: Tensor) => Tensor; readonly dB: () => Tensor } {
  let place: Tensor | undefined;
  // Both go through dy: together where both are needed.
  const both = once(() => loraDy(dy, B, u, s, undefined, place));
  const areBoth = B.requiresGrad && wantsV;
  const v = once(() => (areBoth ? both().v : matmul(dy, B, "nn", { scale: s, ...(place && { out: place }) }))); // [...,R]
  return {
    v: (out) => {
      place ??= out;
      return v();
    },
    dB: () => (areBoth ? both().dB : matmul(rows(dy), rows(u), "tn", { scale: s })), // [N,R]
  };
}
