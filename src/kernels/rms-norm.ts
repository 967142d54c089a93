import { defineKernel } from "../gpu/kernel.ts";
import { dims2, empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import { reduce } from "./reduce.ts";
import source from "./rms-norm.wgsl";
import backwardSource from "./rms-norm-backward.wgsl";
import weightSource from "./rms-norm-backward-weight.wgsl";

const forward = defineKernel("rms-norm", source);
const backward = defineKernel("rms-norm-backward", backwardSource);
const backwardWeight = defineKernel("rms-norm-backward-weight", weightSource);

/** Rows that one thread adds up on the way to a weight gradient. */
const CHUNK = 64;

/** y = x·r·w with r = 1/√(mean(x²) + eps) over the last axis; r [rows] is kept for backward. x [...,H], w [H]. */
export function rmsNorm(x: Tensor, w: Tensor, eps: number): { y: Tensor; r: Tensor } {
  const [M, H] = dims2("rmsNorm", "x", x);
  expectShape("rmsNorm", "weight must be [H]", w, [H]);
  const y = empty(x.gpu, x.shape, "rmsNorm");
  const r = empty(x.gpu, [M], "rmsNorm");
  forward(x.gpu, { M, H, eps }, { x, w, y, r }, [M]);
  return { y, r };
}

/** dx of `rmsNorm`. */
export function rmsNormBackward(dy: Tensor, x: Tensor, w: Tensor, r: Tensor): Tensor {
  const [M, H] = dims2("rmsNormBackward", "x", x);
  const dx = empty(x.gpu, x.shape, "rmsNormBackward");
  backward(x.gpu, { M, H }, { x, w, r, dy, dx }, [M]);
  return dx;
}

/** dw of `rmsNorm`, [H]: partial sums per chunk of rows, then their sum, in a fixed order. */
export function rmsNormBackwardWeight(dy: Tensor, x: Tensor, r: Tensor): Tensor {
  const [M, H] = dims2("rmsNormBackward", "x", x);
  const partial = empty(x.gpu, [Math.ceil(M / CHUNK), H], "rmsNormBackward");
  backwardWeight(x.gpu, { M, H, rows: CHUNK, n: partial.size }, { x, r, dy, partial }, [partial.size]);
  return reduce("sum", partial, 0);
}
