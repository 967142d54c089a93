import { defineKernel } from "../gpu/kernel.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import source from "./unpack.wgsl";
import { weightParts } from "./weight-parts.ts";

const unpack = defineKernel("unpack", source);

/** A packed matrix as f32 [rows,columns]: the very values that products with it use. */
export function unpackMatrix(w: PackedMatrix): Tensor {
  const { gpu, words, group, scales = words } = w;
  const y = empty(gpu, w.shape, "unpack");
  const n = y.size / 4;
  unpack(gpu, { n, group_bits: Math.log2(group) }, { w: words, scales, y }, [n], {}, weightParts(w));
  return y;
}
