import { defineKernel, definePart } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { dims2, empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import fourSource from "./parts/four-lanes.wgsl";
import source from "./rope.wgsl";

const kernel = defineKernel("rope", source);
const FOUR = [definePart("four-lanes", fourSource)];

/**
 * Turns each pair (i, i + E/2) of x [B,T,H,D], E at most D, by the angle of its position: `at` + t, or at[b,t] where `at` is i32 [B,T];
 * `sign` −1 turns back. What is behind the first E elements of a head stays (partial rotary).
 *
 * cos and sin are [P,E/2]. Throws ShapeError if the shapes do not fit or a position is past the tables; those of a tensor are not looked at.
 */
export function rope(x: Tensor, cos: Tensor, sin: Tensor, at: number | Tensor, sign: 1 | -1): Tensor {
  const [B = 0, T, H, D] = x.shape;
  if (x.shape.length !== 4 || T === undefined || H === undefined || D === undefined || D % 2 !== 0)
    throw new ShapeError(`rope: x must be [B,T,H,D] with an even D, got [${x.shape}]`);
  const [P, pairs] = dims2("rope", "cos", cos);
  if (pairs > D / 2) throw new ShapeError(`rope: cos must be [P,E/2] with E at most D = ${D}, got [${cos.shape}]`);
  expectShape("rope", "sin must have the shape of cos", sin, cos.shape);
  const given = typeof at === "number" ? undefined : at;
  const offset = typeof at === "number" ? at : 0;
  if (given) {
    expectShape("rope", "positions must be [B,T]", given, [B, T]);
    expectDType("rope", "positions", given, "i32");
  } else if (offset + T > P)
    throw new ShapeError(`rope: positions must be below ${P}, got ${offset} to ${offset + T - 1}`);
  const y = empty(x.gpu, x.shape, "rope");
  const inFours = pairs % 4 === 0 && D % 4 === 0;
  const [half, width] = inFours ? [pairs / 4, D / 4] : [pairs, D];
  const n = (x.size / D) * (width - half);
  const buffers = { x, cosines: cos, sines: sin, positions: given ?? x, y };
  const uniforms = { n, T, H, half, width, offset, sign };
  kernel(x.gpu, uniforms, buffers, [n], { GIVEN: given ? 1 : 0 }, inFours ? FOUR : []);
  return y;
}
