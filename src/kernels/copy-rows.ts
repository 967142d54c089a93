import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import kernelSource from "./copy-rows.wgsl";

const kernel = defineKernel("copy-rows", kernelSource);

/**
 * target[b, position + t] = source[b, t], in place; the other rows of target keep their content.
 *
 * Shapes: source [B,T,W…], target [B,S,W…]. Throws ShapeError if they do not fit or the rows would pass S.
 */
export function copyRows(source: Tensor, target: Tensor, position: number): void {
  const [, T = 0] = source.shape;
  const [B = 0, S = 0, ...row] = target.shape;
  expectShape("copyRows", "source must be [B,T,W…]", source, [B, T, ...row]);
  expectDType("copyRows", "source", source, target.dtype);
  if (!Number.isInteger(position) || position < 0 || position + T > S)
    throw new ShapeError(`copyRows: rows must stay within the ${S} of target, got ${T} at position ${position}`);
  const W = row.reduce((a, b) => a * b, 1);
  kernel(
    source.gpu,
    { n: source.size, block: T * W, dst_block: S * W, offset: position * W },
    { src: source, dst: target },
    [source.size],
  );
}
