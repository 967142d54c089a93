import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
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

/**
 * target = source, which is of the same size. In a traced step nothing is copied where `source` was made by it: it is computed in place.
 *
 * Throws ShapeError if the sizes differ.
 */
export function copyTo(source: Tensor, target: Tensor): void {
  const n = target.size;
  if (source.size !== n)
    throw new ShapeError(`copyTo: sizes must be equal, got [${source.shape}] and [${target.shape}]`);
  expectDType("copyTo", "source", source, target.dtype);
  const placing = source.gpu.place(source, target);
  if (placing === "placed") return;
  const copy = (src: Tensor, dst: Tensor): void =>
    kernel(source.gpu, { n, block: n, dst_block: n, offset: 0 }, { src, dst }, [n]);
  const detour = placing === "detour" ? empty(source.gpu, target.shape, "copyTo", target.dtype) : undefined;
  if (detour) copy(source, detour);
  copy(detour ?? source, target);
}
