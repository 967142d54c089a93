/**
 * NF4 weights in safetensors as bitsandbytes has them, which is how transformers saves a model with `load_in_4bit`. A weight W [N,K] is
 *
 *     W                                 u8 [N·K/2, 1]   codes, two to a byte, the first in the high half
 *     W.absmax                          f32 [blocks]    scales; u8 where they are quantised themselves
 *     W.quant_map                       f32 [16]        NF4's levels
 *     W.nested_absmax                   f32 [blocks/256]
 *     W.nested_quant_map                f32 [256]
 *     W.quant_state.bitsandbytes__nf4   u8              JSON: shape, block sizes, the type W had, the mean of the scales
 */
import type { Gpu } from "../gpu/gpu.ts";
import { decodeFloats } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { excerpt, type JsonObject, parseJsonObject, utf8 } from "../io/json.ts";
import type { Dtype, TensorToWrite } from "../io/safetensors.ts";
import { NF4, OUTER_BLOCK, packScales, unpackScales } from "../kernels/nf4.ts";
import { emptyPacked } from "../kernels/pack.ts";
import { type PackedMatrix, tensorsIn } from "../tensor/packed.ts";
import { type Checkpoint, fill } from "./checkpoint.ts";

const STATE = "quant_state.bitsandbytes__";

/** Whether this checkpoint has the weight as bitsandbytes quantises to 4 bits. */
export const isQuantized = ({ tensors }: Checkpoint, name: string): boolean =>
  ["absmax", `${STATE}nf4`, `${STATE}fp4`].some((part) => tensors.has(`${name}.${part}`));

/** Whether the scales of such a weight are quantised themselves. */
export const isDoubleQuantized = ({ tensors }: Checkpoint, name: string): boolean =>
  tensors.has(`${name}.nested_absmax`);

/**
 * Loads a weight [N,K] that is stored as NF4 as it is. Throws FormatError where a part is missing, has a wrong type or shape, contradicts another
 * or holds a number that is not finite.
 */
export async function loadNf4(
  gpu: Gpu,
  checkpoint: Checkpoint,
  name: string,
  shape: readonly [N: number, K: number],
): Promise<PackedMatrix> {
  const size = shape[0] * shape[1];
  const state = await quantState(checkpoint, name);
  const group = checkState(`${checkpoint.name}: tensor "${name}.${STATE}nf4"`, state, shape);
  const codes = partOf(checkpoint, name, "U8", [size / 2, 1]);
  const levels = await floatsOf(checkpoint, `${name}.quant_map`, NF4.length);
  if (levels.some((level, i) => level !== NF4[i]))
    throw new FormatError(
      `${checkpoint.name}: tensor "${name}.quant_map" must be NF4's levels, got ${excerpt(levels.join(" "))}`,
    );
  const blocks = Math.ceil(size / group);
  const doubleQuant = isDoubleQuantized(checkpoint, name) || "nested_blocksize" in state;
  const scales = doubleQuant
    ? await nestedScales(checkpoint, name, state, blocks)
    : await floatsOf(checkpoint, `${name}.absmax`, blocks);
  const packed = gpu.scope(() => emptyPacked(gpu, shape, "nf4", { group, doubleQuant }));
  if (packed.scales) gpu.write(packed.scales, scales);
  await fill(packed, codes.readPieces(name));
  return packed;
}

/** What a quantised weight says of itself. Throws FormatError unless that is NF4. */
export async function quantState(checkpoint: Checkpoint, name: string): Promise<JsonObject> {
  if (checkpoint.tensors.has(`${name}.${STATE}fp4`))
    throw new FormatError(
      `${checkpoint.name}: weight "${name}" must be in NF4 or floating point, got FP4. Get the model unquantised`,
    );
  const part = `${name}.${STATE}nf4`;
  const bytes = await partOf(checkpoint, part, "U8").read(part);
  const where = `${checkpoint.name}: tensor "${part}"`;
  return parseJsonObject(utf8(bytes, where), where);
}

/** The block size. Throws FormatError where something is not as it must be. */
function checkState(where: string, state: JsonObject, shape: readonly number[]): number {
  const fail = (rule: string, key: string): never => {
    throw new FormatError(`${where}: "${key}" must be ${rule}, got ${JSON.stringify(state[key])}`);
  };
  const { quant_type: type, blocksize } = state;
  if (type !== "nf4") fail('"nf4"', "quant_type");
  if (JSON.stringify(state.shape) !== JSON.stringify(shape)) fail(`[${shape}]`, "shape");
  if ((shape[1] ?? 0) % 4 !== 0) fail("rows of a multiple of 4", "shape");
  if (typeof blocksize !== "number" || !(blocksize >= 32) || !Number.isInteger(Math.log2(blocksize)))
    return fail("a power of two from 32", "blocksize");
  return blocksize;
}

