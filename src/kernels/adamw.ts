import { defineKernel, type Uniform, uniformValue } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./adamw.wgsl";

const kernel = defineKernel("adamw", source);

export interface AdamwOptions {
  readonly learningRate: Uniform;
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  readonly weightDecay: number;
  /** Number of this step; the first is 1. */
  readonly step: Uniform;
  /** [norm, factor] of `globalNorm`; g is multiplied by the factor. */
  readonly clip: Tensor;
}

/**
 * One step of AdamW as torch.optim.AdamW does it: decoupled decay, then m, v and p, all in place.
 *
 * p, g, m, v have one shape. The factor of `clip` is read on the device, so nothing comes back to the host. Throws ShapeError
 * if shapes differ or the step is not a whole number from 1.
 */
export function adamwStep(p: Tensor, g: Tensor, m: Tensor, v: Tensor, options: AdamwOptions): void {
  const { learningRate, beta1, beta2, eps, weightDecay, step, clip } = options;
  for (const [name, t] of Object.entries({ g, m, v }))
    expectShape("adamwStep", `${name} must have the shape of p`, t, p.shape);
  expectShape("adamwStep", "clip must be [norm, factor]", clip, [2]);
  const t = (): number => {
    const n = uniformValue(step);
    if (!Number.isInteger(n) || n < 1) throw new ShapeError(`adamwStep: step must be a whole number from 1, got ${n}`);
    return n;
  };
  if (typeof step === "number") t();
  const uniforms = {
    n: p.size,
    decay: () => 1 - uniformValue(learningRate) * weightDecay,
    rest1: 1 - beta1,
    beta2,
    rest2: 1 - beta2,
    step_size: () => uniformValue(learningRate) / (1 - beta1 ** t()),
    correction: () => Math.sqrt(1 - beta2 ** t()),
    eps,
  };
  kernel(p.gpu, uniforms, { g, clip, p, m, v }, [p.size]);
}
