/** Reverse-mode automatic differentiation over the graph that `record` builds. After Karpathy's micrograd. */
import { sum2 } from "../kernels/axpy.ts";
import { ShapeError } from "../tensor/errors.ts";
import { type GraphNode, type Tensor, type Thunk, tensor, view } from "../tensor/tensor.ts";

/** d(y)/d(leaf) for every leaf that requires a gradient. */
export type Gradients = Map<Tensor, Tensor>;

let recording = true;

/** Runs f and notes only what requires a gradient, not how it was made: nothing is kept for a backward pass. */
function withoutGraph<T>(f: () => T): T {
  const before = recording;
  recording = false;
  try {
    return f();
  } finally {
    recording = before;
  }
}

/**
 * f(x), of which nothing is kept but x: the backward pass computes f again (activation checkpointing, arXiv:1604.06174).
 *
 * f must compute the same each time and reach what it trains by itself; gradients are the same to the last bit.
 */
export function recompute(x: Tensor, f: (x: Tensor) => Tensor): Tensor {
  const { gpu } = x;
  const y = gpu.scope(() => withoutGraph(() => f(x)));
  if (!recording || !y.requiresGrad) return y;
  y.node = {
    op: "recompute",
    inputs: [x],
    vjp: () => [],
    again: (dy) => {
      const standIn = view(x, x.shape);
      standIn.requiresGrad = x.requiresGrad;
      const gradients = gpu.scope(() => {
        const again = f(standIn);
        return again.requiresGrad ? backward(again, dy) : new Map<Tensor, Tensor>();
      });
      const dx = gradients.get(standIn);
      gradients.delete(standIn);
      return { dx, leaves: gradients };
    },
  };
  return y;
}

/**
 * Notes how y was made. If no input requires a gradient nothing is kept, so a frozen model builds no graph and holds no
 * activations.
 *
 * `vjp(dy)` returns one thunk per input. The engine calls only the thunks of inputs that require a gradient: an op never
 * asks which of its inputs are frozen.
 */
export function record(op: string, y: Tensor, inputs: readonly Tensor[], vjp: GraphNode["vjp"]): Tensor {
  if (inputs.some((t) => t.requiresGrad)) {
    y.requiresGrad = true;
    if (recording) y.node = { op, inputs, vjp };
  }
  return y;
}

/**
 * A thunk that can add its gradient to one that its input has already, in the kernel that makes it: `f(sum)` returns sum + gradient, which
 * saves a pass over both. `f()` returns the gradient.
 */
export function adding(f: (sum?: Tensor) => Tensor): Thunk {
  return Object.assign(f, { adds: true as const });
}

/** The 1 that `backward` begins with, each of them. */
const seeds = new WeakSet<Tensor>();

/** Whether dy is known to be 1: what waits to be multiplied by it is done. */
export const isSeed = (dy: Tensor): boolean => seeds.has(dy);

/**
 * The gradients of y, weighted by dy, with respect to every leaf that requires one. The graph is consumed.
 *
 * dy has y's shape; for a single number it is 1 unless given. Several may be views of one tensor: release all at once. Throws ShapeError
 * unless dy fits.
 */
export function backward(y: Tensor, dy?: Tensor): Gradients {
  if (!dy && y.size !== 1) throw new ShapeError(`backward: dy is needed unless y is one number, got y [${y.shape}]`);
  const seed = dy ?? tensor(y.gpu, [1], y.shape);
  if (!dy) seeds.add(seed);
  if (seed.size !== y.size)
    throw new ShapeError(`backward: dy must have the shape of y [${y.shape}], got [${seed.shape}]`);
  const pending: Gradients = new Map([[y, seed]]);
  const leaves: Gradients = new Map();
  const meet = (of: Gradients, t: Tensor, g: Tensor): void => {
    const sum = of.get(t);
    of.set(t, sum ? sum2(sum, g) : g);
  };
  for (const t of topological(y).reverse()) {
    const g = pending.get(t);
    if (!g) continue;
    pending.delete(t);
    if (!t.node) {
      meet(leaves, t, g);
      continue;
    }
    const { op, inputs, vjp, again } = t.node;
    t.node = undefined; // lets go of what forward kept
    if (again) {
      const { dx, leaves: found } = again(g);
      if (dx && inputs[0]) meet(pending, inputs[0], dx);
      for (const [leaf, gradient] of found) meet(leaves, leaf, gradient);
      continue;
    }
    const thunks = vjp(g);
    inputs.forEach((input, i) => {
      const thunk = thunks[i];
      if (!thunk)
        throw new ShapeError(`${op}: vjp must return one thunk per input, got ${thunks.length} for ${inputs.length}`);
      if (!input.requiresGrad) return;
      const sum = pending.get(input);
      if (sum && !thunk.adds) pending.set(input, sum2(sum, thunk()));
      else pending.set(input, thunk(sum));
    });
  }
  return leaves;
}

/** Inputs before outputs. Iterative: a deep model must not overflow the stack. */
function topological(root: Tensor): Tensor[] {
  const order: Tensor[] = [];
  const seen = new Set<Tensor>();
  const stack: [Tensor, boolean][] = [[root, false]];
  for (let top = stack.pop(); top; top = stack.pop()) {
    const [t, inputsDone] = top;
    if (inputsDone) order.push(t);
    else if (!seen.has(t)) {
      seen.add(t);
      stack.push([t, true]);
      for (const input of t.node?.inputs ?? []) if (input.requiresGrad) stack.push([input, false]);
    }
  }
  return order;
}

/** Runs f at most once. For a product that two thunks of one vjp share. */
export function once<T>(f: () => T): () => T {
  let value: { readonly of: T } | undefined;
  return () => {
    value ??= { of: f() };
    return value.of;
  };
}
