import { type Nd, nd } from "../harness.ts";

const LOW = 0xffffffffn;

/** Philox4x32-10 in whole numbers of any size: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11. */
export function philoxTwin(counter: readonly number[], key: readonly number[]): number[] {
  let [a = 0n, b = 0n, c = 0n, d = 0n] = counter.map(BigInt);
  let [k = 0n, l = 0n] = key.map(BigInt);
  for (let round = 0; round < 10; round++) {
    const [left, right] = [0xd2511f53n * a, 0xcd9e8d57n * c];
    [a, b, c, d] = [(right >> 32n) ^ b ^ k, right & LOW, (left >> 32n) ^ d ^ l, left & LOW];
    [k, l] = [(k + 0x9e3779b9n) & LOW, (l + 0xbb67ae85n) & LOW];
  }
  return [a, b, c, d].map(Number);
}

const wordOf = (i: number, { seed, step, stream }: Readonly<Record<"seed" | "step" | "stream", number>>): number =>
  philoxTwin([Math.floor(i / 4), stream, step, 0], [seed % 2 ** 32, Math.floor(seed / 2 ** 32)])[i % 4] ?? 0;

/** x + most·u, u in [−1, 1) of the upper 24 bits of each word. */
export function noiseTwin(
  { shape, data }: Nd,
  most: number,
  key: Readonly<Record<"seed" | "step" | "stream", number>>,
): Nd {
  return nd(
    shape,
    data.map((value, i) => value + most * (Math.floor(wordOf(i, key) / 256) / 2 ** 23 - 1)),
  );
}

/** mask∘x/(1 − p), and added to acc where that is given. */
export function dropoutTwin(
  { shape, data }: Nd,
  p: number,
  key: { seed: number; step: number; stream: number },
  acc?: Nd,
): Nd {
  return nd(
    shape,
    data.map((value, i) => {
      const kept = wordOf(i, key) >= p * 2 ** 32 ? value / (1 - p) : 0;
      return (acc?.data[i] ?? 0) + kept;
    }),
  );
}
