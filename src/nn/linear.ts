import { matmul } from "../autograd/basic-ops.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** A linear layer's parameters: y = x·Wᵀ + b, W [N,K], b [N]. */
export interface Linear {
  weight: Tensor;
  readonly bias?: Tensor;
  /** What stands in for x·Wᵀ while it is set: how LoRA hooks in. */
  adapter?: LinearAdapter | undefined;
}

export interface LinearAdapter {
  /** x·Wᵀ + b and whatever the adapter adds. */
  apply(x: Tensor, weight: Tensor, bias?: Tensor): Tensor;
}

/** y = x·Wᵀ + b, through the layer's adapter if it has one. x [...,K] → y [...,N]. */
export function linear({ weight, bias, adapter }: Linear, x: Tensor): Tensor {
  return adapter ? adapter.apply(x, weight, bias) : matmul(x, weight, "nt", bias);
}
