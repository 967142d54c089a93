import { defineKernel, definePart } from "../gpu/kernel.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./gated.wgsl";
import backwardSource from "./gated-backward.wgsl";
import fourSource from "./parts/gated-four.wgsl";
import slopeFourSource from "./parts/slope-four.wgsl";
import unarySource from "./unary.wgsl";

const forward = defineKernel("gated", source);
const backward = defineKernel("gated-backward", backwardSource);
const VALUE = definePart("activation", unarySource, ["OP", "ROOT", "CUBIC", "sigmoid", "normal", "activate"]);
const SLOPE = definePart("derivative", unarySource, ["density", "derivative"]);
const FOUR = definePart("gated-four", fourSource);
const SLOPE_FOUR = definePart("slope-four", slopeFourSource);

const OPS = { silu: 0, gelu: 1, geluTanh: 2 } as const;

/** What the gate goes through: x·σ(x), x·Φ(x), or the latter's approximation by tanh. */
export type GateActivation = keyof typeof OPS;

/** f(gate)∘up. Throws ShapeError unless the shapes are equal. */
export function gated(gate: Tensor, up: Tensor, activation: GateActivation): Tensor {
  expectShape("gated", "up must have the shape of gate", up, gate.shape);
  const y = empty(gate.gpu, gate.shape, "gated");
  const inFours = y.size % 4 === 0;
  const n = inFours ? y.size / 4 : y.size;
  forward(y.gpu, { n }, { gate, up, y }, [n], { OP: OPS[activation] }, [VALUE, ...(inFours ? [FOUR] : [])]);
  return y;
}

/** Both gradients of `gated`, one dispatch. */
export function gatedBackward(
  dy: Tensor,
  gate: Tensor,
  up: Tensor,
  activation: GateActivation,
): { dgate: Tensor; dup: Tensor } {
  const dgate = empty(gate.gpu, gate.shape, "gatedBackward");
  const dup = empty(gate.gpu, gate.shape, "gatedBackward");
  const inFours = gate.size % 4 === 0;
  const n = inFours ? gate.size / 4 : gate.size;
  const parts = [VALUE, SLOPE, ...(inFours ? [FOUR, SLOPE_FOUR] : [])];
  backward(gate.gpu, { n }, { gate, up, dy, dgate, dup }, [n], { OP: OPS[activation] }, parts);
  return { dgate, dup };
}
