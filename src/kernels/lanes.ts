import type { Gpu } from "../gpu/gpu.ts";
import { definePart, type Part } from "../gpu/kernel.ts";
import fourSource from "./parts/four-lanes.wgsl";
import sixteenSource from "./parts/sixteen-lanes.wgsl";

const FOUR = [definePart("four-lanes", fourSource)];
const SIXTEEN = [definePart("sixteen-lanes", sixteenSource)];

/** How an elementwise kernel goes through `size` elements: in fours, or sixteens on a CPU adapter, where they come out even. */
export function lanes(gpu: Gpu, size: number): { readonly n: number; readonly parts: readonly Part[] } {
  if (gpu.isSoftware && size % 16 === 0) return { n: size / 16, parts: SIXTEEN };
  return size % 4 === 0 ? { n: size / 4, parts: FOUR } : { n: size, parts: [] };
}
