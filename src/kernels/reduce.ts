import type { Gpu } from "../gpu/gpu.ts";
import { defineKernel, definePart } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, type Shape, type Tensor, tensor, view } from "../tensor/tensor.ts";
import fourSource from "./parts/reduce-four.wgsl";
import source from "./reduce.wgsl";
import rowsSource from "./reduce-rows.wgsl";

const kernel = defineKernel("reduce", source);
const rows = defineKernel("reduce-rows", rowsSource);
const FOUR = [definePart("reduce-four", fourSource)];

const LONG = 512; // a longer axis goes in two passes, of about √axis steps each

export type Reduction = "sum" | "mean" | "max";

const product = (shape: Shape): number => shape.reduce((a, b) => a * b, 1);

/**
 * The sum, mean or maximum over one axis (negative: from the last), or over all elements if none is given.
 *
 * `keepDims` leaves the reduced axes in place with size 1. The order of summation depends on the shape alone, so results
 * repeat bit for bit. Throws ShapeError if the axis does not exist or is empty.
 */
export function reduce(op: Reduction, x: Tensor, axis?: number, keepDims = false): Tensor {
  const { shape } = x;
  const at = axis !== undefined && axis < 0 ? axis + shape.length : axis;
  if (at !== undefined && shape[at] === undefined)
    throw new ShapeError(`${op}: axis must be one of the ${shape.length} of [${shape}], got ${axis}`);
  if ((at === undefined ? x.size : shape[at]) === 0)
    throw new ShapeError(`${op}: there must be something to reduce, got [${shape}]`);
  const left = shape.flatMap((n, i) => (at !== undefined && i !== at ? [n] : keepDims ? [1] : []));
  const [outer, length, inner] =
    at === undefined ? [1, x.size, 1] : [product(shape.slice(0, at)), shape[at] ?? 1, product(shape.slice(at + 1))];
  return view(middle(op, x, outer, length, inner), left, op);
}

/**
 * Sums x to the shape of an operand that was broadcast to x's: the gradient of broadcasting.
 *
 * Returns x itself where the shapes are equal. `shape` must broadcast to x's.
 */
export function sumTo(x: Tensor, shape: Shape): Tensor {
  const added = x.shape.length - shape.length;
  const repeated = (axis: number): boolean => x.shape[axis] !== 1 && (axis < added || shape[axis - added] === 1);
  let y = x;
  for (let end = x.shape.length; end > 0; end--) {
    let start = end;
    while (start > 0 && repeated(start - 1)) start--;
    if (start === end) continue;
    const [outer, length] = [product(x.shape.slice(0, start)), product(x.shape.slice(start, end))];
    const sum = middle("sum", y, outer, length, product(shape.slice(Math.max(0, end - added))));
    if (y !== x) x.gpu.release(y);
    y = sum;
    end = start + 1;
  }
  return y === x && added === 0 ? x : view(y, shape, "sumTo");
}

/** Reduces the middle axis of x, seen as [outer, length, inner], to [outer, inner]. */
function middle(op: Reduction, x: Tensor, outer: number, length: number, inner: number): Tensor {
  const { gpu } = x;
  if (length === 0) return tensor(gpu, new Float32Array(outer * inner), [outer, inner]);
  const pass = (of: Tensor, steps: number, parts: number): Tensor => {
    const y = empty(gpu, [outer, parts, inner], op);
    const s = op === "mean" && parts === 1 ? 1 / length : 1;
    const variant = { MAX: op === "max" ? 1 : 0 };
    if (inner > 1) kernel(gpu, { n: y.size, axis: steps, inner, C: parts, s }, { x: of, y }, [y.size], variant);
    else {
      const inFours = steps % 4 === 0 && parts <= steps / 4;
      const axis = inFours ? steps / 4 : steps;
      const WG = gpu.isSoftware ? 4 : axis < 128 ? 32 : 256;
      const uniforms = { n: y.size, axis, C: parts, s };
      rows(gpu, uniforms, { x: of, y }, [y.size * WG], { ...variant, WG }, inFours ? FOUR : []);
    }
    return y;
  };
  const C = inner > 1 ? (length <= LONG ? 1 : Math.ceil(Math.sqrt(length))) : stretches(gpu, outer, length);
  if (C === 1) return pass(x, length, 1);
  const partials = pass(x, length, C);
  const y = pass(partials, C, 1);
  gpu.release(partials);
  return y;
}

/** Into how many stretches a row is cut: one where the rows alone keep the device busy, else some thousand elements each. */
function stretches(gpu: Gpu, outer: number, length: number): number {
  const [busy, most] = gpu.isSoftware ? [8, 512] : [256, 4096];
  return outer >= busy ? 1 : Math.ceil(length / most);
}
