/** Quantising and packing of frozen matrices, on the host: it is done once, when a model is loaded. `parts/weight-*.wgsl` undo it. */
import type { Gpu } from "../gpu/gpu.ts";
import { encodeFloats } from "../io/dtype.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { PackedFormat, PackedMatrix } from "../tensor/packed.ts";
import { empty, type Tensor, tensor } from "../tensor/tensor.ts";

export interface PackOptions {
  /** int8: elements along a row that share a scale, a power of two that divides the columns; a whole row unless given. */
  readonly group?: number;
  /** nf4: quantise the scales once more, to 8 bits. Saves 0.37 bits per element. */
  readonly doubleQuant?: boolean;
}

/** Words and scales as the GPU is to have them. */
interface Codes {
  readonly words: Int32Array;
  readonly scales?: Float32Array | Int32Array;
}

/**
 * Packs a row-major matrix. f16 and bf16 round to nearest, ties to even.
 *
 * int8: symmetric, scale = absmax / 127 of a row or group, code = value / scale to nearest, ties to even.
 * nf4: the 16 levels of QLoRA's NormalFloat for each 64 elements and their absmax, whatever the rows; arXiv:2305.14314, §3,
 * decided as bitsandbytes does, save that a block of zeros stays zeros.
 *
 * Throws ShapeError if shape, format and options do not fit, or if a value to be quantised is not finite.
 */
export function packMatrix(
  gpu: Gpu,
  values: Float32Array,
  shape: readonly [rows: number, columns: number],
  format: PackedFormat,
  { group: asked, doubleQuant = false }: PackOptions = {},
): PackedMatrix {
  const [rows, columns] = shape;
  if (values.length !== rows * columns)
    throw new ShapeError(`packMatrix: shape [${shape}] holds ${rows * columns} values, got ${values.length}`);
  if (columns % 4 !== 0)
    throw new ShapeError(`packMatrix: columns must be a multiple of 4, got [${shape}]. Keep such a matrix in f32`);
  if (asked !== undefined && format !== "int8")
    throw new ShapeError(`packMatrix: only int8 takes a group, got ${format}`);
  if (doubleQuant && format !== "nf4")
    throw new ShapeError(`packMatrix: only nf4 can have its scales quantised (doubleQuant), got ${format}`);
  const largest = columns & -columns; // power of two in the columns
  const group = format === "nf4" ? BLOCK : (asked ?? largest);
  if (format === "int8" && !(group >= 4 && largest % group === 0))
    throw new ShapeError(
      `packMatrix: group must be a power of two from 4 that divides the ${columns} columns, got ${group}`,
    );
  if (format === "int8" || format === "nf4") {
    const at = values.findIndex((value) => !Number.isFinite(value));
    if (at >= 0)
      throw new ShapeError(
        `packMatrix: ${format} needs finite values, got ${values[at]} at [${Math.floor(at / columns)},${at % columns}]`,
      );
  }
  const { words, scales } = encode(values, format, group, asked ?? columns, doubleQuant);
  return {
    ...{ gpu, format, shape, group, doubleQuant, words: tensor(gpu, words, [words.length]) },
    ...(scales && { scales: tensor(gpu, scales, [scales.length]) }),
  };
}

/** A packed matrix of undefined content: what `packMatrix` would take of the device. */
export function emptyPacked(
  gpu: Gpu,
  shape: readonly [rows: number, columns: number],
  format: PackedFormat,
  { doubleQuant = false }: Pick<PackOptions, "doubleQuant"> = {},
): PackedMatrix {
  const [rows, columns] = shape;
  const size = rows * columns;
  const group = format === "nf4" ? BLOCK : columns & -columns;
  const bits = { f16: 16, bf16: 16, int8: 8, nf4: 4 }[format];
  const scales = Math.ceil(size / group);
  const words = (count: number): Tensor => empty(gpu, [count], "packed", "i32");
  const scaleWords = doubleQuant ? 257 + 65 * Math.ceil(scales / OUTER_BLOCK) : scales;
  return {
    ...{ gpu, format, shape, group, doubleQuant, words: words(Math.ceil((size * bits) / 32)) },
    ...((format === "int8" || format === "nf4") && { scales: words(scaleWords) }),
  };
}

function encode(values: Float32Array, format: PackedFormat, group: number, span: number, doubleQuant: boolean): Codes {
  switch (format) {
    case "f16":
      return { words: new Int32Array(encodeFloats("F16", values).buffer) };
    case "bf16":
      return { words: new Int32Array(encodeFloats("BF16", values).buffer) };
    case "int8":
      return toInt8(values, group, span);
    case "nf4": {
      const { words, scales } = toNf4(values);
      return { words, scales: doubleQuant ? quantizeScales(scales) : scales };
    }
  }
}

