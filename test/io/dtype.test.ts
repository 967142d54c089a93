import fc from "fast-check";
import { expect, test } from "vitest";
import { decodeFloats, encodeFloats } from "../../src/io/dtype.ts";

const encoded = (dtype: "F16" | "BF16", x: number): number => {
  const [low = 0, high = 0] = encodeFloats(dtype, Float32Array.of(x));
  return low | (high << 8);
};

/** The value of a 16-bit float, from the definition. */
function value(h: number, exponentBits: number): number {
  const mantissaBits = 15 - exponentBits;
  const bias = 2 ** (exponentBits - 1) - 1;
  const exponent = (h >>> mantissaBits) & (2 ** exponentBits - 1);
  const mantissa = h & (2 ** mantissaBits - 1);
  const sign = h & 0x8000 ? -1 : 1;
  if (exponent === 2 ** exponentBits - 1) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  const fraction = mantissa / 2 ** mantissaBits + (exponent ? 1 : 0);
  return sign * fraction * 2 ** (Math.max(exponent, 1) - bias);
}

test.each([["F16", 5] as const, ["BF16", 8] as const])("every %s decodes to its value and encodes back", (dtype, e) => {
  const all = Uint16Array.from({ length: 65536 }, (_, i) => i);
  const bytes = new Uint8Array(all.buffer);
  const values = decodeFloats(dtype, bytes);
  const wrong = all.filter((h) => !Object.is(values[h], value(h, e)));
  expect([...wrong]).toEqual([]);
  const again = new Uint16Array(encodeFloats(dtype, values).buffer);
  const changed = all.filter((h) => !Number.isNaN(values[h]) && again[h] !== h);
  expect([...changed]).toEqual([]);
  const lost = all.filter((h) => Number.isNaN(values[h]) && !Number.isNaN(value(again[h] ?? 0, e)));
  expect([...lost]).toEqual([]);
});

test.each([["F16", 5] as const, ["BF16", 8] as const])(
  "encoding to %s takes the nearest, and the even one of two",
  (dtype, e) => {
    const anyFloat = fc.oneof(
      fc.float({ noNaN: true, noDefaultInfinity: true }),
      fc.float({ min: -70000, max: 70000, noNaN: true }),
      fc.float({ min: -Math.fround(1e-4), max: Math.fround(1e-4), noNaN: true }),
      fc.nat(0x7bff).map((h) => (value(h, 5) + value(h + 1, 5)) / 2), // ties of f16
      fc.nat(0x7f7e).map((h) => (value(h, 8) + value(h + 1, 8)) / 2), // ties of bf16
    );
    const largest = value(dtype === "F16" ? 0x7bff : 0x7f7f, e);
    const infinity = dtype === "F16" ? 0x7c00 : 0x7f80;
    // Beyond the largest value the format goes on as if the exponent had one more step.
    const at = (h: number): number => (h === infinity ? largest + (largest - value(infinity - 2, e)) : value(h, e));
    fc.assert(
      fc.property(anyFloat, (x) => {
        const f = Math.fround(x);
        const h = encoded(dtype, f) & 0x7fff;
        expect(encoded(dtype, f) >>> 15).toBe(Object.is(Math.sign(f), -0) || f < 0 ? 1 : 0);
        const error = Math.abs(at(h) - Math.abs(f));
        for (const other of [h - 1, h + 1]) {
          if (other < 0 || other > infinity || h === infinity) continue;
          const distance = Math.abs(at(other) - Math.abs(f));
          expect(error < distance || (error === distance && h % 2 === 0)).toBe(true);
        }
        if (h === infinity) expect(Math.abs(f) - largest >= (largest - at(infinity - 2)) / 2).toBe(true);
      }),
      { numRuns: 2000 },
    );
  },
);

test.each([
  ["F16", 65519.996, 0x7bff],
  ["F16", 65520, 0x7c00],
  ["F16", 2 ** -24, 1],
  ["F16", 2 ** -25, 0],
  ["F16", 1.5 * 2 ** -24, 2],
  ["F16", -0, 0x8000],
  ["BF16", 3.3961775292304601e38, 0x7f80],
  ["BF16", 3.3895e38, 0x7f7f],
  ["BF16", 1 + 2 ** -8, 0x3f80],
  ["BF16", 1 + 3 * 2 ** -8, 0x3f82],
] as const)("%s of %d is the known pattern", (dtype, x, h) => expect(encoded(dtype, x)).toBe(h));

test("a NaN whose payload is in the lower half stays a NaN", () => {
  const nan = new Float32Array(Uint32Array.of(0x7f800001).buffer);
  for (const dtype of ["F16", "BF16"] as const) expect(decodeFloats(dtype, encodeFloats(dtype, nan))[0]).toBeNaN();
});

test("bytes at an odd offset decode like others, and the result is a copy", () => {
  const bytes = new Uint8Array(9);
  bytes.set(encodeFloats("F32", Float32Array.of(1.5, -2)), 1);
  const values = decodeFloats("F32", bytes.subarray(1));
  bytes.fill(0);
  expect([...values]).toEqual([1.5, -2]);
});
