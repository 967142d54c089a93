import { matmul } from "../autograd/basic-ops.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { inUse, type Module } from "./module.ts";

/** A linear layer's parameters: y = x·Wᵀ + b, W [N,K], b [N]. A packed W is frozen. */
export interface Linear extends Module<Tensor | PackedMatrix> {
  /** What stands in for x·Wᵀ while they are there, in the order in which they came: how LoRA hooks in. */
  adapters?: readonly LinearAdapter[] | undefined;
}

export interface LinearAdapter {
  /** x·Wᵀ + b and whatever the adapter adds. */
  apply(x: Tensor, weight: Tensor | PackedMatrix, bias?: Tensor): Tensor;
  /** y and whatever the adapter adds, as the second one of a layer. */
  add(y: Tensor, x: Tensor): Tensor;
  /** The layers that it can compute together, on one x. */
  readonly group?: LinearGroup | undefined;
}

export interface LinearGroup {
  readonly layers: readonly Linear[];
  /** What `linear` gives for each of the layers. */
  apply(x: Tensor): Tensor[];
}

/** y = x·Wᵀ + b, through the layer's adapters if it has any. x [...,K] → y [...,N]. */
export function linear(layer: Linear, x: Tensor): Tensor {
  const { weight, bias } = inUse(layer);
  const [first, ...others] = layer.adapters ?? [];
  const y = first ? first.apply(x, weight, bias) : matmul(x, weight, "nt", bias);
  return others.reduce((sum, one) => one.add(sum, x), y);
}

/** The group of a layer's adapter, if it is the only one of each of the group's layers. */
function groupOf({ adapters: [first] = [] }: Linear, layers: readonly Linear[]): LinearGroup | undefined {
  const isAlone = (layer: Linear): boolean => layers.includes(layer) && layer.adapters?.length === 1;
  return first?.group?.layers.every(isAlone) ? first.group : undefined;
}

/** `linear` of each of the layers on the same x, which those with adapters of one group read together. */
export function linears<const L extends readonly Linear[]>(layers: L, x: Tensor): { [i in keyof L]: Tensor } {
  const done = new Map<Linear, Tensor>();
  const apply = (layer: Linear): Tensor => {
    const group = done.has(layer) ? undefined : groupOf(layer, layers);
    group?.apply(x).forEach((y, i) => void done.set(group.layers[i] as Linear, y));
    return done.get(layer) ?? linear(layer, x);
  };
  return layers.map(apply) as { [i in keyof L]: Tensor };
}
