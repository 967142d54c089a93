import type { Gpu } from "../gpu/gpu.ts";
import { defineKernel, definePart, type Part } from "../gpu/kernel.ts";
import { dims2, empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import addGradientSource from "./parts/add-gradient.wgsl";
import addNormSource from "./parts/add-norm.wgsl";
import fourSource from "./parts/norm-four.wgsl";
import { reduce } from "./reduce.ts";
import source from "./rms-norm.wgsl";
import backwardSource from "./rms-norm-backward.wgsl";
import weightSource from "./rms-norm-backward-weight.wgsl";

const forward = defineKernel("rms-norm", source);
const backward = defineKernel("rms-norm-backward", backwardSource);
const backwardWeight = defineKernel("rms-norm-backward-weight", weightSource);
const FOUR = [definePart("norm-four", fourSource)];
const ADD_NORM = definePart("add-norm", addNormSource);
const ADD_GRADIENT = definePart("add-gradient", addGradientSource);

/** Rows that one thread adds up on the way to a weight gradient. */
const CHUNK = 64;

/** How a row of H elements is gone through: n lanes by a workgroup of WG threads, on a CPU adapter as many as it runs side by side. */
function rowLanes(gpu: Gpu, H: number): { readonly n: number; readonly WG: number; readonly parts: readonly Part[] } {
  const n = H % 4 === 0 ? H / 4 : H;
  return { n, WG: gpu.isSoftware ? 4 : n < 128 ? 32 : n < 512 ? 128 : 256, parts: n < H ? FOUR : [] };
}

/**
 * y = s·r·(offset + w) with s = x, or x + delta where that is given, and r = 1/√(mean(s²) + eps) over the last axis, in one dispatch.
 *
 * x and delta [...,H], w [H]. `sum` is s; it and r [rows] are kept for backward. Throws ShapeError if the shapes do not fit.
 */
export function rmsNorm(
  x: Tensor,
  w: Tensor,
  eps: number,
  offset = 0,
  delta?: Tensor,
): { y: Tensor; r: Tensor; sum: Tensor } {
  const { gpu, shape } = x;
  const op = delta ? "addRmsNorm" : "rmsNorm";
  const [M, H] = dims2(op, "x", x);
  expectShape(op, "weight must be [H]", w, [H]);
  if (delta) expectShape(op, "delta must have the shape of x", delta, shape);
  const y = empty(gpu, shape, op);
  const r = empty(gpu, [M], op);
  const sum = delta ? empty(gpu, shape, op) : x;
  const { n, WG, parts } = rowLanes(gpu, H);
  const added = delta ? [...parts, ADD_NORM] : parts;
  forward(gpu, { M, n, H, eps, o: offset }, { x, w, y, r, sum, delta: delta ?? x }, [M * WG], { WG }, added);
  return { y, r, sum };
}

/** dx of `rmsNorm`, or more + dx. */
export function rmsNormBackward(dy: Tensor, x: Tensor, w: Tensor, r: Tensor, offset = 0, more?: Tensor): Tensor {
  const [M, H] = dims2("rmsNormBackward", "x", x);
  const dx = empty(x.gpu, x.shape, "rmsNormBackward");
  const { n, WG, parts } = rowLanes(x.gpu, H);
  const added = more ? [...parts, ADD_GRADIENT] : parts;
  backward(x.gpu, { M, n, H, o: offset }, { x, w, r, dy, dx, more: more ?? dy }, [M * WG], { WG }, added);
  return dx;
}

/** dw of `rmsNorm`, [H]: partial sums per chunk of rows, then their sum, in a fixed order. */
export function rmsNormBackwardWeight(dy: Tensor, x: Tensor, r: Tensor): Tensor {
  const [M, H] = dims2("rmsNormBackward", "x", x);
  const C = Math.ceil(M / CHUNK);
  const partial = empty(x.gpu, [C, H], "rmsNormBackward");
  const { n, parts } = rowLanes(x.gpu, H);
  backwardWeight(x.gpu, { M, H: n, rows: CHUNK, n: C * n }, { x, r, dy, partial }, [C * n], {}, parts);
  const dw = reduce("sum", partial, 0);
  x.gpu.release(partial);
  return dw;
}