/** A scale for each `span`, written once for each `group` of it. */
function toInt8(values: Float32Array, group: number, span: number): Codes {
  const spans = absmax(values, span).map((most) => most / 127);
  const scales = Float32Array.from(
    { length: values.length / group },
    (_, i) => spans[Math.floor((i * group) / span)] ?? 0,
  );
  const codes = new Int8Array(values.length);
  for (let i = 0; i < codes.length; i++) {
    const scale = scales[Math.floor(i / group)] ?? 0;
    // Adding and taking away a number whose units are whole rounds to a whole number, ties to even.
    const code = scale === 0 ? 0 : (values[i] ?? 0) / scale + WHOLE - WHOLE;
    codes[i] = Math.max(-127, Math.min(127, code));
  }
  return { words: new Int32Array(codes.buffer), scales };
}

const WHOLE = 1.5 * 2 ** 52;

/** The element of a pair that comes first is in the high half of a byte. */
function toNf4(values: Float32Array): { readonly words: Int32Array; readonly scales: Float32Array } {
  const scales = absmax(values, BLOCK);
  const codes = quantize(values, scales, BLOCK, NF4_BOUNDS);
  const bytes = new Uint8Array(4 * Math.ceil(codes.length / 8));
  for (let i = 0; i < codes.length; i += 2) bytes[i / 2] = ((codes[i] ?? 0) << 4) | (codes[i + 1] ?? 0);
  return { words: new Int32Array(bytes.buffer), scales };
}

/** Quantises scales around their mean, in the layout of `parts/double-quant.wgsl`. */
function quantizeScales(scales: Float32Array): Int32Array {
  const offset = Math.fround(scales.reduce((sum, scale) => sum + scale, 0) / scales.length);
  const centred = scales.map((scale) => scale - offset);
  const outer = absmax(centred, OUTER_BLOCK);
  const codes = quantize(centred, outer, OUTER_BLOCK, MAP_BOUNDS);
  const words = new Int32Array(257 + 65 * outer.length);
  const floats = new Float32Array(words.buffer);
  const bytes = new Uint8Array(words.buffer);
  floats.set(MAP);
  floats[256] = offset;
  outer.forEach((scale, i) => {
    const at = 257 + 65 * i;
    floats[at] = scale;
    bytes.set(codes.subarray(OUTER_BLOCK * i, OUTER_BLOCK * (i + 1)), 4 * (at + 1));
  });
  return words;
}

/** The largest |value| of every block; the last one may be short. */
function absmax(values: Float32Array, block: number): Float32Array<ArrayBuffer> {
  const most = new Float32Array(Math.ceil(values.length / block));
  for (let i = 0; i < most.length; i++) {
    let best = 0;
    const end = Math.min(values.length, (i + 1) * block);
    for (let j = i * block; j < end; j++) best = Math.max(best, Math.abs(values[j] ?? 0));
    most[i] = best;
  }
  return most;
}

/** The level nearest to every value · (1 / its block's absmax), in f32; the lower one if it lies in the middle of two. */
function quantize(values: Float32Array, most: Float32Array, block: number, bounds: Float32Array): Uint8Array {
  const codes = new Uint8Array(values.length);
  for (let i = 0; i < codes.length; i++) {
    const value = values[i] ?? 0;
    const inverse = Math.fround(1 / (most[Math.floor(i / block)] ?? 0));
    const x = value === 0 ? 0 : Math.fround(value * inverse); // not 0 · ∞
    let low = 0;
    for (let high = bounds.length; low < high; ) {
      const at = (low + high) >> 1;
      if (x > (bounds[at] ?? 0)) low = at + 1;
      else high = at;
    }
    codes[i] = low;
  }
  return codes;
}

/** Where one level ends and the next begins. */
function boundaries(levels: Float32Array): Float32Array {
  return Float32Array.from(levels.subarray(1), (level, i) => (level + (levels[i] ?? 0)) / 2);
}

/**
 * The levels of 8-bit dynamic quantisation, ascending, and the bits that bitsandbytes has for them: Dettmers et al.,
 * arXiv:2110.02861, §2. 0, 1, and for each decade 10⁰, 10⁻¹ … 10⁻⁶ plus and minus the middles of 2⁶, 2⁵ … 1 equal pieces of
 * [0.1, 1] times it.
 */
function dynamicMap(): Float32Array {
  const { fround } = Math;
  const levels = [0, 1];
  for (let e = 0; e < 7; e++) {
    const pieces = 2 ** e;
    const start = fround(0.1);
    const step = fround((1 - start) / pieces);
    const edge = (i: number): number => fround(i < pieces / 2 ? start + i * step : 1 - (pieces - i) * step);
    for (let i = 0; i < pieces; i++) {
      const level = fround(fround((edge(i) + edge(i + 1)) / 2) * fround(10 ** (e - 6)));
      levels.push(level, -level);
    }
  }
  return Float32Array.from(levels).sort();
}

const BLOCK = 64;
const OUTER_BLOCK = 256;
/** As in `parts/weight-nf4.wgsl`. */
const NF4 = Float32Array.of(
  ...[-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334],
  ...[-0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
  ...[0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1],
);
const NF4_BOUNDS = boundaries(NF4);
const MAP = dynamicMap();
const MAP_BOUNDS = boundaries(MAP);