/** Quantised scales as the GPU is to have them. */
async function nestedScales(
  checkpoint: Checkpoint,
  name: string,
  state: JsonObject,
  blocks: number,
): Promise<Int32Array> {
  const { nested_blocksize: size, nested_offset: offset } = state;
  const where = `${checkpoint.name}: tensor "${name}.${STATE}nf4"`;
  if (size !== OUTER_BLOCK)
    throw new FormatError(`${where}: "nested_blocksize" must be ${OUTER_BLOCK}, got ${JSON.stringify(size)}`);
  if (typeof offset !== "number" || !Number.isFinite(Math.fround(offset)))
    throw new FormatError(`${where}: "nested_offset" must be a finite f32, got ${JSON.stringify(offset)}`);
  const absmax = `${name}.absmax`;
  return packScales({
    codes: await partOf(checkpoint, absmax, "U8", [blocks]).read(absmax),
    absmax: await floatsOf(checkpoint, `${name}.nested_absmax`, Math.ceil(blocks / OUTER_BLOCK)),
    map: await floatsOf(checkpoint, `${name}.nested_quant_map`, OUTER_BLOCK),
    offset,
  });
}

/** The file of a tensor of this type and, if given, shape. */
function partOf({ name: file, tensors }: Checkpoint, name: string, dtype: Dtype, shape?: readonly number[]) {
  const found = tensors.get(name);
  const info = found?.tensors.get(name);
  if (!found || !info)
    throw new FormatError(`${file}: tensor "${name}" must be there, as a part of an NF4 weight, got none`);
  if (info.dtype !== dtype || (shape && `${info.shape}` !== `${shape}`))
    throw new FormatError(
      `${file}: tensor "${name}" must be ${dtype}${shape ? ` [${shape}]` : ""}, got ${info.dtype} [${info.shape}]`,
    );
  return found;
}

/** So many finite numbers. */
async function floatsOf(checkpoint: Checkpoint, name: string, count: number): Promise<Float32Array> {
  const values = decodeFloats("F32", await partOf(checkpoint, name, "F32", [count]).read(name));
  const at = values.findIndex((value) => !Number.isFinite(value));
  if (at >= 0) throw new FormatError(`${checkpoint.name}: tensor "${name}" must be finite, got ${values[at]} at ${at}`);
  return values;
}

/**
 * What `encodeSafetensors` needs to write w, in NF4: byte for byte what bitsandbytes would. `dtype` is the type that W had before, in PyTorch's
 * words. The codes are read from the device when their turn comes; with `isTemporary` w is released then.
 */
export async function nf4ToWrite(
  name: string,
  w: PackedMatrix,
  dtype: string,
  isTemporary = false,
): Promise<TensorToWrite[]> {
  const { gpu, shape, group, doubleQuant, words } = w;
  const size = shape[0] * shape[1];
  const [raw = new ArrayBuffer()] = await gpu.read(w.scales ? [w.scales] : []);
  const nested = doubleQuant ? unpackScales(raw, Math.ceil(size / group)) : undefined;
  const state = [
    `"quant_type": "nf4", "blocksize": ${group}, "dtype": "${dtype}", "shape": [${shape.join(", ")}]`,
    ...(nested
      ? [`"nested_blocksize": ${OUTER_BLOCK}, "nested_dtype": "float32"`, `"nested_offset": ${python(nested.offset)}`]
      : []),
  ].join(", ");
  return [
    {
      ...{ name, dtype: "U8", shape: [size / 2, 1], sizeBytes: size / 2 },
      data: async function* () {
        const [codes = new ArrayBuffer()] = await gpu.read([words]);
        if (isTemporary) gpu.release(...tensorsIn(w));
        yield new Uint8Array(codes, 0, size / 2);
      },
    },
    small(`${name}.absmax`, nested ? nested.codes : new Float32Array(raw)),
    small(`${name}.quant_map`, NF4),
    small(`${name}.${STATE}nf4`, new TextEncoder().encode(`{${state}}`)),
    ...(nested ? [small(`${name}.nested_absmax`, nested.absmax), small(`${name}.nested_quant_map`, nested.map)] : []),
  ];
}

const small = (name: string, values: Uint8Array | Float32Array): TensorToWrite => ({
  ...{ name, dtype: values instanceof Uint8Array ? "U8" : "F32", shape: [values.length], sizeBytes: values.byteLength },
  data: async () => new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
});

/** A number as Python writes a float in JSON: the same digits as here, but 2.0, 2e-05 and 1e+16. */
function python(value: number): string {
  const [digits, exponent] = value.toExponential().split("e").map(String);
  const e = Number(exponent);
  if (value !== 0 && !(e >= -4 && e < 16))
    return `${digits}e${e < 0 ? "-" : "+"}${String(Math.abs(e)).padStart(2, "0")}`;
  const plain = Object.is(value, -0) ? "-0" : `${value}`;
  return Number.isInteger(value) ? `${plain}.0` : plain;
}
