import { expect, test } from "vitest";
import { decodeFloats, encodeFloats } from "../../src/io/dtype.ts";
import { narrow16, widen16 } from "../../src/kernels/cast.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, tensor } from "../../src/tensor/tensor.ts";
import { freshSeed, testGpu } from "../harness.ts";

const FORMATS = [
  ["f16", "F16"],
  ["bf16", "BF16"],
] as const;
const ALL = Uint16Array.from({ length: 65_536 }, (_, i) => i);

/** The index of the first bit pattern that differs, or −1. */
const differ = (a: Uint32Array | Uint16Array, b: Uint32Array | Uint16Array): number =>
  a.length === b.length ? a.findIndex((bits, i) => bits !== b[i]) : 0;

test.each(FORMATS)("widen16 gives every %s its exact bits", async (half, stored) => {
  const gpu = await testGpu();
  const y = widen16(tensor(gpu, new Int32Array(ALL.slice().buffer), [32_768]), [256, 256], half);
  const [bytes] = await gpu.read([y]);
  expect(y.shape).toEqual([256, 256]);
  expect(
    differ(
      new Uint32Array(bytes ?? new ArrayBuffer()),
      new Uint32Array(decodeFloats(stored, new Uint8Array(ALL.buffer)).buffer),
    ),
  ).toBe(-1);
});

test.each(FORMATS)(
  "narrow16 undoes widen16 and rounds all neighbours and midpoints of %s to nearest even",
  async (half, stored) => {
    const gpu = await testGpu();
    const exact = new Uint32Array(decodeFloats(stored, new Uint8Array(ALL.buffer)).buffer);
    const seed = freshSeed();
    const random = new Random(seed);
    // Around every value: itself, a unit of f32 beside, and half a unit of the 16-bit type above (a tie), give or take one.
    const bits = Uint32Array.from({ length: 8 * exact.length + 1 }, (_, i) => {
      const at = exact[Math.floor(i / 8)] ?? 0;
      const tie = half === "bf16" ? 0x8000 : 0x1000;
      return [at, at - 1, at + 1, at + tie, at + tie - 1, at + tie + 1, random.uint32(), random.uint32()][i % 8] ?? 0;
    });
    const x = tensor(gpu, new Float32Array(bits.length), [bits.length]);
    gpu.write(x, bits);
    const y = narrow16(x, half);
    const [bytes] = await gpu.read([y]);
    expect([y.dtype, y.shape]).toEqual(["i32", [Math.ceil(bits.length / 2)]]);
    const halves = new Uint16Array(bytes ?? new ArrayBuffer());
    const expected = new Uint16Array(encodeFloats(stored, new Float32Array(bits.buffer)).buffer);
    const worst = differ(halves.subarray(0, bits.length), expected);
    expect(
      worst,
      `seed ${seed}: ${bits[worst]?.toString(16)} → ${halves[worst]?.toString(16)}, not ${expected[worst]?.toString(16)}`,
    ).toBe(-1);
    expect(halves.at(-1), "the odd half").toBe(0);
  },
);

test.each([
  ["f16", 1, 0x3c00],
  ["f16", 65_504, 0x7bff],
  ["f16", 65_519, 0x7bff],
  ["f16", 65_520, 0x7c00],
  ["f16", 2 ** -24, 1],
  ["f16", 2 ** -25, 0],
  ["f16", 1.5 * 2 ** -24, 2],
  ["f16", -0.333251953125, 0xb555],
  ["f16", 1 + 2 ** -11, 0x3c00],
  ["f16", 1 + 3 * 2 ** -11, 0x3c02],
  ["bf16", 1 + 2 ** -8, 0x3f80],
  ["bf16", 1 + 3 * 2 ** -8, 0x3f82],
  ["bf16", 3.4e38, 0x7f80],
  ["bf16", -2, 0xc000],
] as const)("narrow16 to %s takes %f to its known bits", async (half, value, known) => {
  const gpu = await testGpu();
  const [bytes] = await gpu.read([narrow16(tensor(gpu, [value], [1]), half)]);
  expect(new Uint16Array(bytes ?? new ArrayBuffer())[0]).toBe(known);
});

test("casts name what does not fit", async () => {
  const gpu = await testGpu();
  expect(() => widen16(empty(gpu, [3], "x"), [6], "f16")).toThrow(
    new ShapeError("widen16: words must be i32, got f32"),
  );
  expect(() => widen16(empty(gpu, [3], "x", "i32"), [7], "f16")).toThrow(
    new ShapeError("widen16: [7] needs 4 words, got 3"),
  );
  expect(() => narrow16(empty(gpu, [3], "x", "i32"), "f16")).toThrow(
    new ShapeError("narrow16: x must be f32, got i32"),
  );
});
