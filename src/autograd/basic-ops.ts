/** The differentiable ops that every model is made of. Each notes its gradients as thunks; the engine runs what is needed. */
import type { Uniform } from "../gpu/kernel.ts";
import * as axpy from "../kernels/axpy.ts";
import { binary, expand } from "../kernels/binary.ts";
import { putColumns, takeColumns } from "../kernels/copy-rows.ts";
import * as products from "../kernels/matmul.ts";
import { reduce, sumTo } from "../kernels/reduce.ts";
import * as rows from "../kernels/softmax.ts";
import * as unary from "../kernels/unary.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { dims2, empty, type Shape, type Tensor, type Thunk, tensor, view } from "../tensor/tensor.ts";
import { adding, record } from "./engine.ts";

/** a + b with broadcasting; da and db are dy summed over the axes each was repeated on. Throws ShapeError as `binary`. */
export function add(a: Tensor, b: Tensor): Tensor {
  return record("add", binary("add", a, b), [a, b], (dy) => [() => sumTo(dy, a.shape), () => sumTo(dy, b.shape)]);
}

/** a − b with broadcasting. */
export function sub(a: Tensor, b: Tensor): Tensor {
  return record("sub", binary("sub", a, b), [a, b], (dy) => [
    () => sumTo(dy, a.shape),
    () => axpy.scale(sumTo(dy, b.shape), -1),
  ]);
}

/** a·b, elementwise with broadcasting. Keeps a and b. */
export function mul(a: Tensor, b: Tensor): Tensor {
  return record("mul", binary("mul", a, b), [a, b], (dy) => [
    () => sumTo(binary("mul", dy, b), a.shape),
    () => sumTo(binary("mul", dy, a), b.shape),
  ]);
}

/** s·x. */
export function scale(x: Tensor, s: Uniform): Tensor {
  return record("scale", axpy.scale(x, s), [x], (dy) => [() => axpy.scale(dy, s)]);
}

/** x under another shape of the same size; shares its buffer. Throws ShapeError if the sizes differ. */
export function reshape(x: Tensor, shape: Shape): Tensor {
  return record("reshape", view(x, shape, "reshape"), [x], (dy) => [() => view(dy, x.shape)]);
}

/**
 * The columns of x [...,N] in parts of these widths, which add up to N. Their gradients are put into one tensor, which is dx.
 *
 * Throws ShapeError if the widths do not add up.
 */
export function split(x: Tensor, widths: readonly number[]): Tensor[] {
  const N = widths.reduce((a, b) => a + b, 0);
  if (N !== x.shape.at(-1)) throw new ShapeError(`split: widths must add up to ${x.shape.at(-1)}, got ${widths}`);
  const whole = view(x, x.shape);
  const missing = new Map(widths.map((width, i) => [widths.slice(0, i).reduce((a, b) => a + b, 0), width]));
  record("split", whole, [x], (dx) => {
    // A part that nothing came of has no gradient.
    for (const [first, width] of missing) {
      const shape = [...x.shape.slice(0, -1), width];
      putColumns(tensor(x.gpu, new Float32Array((x.size / N) * width), shape), dx, first);
    }
    return [() => dx];
  });
  return [...missing].map(([first, width]) =>
    record("split", takeColumns(x, first, width), [whole], (dy) => [
      adding((dx = empty(x.gpu, x.shape, "split")) => {
        putColumns(dy, dx, first);
        missing.delete(first);
        return dx;
      }),
    ]),
  );
}

/** The sum over one axis (negative: from the last), or over all elements. Throws ShapeError as `reduce`. */
export function sum(x: Tensor, axis?: number, keepDims = false): Tensor {
  return record("sum", reduce("sum", x, axis, keepDims), [x], (dy) => [() => repeat(dy, x, axis)]);
}

/** The mean over one axis (negative: from the last), or over all elements. Throws ShapeError as `reduce`. */
export function mean(x: Tensor, axis?: number, keepDims = false): Tensor {
  const y = reduce("mean", x, axis, keepDims);
  return record("mean", y, [x], (dy) => [() => repeat(axpy.scale(dy, y.size / x.size), x, axis)]);
}

/** dy of a reduction, repeated along the reduced axes of x. */
function repeat(dy: Tensor, x: Tensor, axis?: number): Tensor {
  const at = axis !== undefined && axis < 0 ? axis + x.shape.length : axis;
  const kept = x.shape.map((n, i) => (at === undefined || i === at ? 1 : n));
  return expand(view(dy, kept), x.shape);
}

/** x·σ(x). Keeps x. */
export function silu(x: Tensor): Tensor {
  return record("silu", unary.silu(x), [x], (dy) => [() => unary.siluBackward(dy, x)]);
}

/** x·Φ(x), or its approximation by tanh. Keeps x. */
export function gelu(x: Tensor, approximate: unary.GeluKind = "none"): Tensor {
  return record("gelu", unary.gelu(x, approximate), [x], (dy) => [() => unary.geluBackward(dy, x, approximate)]);
}

/** tanh x, elementwise. Keeps x. */
export function tanh(x: Tensor): Tensor {
  return record("tanh", unary.tanh(x), [x], (dy) => [() => unary.tanhBackward(dy, x)]);
}

/** exp(x) / Σ exp(x) over the last axis. Keeps the result. */
export function softmax(x: Tensor): Tensor {
  const y = rows.softmax(x);
  return record("softmax", y, [x], (dy) => [() => rows.softmaxBackward(dy, y)]);
}

/**
 * op(x)·op(w) + bias, shapes and layouts as in `kernels/matmul.ts`; bias [N]. Keeps x and w.
 *
 * A w of two axes serves every row of x, so its gradient is one product over all of them. A packed w is frozen.
 */
export function matmul(x: Tensor, w: Tensor | PackedMatrix, layout: products.Layout = "nn", bias?: Tensor): Tensor {
  const y = products.matmul(x, w, layout, bias && { bias });
  const flat = (t: Tensor): Tensor =>
    w.shape.length === 2 && t.shape.length > 2 ? view(t, dims2("matmul", "x", t)) : t;
  const inputs = [x, ...(bias ? [bias] : []), ...(isPacked(w) ? [] : [w])];
  return record("matmul", y, inputs, (dy) => {
    const [dx, dw] = {
      nn: [
        adding((residual) => products.matmul(dy, w, "nt", residual && { residual })),
        () => products.matmul(flat(x), flat(dy), "tn"),
      ],
      nt: [
        adding((residual) => products.matmul(dy, w, "nn", residual && { residual })),
        () => products.matmul(flat(dy), flat(x), "tn"),
      ],
      tn: [() => products.matmul(w as Tensor, dy, "nt"), () => products.matmul(x, dy, "nn")],
    }[layout] as [Thunk, Thunk];
    return [dx, ...(bias ? [() => sumTo(dy, bias.shape)] : []), dw];
  });
}
