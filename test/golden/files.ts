/** What the scripts in scripts/golden made, and how it is compared. */
import { expect } from "vitest";
import { decodeFloats } from "../../src/io/dtype.ts";
import { fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { expectClose } from "../harness.ts";

/** The f32 tensors of a safetensors file by name. */
export async function valuesOf(path: string): Promise<Map<string, Float32Array>> {
  const file = await openSafetensors(await fileSource(path), path);
  const entries = [...file.tensors.keys()].map(
    async (name) => [name, decodeFloats("F32", await file.read(name))] as const,
  );
  return new Map(await Promise.all(entries));
}

/** Fails unless the differences are within `tolerance` times the largest of what is expected: gradients of one tensor differ much in size. */
export function expectRelative(
  got: ArrayLike<number>,
  want: Float32Array | undefined,
  tolerance: number,
  what: string,
): void {
  const expected = want ?? new Float32Array();
  const largest = expected.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
  expect(largest, what).toBeGreaterThan(0);
  const relative = (values: ArrayLike<number>): number[] => Array.from(values, (v) => v / largest);
  expectClose(relative(got), relative(expected), tolerance, what);
}
