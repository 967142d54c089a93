import { defineKernel } from "../gpu/kernel.ts";
import { dims2, empty, type Tensor } from "../tensor/tensor.ts";
import source from "./transpose.wgsl";

const kernel = defineKernel("transpose", source);

/** xᵀ: x [M,N] → [N,M]. */
export function transpose(x: Tensor): Tensor {
  const [M, N] = dims2("transpose", "x", x);
  const y = empty(x.gpu, [N, M], "transpose");
  kernel(x.gpu, { n: x.size, M, N }, { x, y }, [x.size]);
  return y;
}
