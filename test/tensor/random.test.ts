import { expect, test } from "vitest";
import { philox, Random } from "../../src/tensor/random.ts";

const hex = (words: readonly number[]): string => words.map((w) => w.toString(16).padStart(8, "0")).join(" ");

test("philox4x32-10 gives the known answers of its authors' Random123", () => {
  expect(hex(philox([0, 0, 0, 0], [0, 0]))).toBe("6627e8d5 e169c58d bc57ac4c 9b00dbd8");
  const ones = 0xffffffff;
  expect(hex(philox([ones, ones, ones, ones], [ones, ones]))).toBe("408f276d 41c83b0e a20bc7c6 6d5451fd");
  expect(hex(philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]))).toBe(
    "d16cfe09 94fdcceb 5001e420 24126ea1",
  );
});

test("uniform and normal numbers have the mean and spread they should", () => {
  const random = new Random(5);
  const draw = (f: () => number): { mean: number; std: number } => {
    const values = Array.from({ length: 20000 }, f);
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    return { mean, std: Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length) };
  };
  const uniform = draw(() => random.uniform(-1, 1));
  expect(Math.abs(uniform.mean)).toBeLessThan(0.02);
  expect(Math.abs(uniform.std - 1 / Math.sqrt(3))).toBeLessThan(0.02);
  const normal = draw(() => random.normal(3, 2));
  expect(Math.abs(normal.mean - 3)).toBeLessThan(0.07);
  expect(Math.abs(normal.std - 2)).toBeLessThan(0.05);
});

test("shuffling permutes, and depends on the seed and the stream alone", () => {
  const shuffled = (seed: number, stream = 0): number[] =>
    new Random(seed, stream).shuffle(Array.from({ length: 50 }, (_, i) => i));
  expect([...shuffled(1)].sort((a, b) => a - b)).toEqual(Array.from({ length: 50 }, (_, i) => i));
  expect(shuffled(1)).toEqual(shuffled(1));
  expect(shuffled(1)).not.toEqual(shuffled(2));
  expect(shuffled(1)).not.toEqual(shuffled(1, 1));
});
