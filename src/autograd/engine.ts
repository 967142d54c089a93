/** Reverse-mode automatic differentiation over the graph that `record` builds. After Karpathy's micrograd. */
import { sum2 } from "../kernels/axpy.ts";
import { ShapeError } from "../tensor/errors.ts";
import { type GraphNode, type Tensor, type Thunk, tensor } from "../tensor/tensor.ts";

/** d(y)/d(leaf) for every leaf that requires a gradient. */
export type Gradients = Map<Tensor, Tensor>;

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
    y.node = { op, inputs, vjp };
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

/**
 * The gradients of y, weighted by dy, with respect to every leaf that requires one. The graph is consumed.
 *
 * dy has y's shape; for a single number it is 1 unless given. Throws ShapeError otherwise.
 */
export function backward(y: Tensor, dy?: Tensor): Gradients {
  if (!dy && y.size !== 1) throw new ShapeError(`backward: dy is needed unless y is one number, got y [${y.shape}]`);
  const seed = dy ?? tensor(y.gpu, [1], y.shape);
  if (seed.size !== y.size)
    throw new ShapeError(`backward: dy must have the shape of y [${y.shape}], got [${seed.shape}]`);
  const pending: Gradients = new Map([[y, seed]]);
  const leaves: Gradients = new Map();
  for (const t of topological(y).reverse()) {
    const g = pending.get(t);
    if (!g) continue;
    pending.delete(t);
    if (!t.node) {
      leaves.set(t, g);
      continue;
    }
    const { op, inputs, vjp } = t.node;
    t.node = undefined; // lets go of what forward kept
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
