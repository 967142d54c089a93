/** Quantising and packing of frozen matrices, on the host: it is done once, when a model is loaded. `parts/weight-*.wgsl` undo it. */
import type { Gpu } from "../gpu/gpu.ts";
import { encodeFloats } from "../io/dtype.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { PackedFormat, PackedMatrix } from "../tensor/packed.ts";
import { empty, type Tensor, tensor } from "../tensor/tensor.ts";
import { absmax, BLOCK, packScales, quantizeScales, scaleWords, toNf4 } from "./nf4.ts";

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
 * decided as bitsandbytes does, save that with `doubleQuant` a block of zeros stays zeros.
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
  const tensors = gpu.scope(() => ({
    words: tensor(gpu, words, [words.length]),
    ...(scales && { scales: tensor(gpu, scales, [scales.length]) }),
  }));
  return { gpu, format, shape, group, doubleQuant, ...tensors };
}

/** A packed matrix of undefined content: what `packMatrix` would take of the device. A file's nf4 may have another group than 64. */
export function emptyPacked(
  gpu: Gpu,
  shape: readonly [rows: number, columns: number],
  format: PackedFormat,
  { group = format === "nf4" ? BLOCK : shape[1] & -shape[1], doubleQuant = false }: PackOptions = {},
): PackedMatrix {
  const size = shape[0] * shape[1];
  const bits = { f16: 16, bf16: 16, int8: 8, nf4: 4 }[format];
  const scales = Math.ceil(size / group);
  const words = (count: number): Tensor => empty(gpu, [count], "packed", "i32");
  const tensors = gpu.scope(() => ({
    words: words(Math.ceil((size * bits) / 32)),
    ...((format === "int8" || format === "nf4") && { scales: words(doubleQuant ? scaleWords(scales) : scales) }),
  }));
  return { gpu, format, shape, group, doubleQuant, ...tensors };
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
      const { words, scales } = toNf4(values, doubleQuant);
      return { words, scales: doubleQuant ? packScales(quantizeScales(scales)) : scales };
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
