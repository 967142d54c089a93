import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { dims2, empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
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
  const uniforms = { block: T * W, src_row: T * W, src_first: 0, dst_row: S * W, dst_first: position * W };
  kernel(source.gpu, { n: source.size, ...uniforms }, { src: source, dst: target }, [source.size]);
}

/** y [...,width] = x [...,first … first + width]: columns of a matrix. Throws ShapeError where x has not so many. */
export function takeColumns(x: Tensor, first: number, width: number): Tensor {
  const [M, N] = dims2("takeColumns", "x", x);
  if (first < 0 || width < 1 || first + width > N)
    throw new ShapeError(`takeColumns: columns must stay within the ${N} of x, got ${width} from ${first} on`);
  const y = empty(x.gpu, [...x.shape.slice(0, -1), width], "takeColumns", x.dtype);
  const uniforms = { n: y.size, block: width, src_row: N, src_first: first, dst_row: width, dst_first: 0 };
  kernel(x.gpu, uniforms, { src: x, dst: y }, [M * width]);
  return y;
}

/** target [...,first … first + width] = source [...,width], in place; the other columns keep their content. */
export function putColumns(source: Tensor, target: Tensor, first: number): void {
  const [M, N] = dims2("putColumns", "target", target);
  const width = source.shape.at(-1) ?? 0;
  expectShape("putColumns", "source must have the rows of target", source, [...target.shape.slice(0, -1), width]);
  if (first < 0 || first + width > N)
    throw new ShapeError(`putColumns: columns must stay within the ${N} of target, got ${width} from ${first} on`);
  const uniforms = { n: source.size, block: width, src_row: width, src_first: 0, dst_row: N, dst_first: first };
  kernel(target.gpu, uniforms, { src: source, dst: target }, [M * width]);
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
    kernel(source.gpu, { n, block: n, src_row: n, src_first: 0, dst_row: n, dst_first: 0 }, { src, dst }, [n]);
  const detour = placing === "detour" ? empty(source.gpu, target.shape, "copyTo", target.dtype) : undefined;
  if (detour) copy(source, detour);
  copy(detour ?? source, target);
}
