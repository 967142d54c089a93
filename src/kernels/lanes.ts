import { definePart, type Part } from "../gpu/kernel.ts";
import fourSource from "./parts/four-lanes.wgsl";

const FOUR = [definePart("four-lanes", fourSource)];

/** How an elementwise kernel goes through `size` elements: in fours where they come out even, for half the cost on a CPU adapter too. */
export function lanes(size: number): { readonly n: number; readonly parts: readonly Part[] } {
  return size % 4 === 0 ? { n: size / 4, parts: FOUR } : { n: size, parts: [] };
}
