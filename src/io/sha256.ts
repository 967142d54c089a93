/** SHA-256 of data that comes in pieces (FIPS 180-4): WebCrypto hashes only what is in memory whole. */

/** The first 32 bits of the fractions of the square or cube roots of the first primes. */
function fractions(count: number, root: (prime: number) => number): Int32Array {
  const primes: number[] = [];
  for (let n = 2; primes.length < count; n++) if (primes.every((prime) => n % prime !== 0)) primes.push(n);
  return Int32Array.from(primes, (prime) => Math.floor((root(prime) % 1) * 2 ** 32));
}

const START = fractions(8, Math.sqrt);
const ROUNDS = fractions(64, Math.cbrt);
const BLOCK = 64;

export class Sha256 {
  readonly #state: Int32Array = START.slice();
  readonly #schedule = new Int32Array(64);
  /** Begins with what is left of the data so far, less than a block. */
  readonly #rest = new Uint8Array(BLOCK);
  #length = 0;

  update(data: Uint8Array): void {
    let at = 0;
    const filled = this.#length % BLOCK;
    this.#length += data.length;
    if (filled > 0) {
      at = Math.min(BLOCK - filled, data.length);
      this.#rest.set(data.subarray(0, at), filled);
      if (filled + at < BLOCK) return;
      this.#blocks(this.#rest, 0, BLOCK);
    }
    const end = data.length - ((data.length - at) % BLOCK);
    this.#blocks(data, at, end);
    this.#rest.set(data.subarray(end));
  }

  /** In hexadecimal. Ends the hash. */
  digest(): string {
    const bits = BigInt(this.#length) * 8n;
    const filled = this.#length % BLOCK;
    const tail = new Uint8Array(filled < BLOCK - 8 ? BLOCK - filled : 2 * BLOCK - filled);
    tail[0] = 0x80;
    new DataView(tail.buffer).setBigUint64(tail.length - 8, bits);
    this.update(tail);
    return Array.from(this.#state, (word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
  }

  #blocks(data: Uint8Array, start: number, end: number): void {
    const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
    const w = this.#schedule;
    const state = this.#state;
    for (let at = start; at < end; at += BLOCK) {
      for (let t = 0; t < 16; t++) w[t] = view.getInt32(at + 4 * t);
      for (let t = 16; t < 64; t++) {
        const x = w[t - 15] as number;
        const y = w[t - 2] as number;
        const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
        const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
        w[t] = ((w[t - 16] as number) + s0 + (w[t - 7] as number) + s1) | 0;
      }
      compress(state, w);
    }
  }
}

/** The 64 rounds of one block. Destructuring would cost half the time. */
function compress(state: Int32Array, w: Int32Array): void {
  let a = state[0] as number;
  let b = state[1] as number;
  let c = state[2] as number;
  let d = state[3] as number;
  let e = state[4] as number;
  let f = state[5] as number;
  let g = state[6] as number;
  let h = state[7] as number;
  for (let t = 0; t < 64; t++) {
    const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
    const t1 = (h + s1 + ((e & f) ^ (~e & g)) + (ROUNDS[t] as number) + (w[t] as number)) | 0;
    const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
    const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    h = g;
    g = f;
    f = e;
    e = (d + t1) | 0;
    d = c;
    c = b;
    b = a;
    a = (t1 + t2) | 0;
  }
  state[0] = (state[0] as number) + a;
  state[1] = (state[1] as number) + b;
  state[2] = (state[2] as number) + c;
  state[3] = (state[3] as number) + d;
  state[4] = (state[4] as number) + e;
  state[5] = (state[5] as number) + f;
  state[6] = (state[6] as number) + g;
  state[7] = (state[7] as number) + h;
}
