/**
 * QLoRA's 4-bit NormalFloat and the 8-bit quantisation of its scales, on the host: arXiv:2305.14314, §3, decided as bitsandbytes' kernels
 * decide. `parts/weight-nf4.wgsl` and `parts/double-quant.wgsl` undo it.
 */

/** Scales in 8 bits: scale = map[code] · absmax + offset. */
export interface QuantizedScales {
  /** One for each block of weights. */
  readonly codes: Uint8Array;
  /** One for each 256 codes. */
  readonly absmax: Float32Array;
  /** 256 levels, ascending. */
  readonly map: Float32Array;
  /** The mean of the scales, f32. */
  readonly offset: number;
}

/** Weights that share a scale, unless a file says otherwise. */
export const BLOCK = 64;
/** Scales that share a scale. */
export const OUTER_BLOCK = 256;

/** As in `parts/weight-nf4.wgsl`. */
export const NF4: Float32Array = Float32Array.of(
  ...[-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334],
  ...[-0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
  ...[0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1],
);

/** NF4 codes of values, two to a byte, the one that comes first in the high half, and the scale of each block. */
export interface Nf4Codes {
  readonly words: Int32Array;
  readonly scales: Float32Array;
}

/**
 * For each block of 64 its absmax, and the level nearest to every value over it, the lower of two. In a block of zeros the quotient is no
 * number, which bitsandbytes' kernels take for the lowest level; that is 0 as long as the scale is. With `keepsZeros`, for scales that are to
 * be quantised and so may not stay 0, zeros get the level 0.
 */
export function toNf4(values: Float32Array, keepsZeros: boolean): Nf4Codes {
  const scales = absmax(values, BLOCK);
  const codes = quantize(values, scales, BLOCK, NF4_BOUNDS, keepsZeros);
  const bytes = new Uint8Array(4 * Math.ceil(codes.length / 8));
  for (let i = 0; i < codes.length; i += 2) bytes[i / 2] = ((codes[i] ?? 0) << 4) | (codes[i + 1] ?? 0);
  return { words: new Int32Array(bytes.buffer), scales };
}

/**
 * Quantises scales around their mean, which is rounded once: bitsandbytes' own depends, in its last bits, on the order that a device sums in. The
 * level in the middle of two is the even one.
 */
export function quantizeScales(scales: Float32Array): QuantizedScales {
  const offset = Math.fround(scales.reduce((sum, scale) => sum + scale, 0) / scales.length);
  const centred = scales.map((scale) => scale - offset);
  const outer = absmax(centred, OUTER_BLOCK);
  return { codes: quantize(centred, outer, OUTER_BLOCK, MAP_BOUNDS, false), absmax: outer, map: MAP, offset };
}

/** Words that `scales` scales take when they are quantised: the map, the offset, and for each 256 their absmax and codes. */
export const scaleWords = (scales: number): number =>
  OUTER_BLOCK + 1 + (1 + OUTER_BLOCK / 4) * Math.ceil(scales / OUTER_BLOCK);

/** In the layout of `parts/double-quant.wgsl`. */
export function packScales({ codes, absmax: outer, map, offset }: QuantizedScales): Int32Array {
  const words = new Int32Array(scaleWords(codes.length));
  const floats = new Float32Array(words.buffer);
  const bytes = new Uint8Array(words.buffer);
  floats.set(map);
  floats[OUTER_BLOCK] = offset;
  outer.forEach((scale, i) => {
    const at = outerAt(i);
    floats[at] = scale;
    bytes.set(codes.subarray(OUTER_BLOCK * i, OUTER_BLOCK * (i + 1)), 4 * (at + 1));
  });
  return words;
}

/** Undoes `packScales`, for so many scales. */
export function unpackScales(buffer: ArrayBuffer, scales: number): QuantizedScales {
  const floats = new Float32Array(buffer);
  const codes = new Uint8Array(scales);
  const outer = Float32Array.from({ length: Math.ceil(scales / OUTER_BLOCK) }, (_, i) => floats[outerAt(i)] ?? 0);
  outer.forEach((_, i) => {
    const count = Math.min(OUTER_BLOCK, scales - OUTER_BLOCK * i);
    codes.set(new Uint8Array(buffer, 4 * (outerAt(i) + 1), count), OUTER_BLOCK * i);
  });
  return { codes, absmax: outer, map: floats.slice(0, OUTER_BLOCK), offset: floats[OUTER_BLOCK] ?? 0 };
}

/** The word where the absmax of the i-th 256 scales is; their codes follow. */
const outerAt = (i: number): number => OUTER_BLOCK + 1 + (1 + OUTER_BLOCK / 4) * i;

/** The largest |value| of every block; the last one may be short. */
export function absmax(values: Float32Array, block: number): Float32Array<ArrayBuffer> {
  const most = new Float32Array(Math.ceil(values.length / block));
  for (let i = 0; i < most.length; i++) {
    let best = 0;
    const end = Math.min(values.length, (i + 1) * block);
    for (let j = i * block; j < end; j++) best = Math.max(best, Math.abs(values[j] ?? 0));
    most[i] = best;
  }
  return most;
}

/** The last level whose bound every value · (1 / its block's absmax), in f32, is above; NaN is above none. */
function quantize(
  values: Float32Array,
  most: Float32Array,
  block: number,
  bounds: Float32Array,
  keepsZeros: boolean,
): Uint8Array {
  const codes = new Uint8Array(values.length);
  for (let i = 0; i < codes.length; i++) {
    const value = values[i] ?? 0;
    const inverse = Math.fround(1 / (most[Math.floor(i / block)] ?? 0));
    const x = keepsZeros && value === 0 ? 0 : Math.fround(value * inverse); // 0 · ∞ is NaN
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

/** The middles of neighbouring levels. */
const middles = (levels: Float32Array): Float32Array =>
  Float32Array.from(levels.subarray(1), (level, i) => (level + (levels[i] ?? 0)) / 2);

/** The f32 one unit of the last place below; not of 0. */
function nextDown(value: number): number {
  const f32 = Float32Array.of(value);
  const bits = new Int32Array(f32.buffer);
  bits[0] = (bits[0] ?? 0) - Math.sign(value);
  return f32[0] ?? Number.NaN;
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

const NF4_BOUNDS = middles(NF4);
const MAP = dynamicMap();
/** A middle belongs to its even level: above an odd one, to be on it is enough. */
const MAP_BOUNDS = middles(MAP).map((middle, i) => (i % 2 === 1 ? nextDown(middle) : middle));
