import { defineKernel } from "../gpu/kernel.ts";
import type { Piece } from "../tensor/pieces.ts";
import { empty, expectDType, expectShape, rowsOf, type Tensor } from "../tensor/tensor.ts";
import source from "./embedding.wgsl";
import backwardSource from "./embedding-backward.wgsl";
import { mostOperations } from "./matmul-plans.ts";

const forward = defineKernel("embedding", source);
const backward = defineKernel("embedding-backward", backwardSource);

const COLUMNS = 8;
/** Operations of a product that take about as long as a look at an id. */
const LOOK = 16;
/** As many rows are a multiple of 256 bytes, where a view may begin. */
const ALIGNED_ROWS = 64;

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
  const blocks = Math.ceil(H / COLUMNS);
  const operations = LOOK * ids.size * blocks * ALIGNED_ROWS; // each thread looks at all ids
  const rows = ALIGNED_ROWS * Math.max(1, Math.floor(mostOperations(dy.gpu) / operations));
  for (let from = 0; from < V; from += rows) {
    const count = Math.min(rows, V - from);
    const n = count * blocks;
    const part = { ids, dy, dw: rowsOf(dw, from, count) };
    backward(dy.gpu, { N: ids.size, H, n, first: first + from }, part, [n], { COLUMNS });
  }
  return dw;
}
