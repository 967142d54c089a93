import { defineKernel } from "../gpu/kernel.ts";
import type { Piece } from "../tensor/pieces.ts";
import { empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./embedding.wgsl";
import backwardSource from "./embedding-backward.wgsl";

const forward = defineKernel("embedding", source);
const backward = defineKernel("embedding-backward", backwardSource);

const COLUMNS = 8;

/** Rows of the table in these pieces, [Vᵢ,H] each, by ids: [...ids.shape, H]. An id past all reads the last row: check ids where they come from. */
export function embedding(pieces: readonly Piece<Tensor>[], ids: Tensor): Tensor {
  const { gpu } = ids;
  const H = pieces[0]?.W.shape[1] ?? 0;
  for (const { W, rows } of pieces) expectShape("embedding", "weight must be [V,H]", W, [rows, H]);
  expectDType("embedding", "ids", ids, "i32");
  const y = empty(gpu, [...ids.shape, H], "embedding");
  for (const [i, { W: w, first, rows: V }] of pieces.entries()) {
    const last = i === pieces.length - 1 ? 0xffffffff : first + V - 1;
    forward(gpu, { n: y.size, H, V, first, last }, { w, ids, y }, [y.size]);
  }
  return y;
}

/** dw of a piece of `embedding`: every row of dy added to the row of its id, in the order of the ids. */
export function embeddingBackward(dy: Tensor, ids: Tensor, { first, rows: V }: Piece<Tensor>): Tensor {
  const H = dy.shape.at(-1) ?? 0;
  const dw = empty(dy.gpu, [V, H], "embeddingBackward");
  const n = V * Math.ceil(H / COLUMNS);
  backward(dy.gpu, { N: ids.size, H, n, first }, { ids, dy, dw }, [n], { COLUMNS });
  return dw;
}
