/** Philox4x32-10, a counter-based generator: its whole state is a key and a counter, and any value can be had directly. */

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), table 2.
const M0 = 0xd2511f53;
const M1 = 0xcd9e8d57;
const W0 = 0x9e3779b9;
const W1 = 0xbb67ae85;

/** Four 32-bit words from a 128-bit counter and a 64-bit key. */
export function philox(
  counter: readonly [number, number, number, number],
  key: readonly [number, number],
): [number, number, number, number] {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const [hi0, lo0] = multiply(M0, c0);
    const [hi1, lo1] = multiply(M1, c2);
    [c0, c1, c2, c3] = [(hi1 ^ c1 ^ k0) >>> 0, lo1, (hi0 ^ c3 ^ k1) >>> 0, lo0];
    k0 = (k0 + W0) >>> 0;
    k1 = (k1 + W1) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** The 64-bit product of two 32-bit words, as its high and low word. */
function multiply(a: number, b: number): [high: number, low: number] {
  const a0 = a & 0xffff;
  const a1 = a >>> 16;
  const b0 = b & 0xffff;
  const b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  const cross = a0 * b1 + (middle & 0xffff);
  return [(a1 * b1 + Math.floor(middle / 0x10000) + Math.floor(cross / 0x10000)) >>> 0, Math.imul(a, b) >>> 0];
}

/** A stream of numbers from a seed. Streams of one seed are independent of each other. */
export class Random {
  readonly #key: readonly [number, number];
  #counter = 0;
  #words: number[] = [];

  constructor(seed: number, stream = 0) {
    this.#key = [seed >>> 0, stream >>> 0];
  }

  /** A whole number in [0, 2³²). */
  uint32(): number {
    if (this.#words.length === 0) {
      const n = this.#counter++;
      this.#words = philox([n >>> 0, Math.floor(n / 2 ** 32), 0, 0], this.#key).reverse();
    }
    return this.#words.pop() ?? 0;
  }

  /** A number in [low, high), of 24 random bits: exact in f32. */
  uniform(low = 0, high = 1): number {
    return low + ((high - low) * (this.uint32() >>> 8)) / 2 ** 24;
  }

  /** A number of the normal distribution (Box and Muller). */
  normal(mean = 0, std = 1): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return mean + std * radius * Math.cos(2 * Math.PI * this.uniform());
  }

  /** A whole number in [0, n), without bias. */
  below(n: number): number {
    const limit = 2 ** 32 - (2 ** 32 % n);
    for (;;) {
      const word = this.uint32();
      if (word < limit) return word % n;
    }
  }

  /** Shuffles in place (Fisher and Yates) and returns the array. */
  shuffle<T>(items: T[]): T[] {
    for (let i = items.length - 1; i > 0; i--) {
      const j = this.below(i + 1);
      const [a, b] = [items[i] as T, items[j] as T];
      items[i] = b;
      items[j] = a;
    }
    return items;
  }
}
