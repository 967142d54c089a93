import { gelu, silu } from "../autograd/basic-ops.ts";
import type { Tensor } from "../tensor/tensor.ts";

export type Activation = "silu" | "gelu" | "geluTanh";

/** The activation by itself, where no other layer gates it. */
export function activate(x: Tensor, activation: Activation): Tensor {
  return activation === "silu" ? silu(x) : gelu(x, activation === "gelu" ? "none" : "tanh");
}
