// A large tensor: no read of its file is larger than 64 MiB, or 16 MiB where it is decoded, and the pieces come to the right places.
import { expect, test } from "vitest";
import type { ByteSource } from "../../src/io/bytes.ts";
import type { FloatDtype } from "../../src/io/dtype.ts";
import { fileSource } from "../../src/io/files.ts";
import { openSafetensors, type SafetensorsFile } from "../../src/io/safetensors.ts";
import { loadNf4 } from "../../src/nn/bitsandbytes.ts";
import { type Checkpoint, loadPacked, loadTensor, readMatrix } from "../../src/nn/checkpoint.ts";
import { type PackedMatrix, tensorsIn } from "../../src/tensor/packed.ts";
import { read, type Tensor } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";
import { refusing } from "../refusing.ts";

const LIMIT = 64 * 2 ** 20;

/** What byte `i` of the tensor "w" is. */
const byteAt = (i: number): number => (i % 251) % 61;
const PATTERN = Uint8Array.from({ length: 251 * 4096 }, (_, i) => byteAt(i));

/** A file with one tensor, of which nothing exists before it is read, and the largest read of it so far. */
async function make(
  dtype: FloatDtype,
  shape: readonly [number, number],
): Promise<{ readonly checkpoint: Checkpoint; readonly largest: () => number }> {
  const sizeBytes = shape[0] * shape[1] * (dtype === "F32" ? 4 : 2);
  const header = new TextEncoder().encode(JSON.stringify({ w: { dtype, shape, data_offsets: [0, sizeBytes] } }));
  const start = new Uint8Array(8 + header.length);
  new DataView(start.buffer).setBigUint64(0, BigInt(header.length), true);
  start.set(header, 8);
  let most = 0;
  const source: ByteSource = {
    sizeBytes: start.length + sizeBytes,
    async read(offset, length) {
      most = Math.max(most, length);
      if (offset < start.length) return start.slice(offset, offset + length);
      const bytes = new Uint8Array(length);
      for (let done = 0; done < length; ) {
        const part = PATTERN.subarray((offset - start.length + done) % 251).subarray(0, length - done);
        bytes.set(part, done);
        done += part.length;
      }
      return bytes;
    },
  };
  const file = await openSafetensors(source, "large.safetensors");
  return { checkpoint: { name: "large", tensors: new Map([["w", file]]) }, largest: () => most };
}

/** Some of so many elements, those around the ends of pieces among them. */
const places = (count: number): number[] =>
  [0, 1, 2 ** 22 - 1, 2 ** 22, 2 ** 23 - 1, 2 ** 23, 2 ** 24 - 1, 2 ** 24, count - 1].filter((i) => i < count);
const wordAt = (i: number): number =>
  new Int32Array(Uint8Array.from({ length: 4 }, (_, byte) => byteAt(4 * i + byte)).buffer)[0] ?? 0;

test("an f32 tensor is uploaded in pieces", async () => {
  const shape = [4200, 4096] as const;
  const { checkpoint, largest } = await make("F32", shape);
  const t = await loadTensor(await testGpu(), checkpoint, "w", shape);
  const words = new Int32Array((await read(t)).buffer);
  for (const i of places(words.length)) expect(words[i], `word ${i}`).toBe(wordAt(i));
  expect(largest()).toBe(LIMIT);
  t.gpu.release(t);
});

test.each(["F16", "BF16"] as const)("an %s matrix is uploaded in pieces, as it is", async (dtype) => {
  const shape = [8400, 4096] as const;
  const { checkpoint, largest } = await make(dtype, shape);
  const { words: t } = await loadPacked(await testGpu(), checkpoint, "w", shape);
  const words = await read(t); // as f32
  for (const i of places(words.length)) expect(words[i], `word ${i}`).toBe(Math.fround(wordAt(i)));
  expect(largest()).toBe(LIMIT);
  t.gpu.release(t);
});

test.each([
  ["F32", 1100, 4096, false],
  ["BF16", 300_000, 29, true],
] as const)("an %s matrix [%i,%i] to be quantised is read in pieces, turned: %s", async (dtype, N, K, isTurned) => {
  const { checkpoint, largest } = await make(dtype, isTurned ? [K, N] : [N, K]);
  const values = await readMatrix(checkpoint, "w", [N, K], isTurned);
  const stored = (i: number): number => {
    const high = i % 2 === 1 ? wordAt((i - 1) / 2) & 0xffff0000 : wordAt(i / 2) << 16;
    return new Float32Array(Int32Array.of(dtype === "F32" ? wordAt(i) : high).buffer)[0] ?? 0;
  };
  for (const i of places(N * K))
    expect(values[isTurned ? (i % N) * K + Math.floor(i / N) : i], `element ${i}`).toBe(stored(i));
  expect(largest()).toBe(LIMIT / 4);
});

/** The same, but of each tensor only the first 16 bytes can be read in pieces. */
const broken = ({ name, tensors }: Checkpoint): Checkpoint => {
  const cut = (file: SafetensorsFile): SafetensorsFile => ({
    ...file,
    async *readPieces(tensor) {
      yield (await file.read(tensor)).subarray(0, 16);
      throw new Error("the disk is gone");
    },
  });
  return { name, tensors: new Map([...tensors].map(([key, file]) => [key, cut(file)])) };
};

test("what is loaded in part, for reading fails or there is no room, is given back", async () => {
  const gpu = await testGpu();
  const path = "test/golden/nf4.safetensors";
  const file = await openSafetensors(await fileSource(path), path);
  const nf4: Checkpoint = { name: path, tensors: new Map([...file.tensors.keys()].map((key) => [key, file])) };
  const shape = [8, 64] as const;
  const [N = 0, K = 0] = file.tensors.get("normal.values")?.shape ?? [];
  const loads: [Checkpoint, (checkpoint: Checkpoint) => Promise<Tensor | PackedMatrix>][] = [
    [(await make("F32", shape)).checkpoint, (from) => loadTensor(gpu, from, "w", shape)],
    [(await make("BF16", shape)).checkpoint, (from) => loadTensor(gpu, from, "w", shape)],
    [(await make("F16", shape)).checkpoint, (from) => loadPacked(gpu, from, "w", shape)],
    [nf4, (from) => loadNf4(gpu, from, "normal.double.weight", [N, K])],
  ];
  for (const [checkpoint, load] of loads) {
    const { buffersLive } = gpu.counters();
    await expect(load(broken(checkpoint))).rejects.toThrow("the disk is gone");
    expect(gpu.counters().buffersLive).toBe(buffersLive);
    gpu.release(...tensorsIn(await refusing(gpu, () => load(checkpoint))));
  }
});
