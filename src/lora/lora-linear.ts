import { adding, once, record } from "../autograd/engine.ts";
import { loraDy } from "../kernels/lora-dy.ts";
import { matmul } from "../kernels/matmul.ts";
import { sumTo } from "../kernels/reduce.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { type Tensor, view } from "../tensor/tensor.ts";

/**
 * LoRA linear layer: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ + bias.        arXiv:2106.09685 §4.1; s = alpha / r
 *
 *     x [...,K]   W [N,K]   A [R,K]   B [N,R]   bias [N]   →   y [...,N]
 *     u = x·Aᵀ       [M,R]   kept from forward, for dB
 *     v = s·dy·B     [M,R]   computed once, for dx and dA
 *
 * Two dispatches forward; W is read once and y written once, for the low-rank term is R more columns of the same product. W may be
 * packed (f16, bf16, int8, nf4): it is widened as it is read, forward and for dx. Throws ShapeError if the shapes do not fit.
 */
export function loraLinear(
  x: Tensor,
  W: Tensor | PackedMatrix,
  A: Tensor,
  B: Tensor,
  s: number,
  bias?: Tensor,
): Tensor {
  const u = matmul(x, A, "nt");
  const y = matmul(x, W, "nt", { lowRank: { u, b: B, scale: s }, ...(bias && { bias }) });
  const rows = (t: Tensor): Tensor => view(t, [t.size / (t.shape.at(-1) ?? 1), t.shape.at(-1) ?? 1]);
  const base = isPacked(W) ? [] : [W]; // a packed one is always frozen

  return record("loraLinear", y, [x, A, B, ...(bias ? [bias] : []), ...base], (dy) => {
    // v and dB both go through dy: together where both are needed.
    const both = once(() => loraDy(dy, B, u, s));
    const areBoth = B.requiresGrad && (A.requiresGrad || x.requiresGrad);
    const v = once(() => (areBoth ? both().v : matmul(dy, B, "nn", { scale: s }))); // [...,R]
    const dx = adding((residual) =>
      matmul(dy, W, "nn", { lowRank: { u: v(), b: A, scale: 1 }, ...(residual && { residual }) }),
    ); // [...,K]
    const dA = () => matmul(rows(v()), rows(x), "tn"); // [R,K]
    const dB = () => (areBoth ? both().dB : matmul(rows(dy), rows(u), "tn", { scale: s })); // [N,R]
    const dW = () => matmul(rows(dy), rows(x), "tn"); // [N,K], never run while W is frozen
    return [dx, dA, dB, ...(bias ? [() => sumTo(dy, bias.shape)] : []), dW];
  });
}
