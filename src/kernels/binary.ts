import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, type Shape, type Tensor } from "../tensor/tensor.ts";
import source from "./binary.wgsl";
import { lanes } from "./lanes.ts";

const kernel = defineKernel("binary", source);

const OPS = { add: 0, sub: 1, mul: 2, expand: 3 } as const;

/** y = a + b, a − b or a·b with NumPy's broadcasting. Throws ShapeError if the shapes do not broadcast. */
export function binary(op: "add" | "sub" | "mul", a: Tensor, b: Tensor): Tensor {
  return elementwise(op, a, b, broadcastShapes(op, a.shape, b.shape));
}

/** x repeated along new leading axes and axes of size 1 until it has this shape. Throws ShapeError if it cannot. */
export function expand(x: Tensor, shape: Shape): Tensor {
  if (`${broadcastShapes("expand", x.shape, shape)}` !== `${shape}`)
    throw new ShapeError(`expand: [${x.shape}] cannot be repeated to the shape [${shape}]`);
  return elementwise("expand", x, x, shape);
}

/** The shape two operands have together: sizes are aligned at the last axis, and a size of 1 gives way. */
function broadcastShapes(op: string, a: Shape, b: Shape): number[] {
  const rank = Math.max(a.length, b.length);
  return Array.from({ length: rank }, (_, axis) => {
    const [m, n] = [a.at(axis - rank) ?? 1, b.at(axis - rank) ?? 1];
    if (m !== n && m !== 1 && n !== 1)
      throw new ShapeError(`${op}: sizes must be equal or 1, aligned at the last axis, got [${a}] and [${b}]`);
    return m === 1 ? n : m;
  });
}

function elementwise(op: keyof typeof OPS, a: Tensor, b: Tensor, shape: Shape): Tensor {
  const y = empty(a.gpu, shape, op);
  const axes = collapse(shape, a.shape, b.shape);
  if (axes.length > 4)
    throw new ShapeError(
      `${op}: operands may alternate over at most 4 groups of axes, got [${a.shape}] and [${b.shape}]`,
    );
  const FLAT = axes.every((axis) => axis.inA && axis.inB) ? 1 : 0;
  const { n, parts } = FLAT ? lanes(a.gpu, y.size) : { n: y.size, parts: [] };
  const uniforms: Record<string, number> = { n };
  let [strideA, strideB] = [1, 1];
  for (let k = 3; k >= 0; k--) {
    const { size, inA, inB } = axes[axes.length - 4 + k] ?? { size: 1, inA: false, inB: false };
    uniforms[`n${k}`] = size;
    uniforms[`a${k}`] = inA ? strideA : 0;
    uniforms[`b${k}`] = inB ? strideB : 0;
    if (inA) strideA *= size;
    if (inB) strideB *= size;
  }
  kernel(a.gpu, uniforms, { a, b, y }, [n], { OP: OPS[op], FLAT }, parts);
  return y;
}

interface Axis {
  size: number;
  readonly inA: boolean;
  readonly inB: boolean;
}

/** The axes of y with neighbours merged wherever both operands run, or repeat, along both. */
function collapse(shape: Shape, a: Shape, b: Shape): Axis[] {
  const axes: Axis[] = [];
  shape.forEach((size, axis) => {
    if (size === 1) return;
    const inA = (a.at(axis - shape.length) ?? 1) !== 1;
    const inB = (b.at(axis - shape.length) ?? 1) !== 1;
    const last = axes.at(-1);
    if (last?.inA === inA && last.inB === inB) last.size *= size;
    else axes.push({ size, inA, inB });
  });
  return axes;
}
