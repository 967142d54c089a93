import { defineKernel } from "../gpu/kernel.ts";
import { dims2, empty, expectDType, type Tensor } from "../tensor/tensor.ts";
import source from "./gather-rows.wgsl";
import { lanes } from "./lanes.ts";

const kernel = defineKernel("gather-rows", source);

/** Rows of x [M,H] by ids [N] (i32): [N,H]; a negative id gives zeros, one past M the last row. */
export function gatherRows(x: Tensor, ids: Tensor): Tensor {
  const [M, H] = dims2("gatherRows", "x", x);
  expectDType("gatherRows", "ids", ids, "i32");
  const y = empty(x.gpu, [ids.size, H], "gatherRows");
  const { n, parts } = lanes(x.gpu, H);
  kernel(x.gpu, { n: ids.size * n, lanes: n, M }, { x, ids, y }, [ids.size * n], {}, parts);
  return y;
}
