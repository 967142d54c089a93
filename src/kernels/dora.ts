import type { Gpu } from "../gpu/gpu.ts";
import { defineKernel, type Part } from "../gpu/kernel.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import { dims2, empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import normsSource from "./dora-norms.wgsl";
import gainSource from "./gain.wgsl";
import gainBackwardSource from "./gain-backward.wgsl";
import { lanes } from "./lanes.ts";
import { matmul } from "./matmul.ts";
import { reduce } from "./reduce.ts";

const normsKernel = defineKernel("dora-norms", normsSource);
const forward = defineKernel("gain", gainSource);
const backward = defineKernel("gain-backward", gainBackwardSource);

/** Rows that a thread goes through: on a CPU adapter many, which saves loads of what a column has in common. */
const rowsAtATime = (gpu: Gpu): number => (gpu.isSoftware ? 64 : 16);

/**
 * n = ‖W + s·B·A‖ of every row, without that sum being made: W is read once, by a product of R rows.
 *
 * W [N,K], A [R,K], B [N,R]; squares [N] = ‖W‖² of every row. With m [N] `gain` is m/n, else n; `inverse` is 1/n. Both [N].
 * Throws ShapeError if the shapes do not fit.
 */
export function doraNorms(
  W: Tensor | PackedMatrix,
  A: Tensor,
  B: Tensor,
  squares: Tensor,
  s: number,
  m?: Tensor,
): { gain: Tensor; inverse: Tensor } {
  const { gpu } = A;
  const [R] = dims2("doraNorms", "A", A);
  const [N] = dims2("doraNorms", "B", B);
  expectShape("doraNorms", "squares must be [N]", squares, [N]);
  if (m) expectShape("doraNorms", "m must be [N]", m, [N]);
  const [factor, inverse] = [empty(gpu, [N], "doraNorms"), empty(gpu, [N], "doraNorms")];
  gpu.scope(() => {
    const p = matmul(A, W, "nt", { scale: 2 * s, lowRank: { u: matmul(A, A, "nt"), b: B, scale: s * s } }); // [R,N]
    normsKernel(gpu, { N, R }, { squares, p, b: B, m: m ?? squares, gain: factor, inverse }, [N], { HAS_M: m ? 1 : 0 });
  });
  return { gain: factor, inverse };
}

function chunks(z: Tensor): {
  uniforms: Readonly<Record<"M" | "N" | "rows" | "n", number>>;
  C: number;
  parts: readonly Part[];
} {
  const [M, width] = dims2("gain", "z", z);
  const { n: N, parts } = lanes(z.gpu, width);
  const rows = rowsAtATime(z.gpu);
  const C = Math.ceil(M / rows);
  return { uniforms: { M, N, rows, n: C * N }, C, parts };
}

/** y = z∘g + bias, each column by its own factor. z [...,N], g and bias [N]. Throws ShapeError if the shapes do not fit. */
export function gain(z: Tensor, g: Tensor, bias?: Tensor): Tensor {
  const N = z.shape.at(-1) ?? 0;
  expectShape("gain", "g must be [N]", g, [N]);
  if (bias) expectShape("gain", "bias must be [N]", bias, [N]);
  const y = empty(z.gpu, z.shape, "gain");
  const { uniforms, parts } = chunks(z);
  forward(z.gpu, uniforms, { z, g, b: bias ?? g, y }, [uniforms.n], { BIAS: bias ? 1 : 0 }, parts);
  return y;
}

/**
 * dz = dy∘g and dm = h∘Σ dy∘z [N], in one pass over dy and z and a sum of what its chunks of rows gave, in a fixed order. With g = m∘h, as
 * of `doraNorms`, that is what goes back through `gain`.
 *
 * dy and z [...,N], g and h [N].
 */
export function gainBackward(dy: Tensor, z: Tensor, g: Tensor, h: Tensor): { dz: Tensor; dm: Tensor } {
  const dz = empty(z.gpu, z.shape, "gainBackward");
  const { uniforms, C, parts } = chunks(z);
  const partial = empty(z.gpu, [C, g.size], "gainBackward");
  backward(z.gpu, uniforms, { dy, z, g, h, dz, partial }, [uniforms.n], {}, parts);
  const dm = reduce("sum", partial, 0);
  z.gpu.release(partial);
  return { dz, dm };
}
