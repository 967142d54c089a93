import { expect, test } from "vitest";
import { MOST_STAGED, stagedPieces } from "../../src/gpu/staging.ts";

test("what is read back lies in buffers that any device can have, each byte once and at multiples of 4", () => {
  const sizes = [0, 6, 40, 1, 100, 16];
  for (const most of [16, 20, 64, 1000]) {
    const buffers = stagedPieces(sizes, most);
    const seen = sizes.map(() => 0);
    for (const { pieces, sizeBytes } of buffers) {
      expect(sizeBytes).toBeLessThanOrEqual(most);
      let end = 0;
      for (const { source, at, from, sizeBytes: size } of pieces) {
        expect([from % 4, at % 4]).toEqual([0, 0]);
        expect(from, "one behind the other").toBe(Math.ceil(end / 4) * 4);
        expect(at, "in order").toBe(seen[source]);
        seen[source] = at + size;
        end = from + size;
      }
      expect(sizeBytes).toBe(Math.max(4, Math.ceil(end / 4) * 4));
    }
    expect(seen).toEqual(sizes);
  }
  expect(stagedPieces([], 16), "something is waited for").toEqual([{ pieces: [], sizeBytes: 4 }]);
  expect(stagedPieces([2 ** 32], MOST_STAGED)).toHaveLength(16);
});
