import { defineKernel } from "../gpu/kernel.ts";
import { dims2, empty, expectDType, type Tensor } from "../tensor/tensor.ts";
import source from "./embedding.wgsl";
import backwardSource from "./embedding-backward.wgsl";

const forward = defineKernel("embedding", source);
const backward = defineKernel("embedding-backward", backwardSource);

const COLUMNS = 8;

/** Rows of w [V,H] by ids: [...ids.shape, H]. An id past V reads the last row: check ids where they come from. */
export function embedding(w: Tensor, ids: Tensor): Tensor {
  const [V, H] = dims2("embedding", "weight", w);
  expectDType("embedding", "ids", ids, "i32");
  const y = empty(w.gpu, [...ids.shape, H], "embedding");
  forward(w.gpu, { n: y.size, H, V }, { w, ids, y }, [y.size]);
  return y;
}

/** dw [V,H] of `embedding`: every row of dy added to the row of its id, in the order of the ids. */
export function embeddingBackward(dy: Tensor, ids: Tensor, V: number): Tensor {
  const H = dy.shape.at(-1) ?? 0;
  const dw = empty(dy.gpu, [V, H], "embeddingBackward");
  const n = V * Math.ceil(H / COLUMNS);
  backward(dy.gpu, { N: ids.size, H, n }, { ids, dy, dw }, [n], { COLUMNS });
  return dw;
}
