import { defineKernel, definePart } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import fourSource from "./parts/four-lanes.wgsl";
import source from "./rope.wgsl";

const kernel = defineKernel("rope", source);
const FOUR = [definePart("four-lanes", fourSource)];

/**
 * Turns each pair (i, i + D/2) of x [B,T,H,D] by the angle of its position: `at` + t, or at[b,t] where `at` is i32 [B,T]; `sign` −1
 * turns back.
 *
 * cos and sin are [P,D/2]. Throws ShapeError if the shapes do not fit or a position is past the tables; those of a tensor are not looked at.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor, at: number | Tensor, sign: 1 | -1): Tensor {
  const [B = 0, T, H, D] = x.shape;
  if (x.shape.length !== 4 || T === undefined || H === undefined || D === undefined || D % 2 !== 0)
    throw new ShapeError(`rope: x must be [B,T,H,D] with an even D, got [${x.shape}]`);
  const [P = 0] = cos.shape;
  expectShape("rope", "cos must be [P,D/2]", cos, [P, D / 2]);
  expectShape("rope", "sin must be [P,D/2]", sin, [P, D / 2]);
  const given = typeof at === "number" ? undefined : at;
  const offset = typeof at === "number" ? at : 0;
  if (given) {
    expectShape("rope", "positions must be [B,T]", given, [B, T]);
    expectDType("rope", "positions", given, "i32");
  } else if (offset + T > P)
    throw new ShapeError(`rope: positions must be below ${P}, got ${offset} to ${offset + T - 1}`);
  const y = empty(x.gpu, x.shape, "rope");
  const half = D % 8 === 0 ? D / 8 : D / 2;
  const n = (x.size / D) * half;
  const buffers = { x, cosines: cos, sines: sin, positions: given ?? x, y };
  kernel(x.gpu, { n, T, H, half, offset, sign }, buffers, [n], { GIVEN: given ? 1 : 0 }, half < D / 2 ? FOUR : []);
  return y;
}
