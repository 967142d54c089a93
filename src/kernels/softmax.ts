import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./softmax.wgsl";
import backwardSource from "./softmax-backward.wgsl";

const forward = defineKernel("softmax", source);
const backward = defineKernel("softmax-backward", backwardSource);

/** y = exp(x) / Σ exp(x) over the last axis, safe for large x. Throws ShapeError if x has no axis. */
export function softmax(x: Tensor): Tensor {
  const N = x.shape.at(-1);
  if (N === undefined) throw new ShapeError("softmax: x must have at least one axis, got []");
  const y = empty(x.gpu, x.shape, "softmax");
  const M = N && x.size / N;
  forward(x.gpu, { M, N }, { x, y }, [M]);
  return y;
}

/** dx = y∘(dy − Σ dy∘y) over the last axis, y the result of `softmax`. Throws ShapeError unless dy has y's shape. */
export function softmaxBackward(dy: Tensor, y: Tensor): Tensor {
  expectShape("softmaxBackward", "dy must have the shape of y", dy, y.shape);
  const N = y.shape.at(-1) ?? 0;
  const dx = empty(y.gpu, y.shape, "softmaxBackward");
  const M = N && y.size / N;
  backward(y.gpu, { M, N }, { y, dy, dx }, [M]);
  return dx;
}
