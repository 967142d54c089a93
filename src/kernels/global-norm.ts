import { defineKernel, type Uniform } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import clipSource from "./clip-factor.wgsl";
import { reduce } from "./reduce.ts";
import squareSource from "./square-sums.wgsl";

const squareSums = defineKernel("square-sums", squareSource);
const clipFactor = defineKernel("clip-factor", clipSource);

/**
 * [norm, factor] of all gradients together, for clipping as torch.nn.utils.clip_grad_norm_ does:
 * norm = √Σ (s·g)², factor = s·min(1, maxNorm / (norm + 1e-6)), or s if maxNorm is 0. s is what the gradients still lack, 1 unless given.
 *
 * Stays on the device. Summed in an order that only the shapes decide. A norm that is not finite is passed on as it is, with
 * factor 0 for an infinite one and NaN for NaN (s if maxNorm is 0). Throws ShapeError without gradients or if maxNorm < 0.
 */
export function globalNorm(grads: readonly Tensor[], maxNorm: number, s: Uniform = 1): Tensor {
  const [one] = grads;
  if (!one) throw new ShapeError("globalNorm: there must be at least one gradient, got none");
  if (!(maxNorm >= 0)) throw new ShapeError(`globalNorm: maxNorm must be 0 (no clipping) or more, got ${maxNorm}`);
  const { gpu } = one;
  return gpu.scope(() => {
    const counts = grads.map((g) => Math.ceil(Math.sqrt(g.size)));
    const partials = empty(gpu, [counts.reduce((a, b) => a + b, 0)], "globalNorm");
    let first = 0;
    grads.forEach((g, i) => {
      const C = counts[i] ?? 0;
      squareSums(gpu, { n: g.size, C, first }, { g, partials }, [C]);
      first += C;
    });
    const clip = empty(gpu, [2], "globalNorm");
    clipFactor(gpu, { max_norm: maxNorm, s }, { total: reduce("sum", partials), clip }, [1]);
    return clip;
  });
}
