import { createHash } from "node:crypto";
import { expect, test } from "vitest";
import { Sha256 } from "../../src/io/sha256.ts";
import { Random } from "../../src/tensor/random.ts";
import { freshSeed } from "../harness.ts";

test.each([0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 100_003])(
  "%i bytes have the hash that they have elsewhere, in whatever pieces they come",
  (length) => {
    const seed = freshSeed();
    const random = new Random(seed);
    const data = Uint8Array.from({ length }, () => random.uniform() * 256);
    const hash = new Sha256();
    for (let at = 0; at < length; ) {
      const end = at + Math.ceil(random.uniform() * 200);
      hash.update(data.subarray(at, end));
      at = end;
    }
    expect(hash.digest(), `seed ${seed}`).toBe(createHash("sha256").update(data).digest("hex"));
  },
);
