import { defineKernel } from "../gpu/kernel.ts";
import { dims2, empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./layer-norm.wgsl";
import backwardSource from "./layer-norm-backward.wgsl";
import weightSource from "./layer-norm-backward-weight.wgsl";
import { reduce } from "./reduce.ts";

const forward = defineKernel("layer-norm", source);
const backward = defineKernel("layer-norm-backward", backwardSource);
const backwardWeight = defineKernel("layer-norm-backward-weight", weightSource);

/** Rows that one thread adds up on the way to a weight gradient. */
const CHUNK = 64;

/** y = (x − mean)·r∘w + b over the last axis; stats [rows,2] = (mean, r) are kept for backward. x [...,H], w and b [H]. */
export function layerNorm(x: Tensor, w: Tensor, b: Tensor, eps: number): { y: Tensor; stats: Tensor } {
  const [M, H] = dims2("layerNorm", "x", x);
  expectShape("layerNorm", "weight must be [H]", w, [H]);
  expectShape("layerNorm", "bias must be [H]", b, [H]);
  const y = empty(x.gpu, x.shape, "layerNorm");
  const stats = empty(x.gpu, [M, 2], "layerNorm");
  forward(x.gpu, { M, H, eps }, { x, w, b, y, stats }, [M]);
  return { y, stats };
}

/** dx of `layerNorm`. */
export function layerNormBackward(dy: Tensor, x: Tensor, w: Tensor, stats: Tensor): Tensor {
  const [M, H] = dims2("layerNormBackward", "x", x);
  const dx = empty(x.gpu, x.shape, "layerNormBackward");
  backward(x.gpu, { M, H }, { x, w, stats, dy, dx }, [M]);
  return dx;
}

/** dw of `layerNorm`, [H]: partial sums per chunk of rows, then their sum, in a fixed order. */
export function layerNormBackwardWeight(dy: Tensor, x: Tensor, stats: Tensor): Tensor {
  const [M, H] = dims2("layerNormBackward", "x", x);
  const partial = empty(x.gpu, [Math.ceil(M / CHUNK), H], "layerNormBackward");
  backwardWeight(x.gpu, { M, H, rows: CHUNK, n: partial.size }, { x, stats, dy, partial }, [partial.size]);
  return reduce("sum", partial, 0);
}
