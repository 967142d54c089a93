import type { PackedMatrix } from "../../src/tensor/packed.ts";
import { type Nd, nd } from "../harness.ts";

/** The 4-bit NormalFloat: Dettmers et al., arXiv:2305.14314, appendix E, to f32. */
const LEVELS = [
  -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
  -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
]; // biome-ignore format: as in the paper

/** A packed matrix as its bytes say, read back and decoded one by one in f64. */
export async function unpackTwin(w: PackedMatrix): Promise<Nd> {
  const [words, scales] = (await w.gpu.read(w.scales ? [w.words, w.scales] : [w.words])).map(
    (bytes) => new DataView(bytes),
  );
  if (!words) throw new Error("nothing was read");
  const scale = (i: number): number => {
    const group = Math.floor(i / w.group);
    if (!w.doubleQuant) return scales?.getFloat32(4 * group, true) ?? Number.NaN;
    const outer = 4 * 257 + Math.floor(group / 256) * (4 + 256);
    const code = scales?.getUint8(outer + 4 + (group % 256)) ?? Number.NaN;
    const [level = Number.NaN, factor = Number.NaN, offset = Number.NaN] = [4 * code, outer, 4 * 256].map((at) =>
      scales?.getFloat32(at, true),
    );
    return level * factor + offset;
  };
  const element = {
    f16: (i: number): number => half(words.getUint16(2 * i, true)),
    bf16: (i: number): number => {
      const f32 = new DataView(new ArrayBuffer(4));
      f32.setUint16(0, words.getUint16(2 * i, true));
      return f32.getFloat32(0);
    },
    int8: (i: number): number => words.getInt8(i) * scale(i),
    nf4: (i: number): number => {
      const pair = words.getUint8(Math.floor(i / 2));
      return (LEVELS[i % 2 === 0 ? Math.floor(pair / 16) : pair % 16] ?? Number.NaN) * scale(i);
    },
  }[w.format];
  return nd(
    w.shape,
    Float64Array.from({ length: w.shape[0] * w.shape[1] }, (_, i) => element(i)),
  );
}

/** IEEE 754 binary16. */
function half(bits: number): number {
  const exponent = Math.floor(bits / 1024) % 32;
  const fraction = (bits % 1024) / 1024;
  const magnitude =
    exponent === 0
      ? fraction * 2 ** -14
      : exponent === 31
        ? fraction === 0
          ? Number.POSITIVE_INFINITY
          : Number.NaN
        : (1 + fraction) * 2 ** (exponent - 15);
  return bits >= 0x8000 ? -magnitude : magnitude;
}
