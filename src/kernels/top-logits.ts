import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { dims2, empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./top-logits.wgsl";

const kernel = defineKernel("top-logits", source);

/** How many tokens of a row `topLogits` lists. */
export const TOP = 64;

/** How many are listed, of how many a workgroup finds them, and its threads: powers of two, TOP and CHUNK / TOP at most WG, WG below CHUNK. */
export type TopSizes = Readonly<Record<"TOP" | "CHUNK" | "WG", number>>;

const SIZES: TopSizes = { TOP, CHUNK: 1024, WG: 256 };

/**
 * The likeliest of each row of logits [N,V] and the weight of its others, by temperatures [N] > 0: words [N, 2·TOP + 2], as i32.
 *
 * Of each row: TOP ids by logit and, of equals, by id, −1 where V < TOP; their logits, as f32; and Σ exp(x − m), Σ exp((x − m) / temperature) over the
 * V − TOP others, m the greatest logit, as f32. A NaN counts as −∞. Throws ShapeError if the shapes do not fit or V is 0.
 */
export function topLogits(logits: Tensor, temperatures: Tensor, sizes: TopSizes = SIZES): Tensor {
  const { gpu } = logits;
  const [N, V] = dims2("topLogits", "logits", logits);
  if (V === 0) throw new ShapeError("topLogits: logits must have at least one column, got 0");
  expectShape("topLogits", "temperatures must be [N]", temperatures, [N]);
  for (const [name, t] of Object.entries({ logits, temperatures })) expectDType("topLogits", name, t, "f32");
  let [x, count] = [logits, V];
  for (;;) {
    const chunks = Math.ceil(count / sizes.CHUNK);
    const y = empty(gpu, [N * chunks, 2 * sizes.TOP + 2], "topLogits", "i32");
    const tuned = { ...sizes, FIRST: x === logits ? 1 : 0 };
    kernel(gpu, { n: N * chunks, count, chunks }, { x, temperatures, y }, [N * chunks * sizes.WG], tuned);
    if (x !== logits) gpu.release(x);
    if (chunks === 1) return y;
    [x, count] = [y, chunks * sizes.TOP];
  }
}
