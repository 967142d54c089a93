import type { Gradients } from "../autograd/engine.ts";
import { adamwStep } from "../kernels/adamw.ts";
import { globalNorm } from "../kernels/global-norm.ts";
import { ShapeError } from "../tensor/errors.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";

export interface AdamWSettings {
  readonly beta1?: number;
  readonly beta2?: number;
  readonly eps?: number;
  readonly weightDecay?: number;
  /** Gradients are scaled down to this global norm; 0 leaves them as they are. */
  readonly maxGradNorm?: number;
}

/** AdamW (arXiv:1711.05101) with two moments per trainable element, and none for anything frozen. PyTorch's formula and defaults. */
export class AdamW {
  readonly parameters: readonly Tensor[];
  readonly #settings: Required<AdamWSettings>;
  readonly #moments: readonly { readonly m: Tensor; readonly v: Tensor }[];
  #step = 0;

  constructor(parameters: readonly Tensor[], settings: AdamWSettings = {}) {
    if (parameters.length === 0) throw new ShapeError("AdamW: at least one parameter is needed, got none");
    this.parameters = parameters;
    this.#settings = { beta1: 0.9, beta2: 0.999, eps: 1e-8, weightDecay: 0, maxGradNorm: 0, ...settings };
    const zeros = (p: Tensor): Tensor => tensor(p.gpu, new Float32Array(p.size), p.shape);
    this.#moments = parameters.map((p) => ({ m: zeros(p), v: zeros(p) }));
  }

  /** Bytes of optimizer state. */
  get sizeBytes(): number {
    return this.#moments.reduce((sum, { m, v }) => sum + m.sizeBytes + v.sizeBytes, 0);
  }

  /**
   * One update in place; a gradient norm that is not finite leaves the parameters as they are. Returns [norm, clip factor], f32
   * [2], the norm before clipping. Throws ShapeError when a parameter got no gradient: it would stay untrained in silence.
   */
  step(gradients: Gradients, learningRate: number): Tensor {
    const grads = this.parameters.map((p) => {
      const g = gradients.get(p);
      if (!g)
        throw new ShapeError(
          `AdamW: every parameter needs a gradient, got none for one of shape [${p.shape}]. Is it part of the model?`,
        );
      return g;
    });
    const { maxGradNorm, ...settings } = this.#settings;
    const norm = globalNorm(grads, maxGradNorm);
    this.#step++;
    this.parameters.forEach((p, i) => {
      const { m, v } = this.#moments[i] ?? {};
      const g = grads[i];
      if (m && v && g) adamwStep(p, g, m, v, { ...settings, learningRate, step: this.#step, clip: norm });
    });
    return norm;
  }

  /** Frees the moments. */
  destroy(): void {
    for (const { m, v } of this.#moments) m.gpu.release(m, v);
  }
}
