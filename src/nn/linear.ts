import { matmul } from "../autograd/basic-ops.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** A linear layer's parameters: y = x·Wᵀ + b, W [N,K], b [N]. A packed W is frozen. */
export interface Linear {
  weight: Tensor | PackedMatrix;
  bias?: Tensor | undefined;
  /** What stands in for x·Wᵀ while it is set: how LoRA hooks in. */
  adapter?: LinearAdapter | undefined;
}

export interface LinearAdapter {
  /** x·Wᵀ + b and whatever the adapter adds. */
  apply(x: Tensor, weight: Tensor | PackedMatrix, bias?: Tensor): Tensor;
  /** The layers that it can compute together, on one x. */
  readonly group?: LinearGroup | undefined;
}

export interface LinearGroup {
  readonly layers: readonly Linear[];
  /** What `linear` gives for each of the layers. */
  apply(x: Tensor): Tensor[];
}

/** y = x·Wᵀ + b, through the layer's adapter if it has one. x [...,K] → y [...,N]. */
export function linear({ weight, bias, adapter }: Linear, x: Tensor): Tensor {
  return adapter ? adapter.apply(x, weight, bias) : matmul(x, weight, "nt", bias);
}

/** `linear` of each of the layers on the same x, which those with adapters of one group read together. */
export function linears<const L extends readonly Linear[]>(layers: L, x: Tensor): { [i in keyof L]: Tensor } {
  const done = new Map<Linear, Tensor>();
  const apply = (layer: Linear): Tensor => {
    const group = layer.adapter?.group;
    if (!done.has(layer) && group?.layers.every((member) => layers.includes(member)))
      group.apply(x).forEach((y, i) => void done.set(group.layers[i] as Linear, y));
    return done.get(layer) ?? linear(layer, x);
  };
  return layers.map(apply) as { [i in keyof L]: Tensor };
}
