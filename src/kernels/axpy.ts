import { defineKernel, mapUniform, type Uniform } from "../gpu/kernel.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import addIntoSource from "./add-into.wgsl";
import source from "./axpy.wgsl";
import { lanes } from "./lanes.ts";

const kernel = defineKernel("axpy", source);
const addIntoKernel = defineKernel("add-into", addIntoSource);

/** y = a·x + b·z, elementwise on tensors of one shape (no broadcasting: see `add`). Throws ShapeError if they differ. */
export function axpy(a: Uniform, x: Tensor, b: Uniform, z: Tensor): Tensor {
  expectShape("axpy", "z must have the shape of x", z, x.shape);
  const y = empty(x.gpu, x.shape, "axpy");
  const { n, parts } = lanes(x.gpu, x.size);
  kernel(x.gpu, { n, a, b }, { x, z, y }, [n], {}, parts);
  return y;
}

/** x + z, for two gradients that meet. */
export const sum2 = (x: Tensor, z: Tensor): Tensor => axpy(1, x, 1, z);

/** a·x. */
export function scale(x: Tensor, a: Uniform): Tensor {
  const half = mapUniform(a, (value) => value / 2);
  return axpy(half, x, half, x); // not 0·x: that would make NaN of an infinity
}

/** y ← y + x, in place. Throws ShapeError if the shapes differ. */
export function addInto(x: Tensor, y: Tensor): void {
  expectShape("addInto", "x must have the shape of y", x, y.shape);
  const { n, parts } = lanes(x.gpu, x.size);
  addIntoKernel(x.gpu, { n }, { x, y }, [n], {}, parts);
}
