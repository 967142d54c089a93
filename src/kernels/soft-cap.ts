import { defineKernel } from "../gpu/kernel.ts";
import type { Tensor } from "../tensor/tensor.ts";
import source from "./soft-cap.wgsl";

const kernel = defineKernel("soft-cap", source);

/** x ← c·tanh(x/c), in place; c > 0. */
export function softCap(x: Tensor, c: number): void {
  kernel(x.gpu, { n: x.size, c }, { x }, [x.size]);
}
