import { add, matmul, sub } from "../autograd/basic-ops.ts";
import { once, record } from "../autograd/engine.ts";
import { dropout } from "../autograd/model-ops.ts";
import { binary } from "../kernels/binary.ts";
import { doraNorms, gain, gainBackward } from "../kernels/dora.ts";
import { reduce, sumTo } from "../kernels/reduce.ts";
import { unpackMatrix } from "../kernels/unpack.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { type Tensor, view } from "../tensor/tensor.ts";
import { type LoraDropout, type LoraLayer, loraLinear } from "./lora-linear.ts";

/** DoRA's own parts of a layer, arXiv:2402.09353 §4. */
export interface Magnitude {
  /** m [N]: what the rows of W + s·B·A are scaled to. Trained. */
  readonly m: Tensor;
  /** ‖W‖² of every row, [N]. */
  readonly squares: Tensor;
}

/** ‖W‖² of every row: [N,K] → [N]. */
export function rowSquares(W: Tensor | PackedMatrix): Tensor {
  const { gpu } = W;
  return gpu.scope(() => {
    const wide = isPacked(W) ? unpackMatrix(W) : W;
    return reduce("sum", binary("mul", wide, wide), -1);
  });
}

/**
 * What DoRA makes of z = x·(W + s·B·A)ᵀ: y = (m/n)∘z + bias with n = ‖W + s·B·A‖ by rows, to which no gradient goes, as in PEFT.
 *
 * dz = (m/n)∘dy, dm = Σ dy∘z / n: z is kept. n is made anew in each forward pass, by one product of R rows.
 */
export function withMagnitude(z: Tensor, { W, A, B, bias }: LoraLayer, { m, squares }: Magnitude, s: number): Tensor {
  const norms = doraNorms(W, A, B, squares, s, m);
  const y = gain(z, norms.gain, bias);
  return record("dora", y, [z, m, ...(bias ? [bias] : [])], (dy) => {
    const both = once(() => gainBackward(dy, z, norms.gain, norms.inverse));
    return [() => both().dz, () => both().dm, ...(bias ? [() => sumTo(dy, bias.shape)] : [])];
  });
}

/**
 * DoRA linear layer: y = (m/n)∘(x·Wᵀ + s·(x·Aᵀ)·Bᵀ) + bias. x [...,K] → [...,N].
 *
 * With dropout what is dropped of x is dropped for W too, as far as the magnitude changes it: with x̂ for the dropped x,
 * y = x·Wᵀ + (m/n − 1)∘(x̂·Wᵀ) + (m/n)∘s·(x̂·Aᵀ)·Bᵀ + bias, which is PEFT's, computed as (m/n)∘(x̂·Wᵀ + …) + (x − x̂)·Wᵀ.
 */
export function doraLinear(x: Tensor, layer: LoraLayer, magnitude: Magnitude, s: number, drop?: LoraDropout): Tensor {
  const { W, A, B } = layer;
  if (!drop) return withMagnitude(loraLinear(x, W, A, B, s), layer, magnitude, s);
  const dropped = dropout(x, drop.p, drop.key);
  const y = withMagnitude(loraLinear(dropped, W, A, B, s), layer, magnitude, s);
  return add(y, matmul(sub(x, dropped), W, "nt"));
}

/** (m/n)∘(W + s·B·A) by rows: the weight that DoRA stands for. `sum` is W + s·B·A. */
export function mergedMagnitude(sum: Tensor, { W, A, B }: LoraLayer, { m, squares }: Magnitude, s: number): Tensor {
  const { gain: g } = doraNorms(W, A, B, squares, s, m);
  return binary("mul", sum, view(g, [g.size, 1]));
}
