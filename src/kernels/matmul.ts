import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./matmul.wgsl";
import naiveSource from "./matmul-naive.wgsl";

const tiled = defineKernel("matmul", source);
const naive = defineKernel("matmul-naive", naiveSource);

/** BLAS letters for (x, w): "n" as stored, "t" transposed. */
export type Layout = "nn" | "nt" | "tn";

/** R more columns of the product: `scale · u·b`, with u [M,R] and b [R,N] (stored [N,R] under "nt"). */
export interface LowRank {
  readonly u: Tensor;
  readonly b: Tensor;
  readonly scale: number;
}

export interface MatmulOptions {
  /** Factor on x·w; 1 unless given. */
  readonly scale?: number;
  readonly lowRank?: LowRank;
}

/**
 * y = scale·op(x)·op(w) (+ lowRank.scale·u·b), one dispatch.
 *
 * "nn": x [M,K], w [K,N]. "nt": x [M,K], w [N,K]. "tn": x [K,M], w [K,N]. All give y [M,N]. Further leading axes are batches:
 * those of x and w must be equal, or w has none and serves every batch (x's are then rows of one product). A low-rank term
 * and batches exclude each other. Throws ShapeError if the shapes do not fit.
 */
export function matmul(
  x: Tensor,
  w: Tensor,
  layout: Layout = "nn",
  { scale = 1, lowRank }: MatmulOptions = {},
): Tensor {
  const { M, N, K, batch, rows } = sizes(x, w, layout);
  const R = lowRank?.u.shape.at(-1) ?? 0;
  if (lowRank) {
    if (batch > 1)
      throw new ShapeError(`matmul: a low-rank term needs unbatched operands, got x [${x.shape}] and w [${w.shape}]`);
    expectShape("matmul", "u must be [M,R]", lowRank.u, [...(lowRank.u.shape.length > 2 ? rows : [M]), R]);
    expectShape(
      "matmul",
      layout === "nt" ? "b must be [N,R]" : "b must be [R,N]",
      lowRank.b,
      layout === "nt" ? [N, R] : [R, N],
    );
  }
  const y = empty(x.gpu, [...rows, N], "matmul");
  if (y.size === 0) return y;
  const X_T = layout === "tn" ? 1 : 0;
  const W_T = layout === "nt" ? 1 : 0;
  const fits = (X_T ? M : K) % 4 === 0 && (W_T ? K : N) % 4 === 0;
  const uniforms = { M, N, K, R, s: scale, c: lowRank?.scale ?? 0, x_batch: M * K, w_batch: K * N };
  const buffers = { x, w, u: lowRank?.u ?? x, b: lowRank?.b ?? w, y };
  if (!fits) naive(x.gpu, uniforms, buffers, [N, M, batch], { X_T, W_T });
  else {
    const { TM, TN, WX, WY } = tile(M, N, x.gpu.isSoftware);
    tiled(x.gpu, uniforms, buffers, [Math.ceil(N / TN), Math.ceil(M / TM), batch], { TM, TN, WX, WY, X_T, W_T });
  }
  return y;
}

/**
 * A thread's tile TM×TN and the workgroup WX×WY. A CPU wants the tallest tile its registers hold and few threads to a group
 * (16×8 ran 1.3 times faster than 8×8 on SwiftShader); few rows want a tile no taller than they are.
 */
function tile(M: number, N: number, isSoftware: boolean): { TM: number; TN: number; WX: number; WY: number } {
  const TN = N <= 4 ? 4 : 8;
  if (M < 8) return { TM: M === 1 ? 1 : 4, TN, WX: isSoftware ? 4 : 64, WY: 1 };
  return isSoftware ? { TM: M >= 16 ? 16 : 8, TN, WX: 4, WY: 1 } : { TM: 8, TN, WX: 8, WY: 8 };
}

function sizes(x: Tensor, w: Tensor, layout: Layout) {
  if (x.shape.length < 2 || w.shape.length < 2)
    throw new ShapeError(`matmul: x and w must have at least two axes, got [${x.shape}] and [${w.shape}]`);
  const [wa = 0, wb = 0] = w.shape.slice(-2);
  const [N, K] = layout === "nt" ? [wa, wb] : [wb, wa];
  const lead = x.shape.slice(0, -2);
  const [xa = 0, xb = 0] = x.shape.slice(-2);
  const fold = w.shape.length === 2 && layout !== "tn"; // leading axes of x are more rows of one product
  const [M, xK] = layout === "tn" ? [xb, xa] : [fold ? lead.reduce((a, b) => a * b, xa) : xa, xb];
  if (xK !== K)
    throw new ShapeError(
      `matmul: the inner sizes of "${layout}" must be equal, got x [${x.shape}] with ${xK} and w [${w.shape}] with ${K}`,
    );
  const batches = w.shape.slice(0, -2);
  if (!fold && `${batches}` !== `${lead}`)
    throw new ShapeError(`matmul: the leading axes of x and w must be equal, got x [${x.shape}] and w [${w.shape}]`);
  return fold
    ? { M, N, K, batch: 1, rows: x.shape.slice(0, -1) }
    : { M, N, K, batch: lead.reduce((a, b) => a * b, 1), rows: [...lead, M] };
}
