import { definePart, type Part } from "../gpu/kernel.ts";
import type { PackedFormat, PackedMatrix } from "../tensor/packed.ts";
import doubleQuantSource from "./parts/double-quant.wgsl";
import bf16Source from "./parts/weight-bf16.wgsl";
import f16Source from "./parts/weight-f16.wgsl";
import int8Source from "./parts/weight-int8.wgsl";
import nf4Source from "./parts/weight-nf4.wgsl";

const WEIGHTS: Readonly<Record<PackedFormat, Part>> = {
  f16: definePart("f16", f16Source),
  bf16: definePart("bf16", bf16Source),
  int8: definePart("int8", int8Source),
  nf4: definePart("nf4", nf4Source),
};
/** Brings `scale_of` for scales that are quantised too. */
export const DOUBLE_QUANT: Part = definePart("double-quant", doubleQuantSource);

/** What a kernel takes to read this matrix: `Stored`, the type of the words in its buffer w, and `widen`, four elements as f32. */
export function weightParts({ format, doubleQuant }: PackedMatrix): readonly Part[] {
  return doubleQuant ? [WEIGHTS[format], DOUBLE_QUANT] : [WEIGHTS[format]];
}
