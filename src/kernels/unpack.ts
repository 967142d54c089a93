import { defineKernel } from "../gpu/kernel.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import source from "./unpack.wgsl";
import scalesSource from "./unpack-scales.wgsl";
import { DOUBLE_QUANT, weightParts } from "./weight-parts.ts";

const unpack = defineKernel("unpack", source);
const unpackScales = defineKernel("unpack-scales", scalesSource);

/** A packed matrix as f32 [rows,columns]: the very values that products with it use. */
export function unpackMatrix(w: PackedMatrix): Tensor {
  const { gpu, words, group, scales = words } = w;
  const y = empty(gpu, w.shape, "unpack");
  const n = y.size / 4;
  unpack(gpu, { n, group_bits: Math.log2(group) }, { w: words, scales, y }, [n], {}, weightParts(w));
  return y;
}

/** The same matrix with scales in f32 where they are quantised too: a tensor of its own, of half a bit for each weight. */
export function withPlainScales(w: PackedMatrix): PackedMatrix {
  const { gpu, shape, scales, group, doubleQuant } = w;
  if (!doubleQuant || !scales) return w;
  const n = Math.ceil((shape[0] * shape[1]) / group);
  const y = empty(gpu, [n], "unpack");
  unpackScales(gpu, { n }, { scales, y }, [n], {}, [DOUBLE_QUANT]);
  return { ...w, scales: y, doubleQuant: false };
}
