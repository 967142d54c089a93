/** The float types that weights are stored in, and their conversion on the host. Little-endian, as every WebGPU machine is. */

export type FloatDtype = "F32" | "F16" | "BF16";

/** Bytes as stored → f32. Exact: every f16 and bf16 is an f32; NaN payloads are kept. */
export function decodeFloats(dtype: FloatDtype, bytes: Uint8Array): Float32Array<ArrayBuffer> {
  const aligned = new Uint8Array(bytes).buffer;
  if (dtype === "F32") return new Float32Array(aligned);
  const halves = new Uint16Array(aligned);
  const bits = new Uint32Array(halves.length);
  convert(halves, bits, dtype === "BF16" ? (h) => h << 16 : f16ToBits);
  return new Float32Array(bits.buffer);
}

/** f32 → bytes to store, rounded to nearest, ties to even; too large for f16 becomes infinity, NaN stays NaN. */
export function encodeFloats(dtype: FloatDtype, values: Float32Array): Uint8Array<ArrayBuffer> {
  const bits = new Uint32Array(new Float32Array(values).buffer);
  if (dtype === "F32") return new Uint8Array(bits.buffer);
  const halves = new Uint16Array(bits.length);
  convert(bits, halves, dtype === "BF16" ? bitsToBf16 : bitsToF16);
  return new Uint8Array(halves.buffer);
}

/** A loop: `TypedArray.from` with a function takes twenty times as long. */
function convert(from: Uint16Array | Uint32Array, to: Uint16Array | Uint32Array, one: (bits: number) => number): void {
  for (let i = 0; i < from.length; i++) to[i] = one(from[i] as number);
}

function bitsToBf16(bits: number): number {
  // NaN is made quiet: a payload that is all in the lower half must not become infinity.
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

function bitsToF16(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00 | ((magnitude >>> 13) & 0x1ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and more: nearer to 2¹⁶ than to the largest f16
  if (magnitude >= 0x38800000) return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
  // Subnormal, in units of 2⁻²⁴: those are the units of the last place of an f32 in [0.5, 1), so adding 0.5 rounds.
  scratch.setUint32(0, magnitude);
  scratch.setFloat32(0, scratch.getFloat32(0) + 0.5);
  return sign | (scratch.getUint32(0) - 0x3f000000);
}

function f16ToBits(h: number): number {
  const sign = (h & 0x8000) << 16;
  const magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return sign | 0x7f800000 | ((magnitude & 0x3ff) << 13);
  if (magnitude >= 0x400) return sign | ((magnitude << 13) + 0x38000000);
  scratch.setFloat32(0, magnitude * 2 ** -24);
  return sign | scratch.getUint32(0);
}

const scratch = new DataView(new ArrayBuffer(4));
