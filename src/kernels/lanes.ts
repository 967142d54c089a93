import type { Gpu } from "../gpu/gpu.ts";
import { definePart, type Part } from "../gpu/kernel.ts";
import fourSource from "./parts/four-lanes.wgsl";

const FOUR = [definePart("four-lanes", fourSource)];

/** How an elementwise kernel goes through `size` elements: in fours on a GPU where they come out even, else singly. */
export function lanes(gpu: Gpu, size: number): { readonly n: number; readonly parts: readonly Part[] } {
  return gpu.isSoftware || size % 4 !== 0 ? { n: size, parts: [] } : { n: size / 4, parts: FOUR };
}
