import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./rope.wgsl";

const kernel = defineKernel("rope", source);

/**
 * Turns each pair (i, i + D/2) of x [B,T,H,D] by the angle of its position, offset + t; `sign` −1 turns back.
 *
 * cos and sin are [P,D/2]. Throws ShapeError if the shapes do not fit or a position is past the tables.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor, offset: number, sign: 1 | -1): Tensor {
  const [, T, H, D] = x.shape;
  if (x.shape.length !== 4 || T === undefined || H === undefined || D === undefined || D % 2 !== 0)
    throw new ShapeError(`rope: x must be [B,T,H,D] with an even D, got [${x.shape}]`);
  const [P = 0] = cos.shape;
  expectShape("rope", "cos must be [P,D/2]", cos, [P, D / 2]);
  expectShape("rope", "sin must be [P,D/2]", sin, [P, D / 2]);
  if (offset + T > P) throw new ShapeError(`rope: positions must be below ${P}, got ${offset} to ${offset + T - 1}`);
  const y = empty(x.gpu, x.shape, "rope");
  kernel(x.gpu, { n: x.size / 2, T, H, D, offset, sign }, { x, cosines: cos, sines: sin, y }, [x.size / 2]);
  return y;
}
