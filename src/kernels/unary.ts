import { defineKernel } from "../gpu/kernel.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./unary.wgsl";

const kernel = defineKernel("unary", source);

const OPS = { silu: 0, gelu: 1, geluTanh: 2, tanh: 3 } as const;

/** How to compute gelu, in PyTorch's words: "none" is x·Φ(x), "tanh" the approximation that GPT-2 and Gemma use. */
export type GeluKind = "none" | "tanh";

/** y = x·σ(x). */
export function silu(x: Tensor): Tensor {
  return apply("silu", OPS.silu, x);
}

/** dx = dy·σ(x)·(1 + x·(1 − σ(x))). Throws ShapeError unless dy has x's shape. */
export function siluBackward(dy: Tensor, x: Tensor): Tensor {
  return apply("siluBackward", OPS.silu, x, dy);
}

/** y = x·Φ(x), or its approximation by tanh. */
export function gelu(x: Tensor, approximate: GeluKind = "none"): Tensor {
  return apply("gelu", approximate === "tanh" ? OPS.geluTanh : OPS.gelu, x);
}

/** dx = dy·gelu′(x). Throws ShapeError unless dy has x's shape. */
export function geluBackward(dy: Tensor, x: Tensor, approximate: GeluKind = "none"): Tensor {
  return apply("geluBackward", approximate === "tanh" ? OPS.geluTanh : OPS.gelu, x, dy);
}

/** y = tanh x. */
export function tanh(x: Tensor): Tensor {
  return apply("tanh", OPS.tanh, x);
}

/** dx = dy·(1 − tanh² x). Throws ShapeError unless dy has x's shape. */
export function tanhBackward(dy: Tensor, x: Tensor): Tensor {
  return apply("tanhBackward", OPS.tanh, x, dy);
}

function apply(op: string, OP: number, x: Tensor, dy?: Tensor): Tensor {
  if (dy) expectShape(op, "dy must have the shape of x", dy, x.shape);
  const y = empty(x.gpu, x.shape, op);
  kernel(x.gpu, { n: x.size }, { x, dy: dy ?? x, y }, [x.size], { OP, BACKWARD: dy ? 1 : 0 });
  return y;
}
