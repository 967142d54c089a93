/** NF4 against test/golden/nf4.safetensors, which scripts/golden/nf4.py made on its own: the numbers, and how files have them. */
import { expect, test } from "vitest";
import { decodeFloats } from "../../src/io/dtype.ts";
import { fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { quantizeScales } from "../../src/kernels/nf4.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import { loadNf4, nf4ToWrite } from "../../src/nn/bitsandbytes.ts";
import type { Checkpoint } from "../../src/nn/checkpoint.ts";
import type { PackedMatrix } from "../../src/tensor/packed.ts";
import { tensorsIn } from "../../src/tensor/packed.ts";
import { read } from "../../src/tensor/tensor.ts";
import { expectClose, testGpu } from "../harness.ts";
import { unpackTwin } from "../reference/pack.ts";

const PATH = "test/golden/nf4.safetensors";
const NAMES = ["normal", "tail", "ties", "tiny", "large", "many", "zero block", "zeros"];
const KINDS = ["single", "double"] as const;

async function golden(): Promise<Checkpoint> {
  const file = await openSafetensors(await fileSource(PATH), PATH);
  return { name: PATH, tensors: new Map([...file.tensors.keys()].map((name) => [name, file])) };
}

const shapeOf = ({ tensors }: Checkpoint, name: string): [number, number] => {
  const [N = 0, K = 0] = tensors.get(name)?.tensors.get(name)?.shape ?? [];
  return [N, K];
};

/** The bytes of what a packed matrix would be in a file, and those that the file has, by name. */
async function written(checkpoint: Checkpoint, name: string, w: PackedMatrix) {
  const got = new Map<string, Uint8Array>();
  const want = new Map<string, Uint8Array>();
  for (const { name: part, data } of await nf4ToWrite(name, w, "float32")) {
    const given = data();
    const pieces = [];
    for await (const piece of Symbol.asyncIterator in given ? given : [given]) pieces.push(...piece);
    got.set(part, Uint8Array.from(pieces));
    want.set(part, Uint8Array.from((await checkpoint.tensors.get(part)?.read(part)) ?? []));
  }
  return { got, want };
}

test.each(NAMES.flatMap((name) => KINDS.map((kind) => [name, kind] as const)))(
  "%s, %s: packing gives the golden bytes",
  async (name, kind) => {
    const gpu = await testGpu();
    const checkpoint = await golden();
    const values = decodeFloats(
      "F32",
      (await checkpoint.tensors.get(`${name}.values`)?.read(`${name}.values`)) ?? new Uint8Array(),
    );
    const w = packMatrix(gpu, values, shapeOf(checkpoint, `${name}.values`), "nf4", { doubleQuant: kind === "double" });
    const { got, want } = await written(checkpoint, `${name}.${kind}.weight`, w);
    // bitsandbytes gives zeros its lowest level, −1 times a scale that is 0 no longer once it is quantised; here zeros stay zeros.
    const zeros = { "zero block": [32, 64], zeros: [0, 40] }[name];
    if (zeros && kind === "double") {
      const codes = got.get(`${name}.double.weight`) ?? expect.fail("codes");
      expect(new Set(codes.slice(...zeros))).toEqual(new Set([0x77]));
      codes.fill(0, ...zeros);
      expect(
        (await read(unpackMatrix(w))).subarray(2 * (zeros[0] ?? 0), 2 * (zeros[1] ?? 0)).every((x) => x === 0),
      ).toBe(true);
    }
    expect(got).toEqual(want);
    gpu.release(...tensorsIn(w));
  },
);

test.each(KINDS)(
  "%s: what a file has is loaded as it is, computed with, and written again byte for byte",
  async (kind) => {
    const gpu = await testGpu();
    const checkpoint = await golden();
    for (const name of NAMES) {
      const weight = `${name}.${kind}.weight`;
      const w = await loadNf4(gpu, checkpoint, weight, shapeOf(checkpoint, `${name}.values`));
      const { got, want } = await written(checkpoint, weight, w);
      expect(got.size).toBe(kind === "double" ? 6 : 4);
      expect(got).toEqual(want);
      const { data } = await unpackTwin(w);
      const largest = Math.max(1, ...data.map(Math.abs));
      const scaled = (values: ArrayLike<number>): number[] => Array.from(values, (x) => x / largest);
      expectClose(scaled(await read(unpackMatrix(w))), scaled(data), 1e-6, weight);
      gpu.release(...tensorsIn(w));
    }
  },
);

test("of two levels that a scale is in the middle of, it gets the even one", () => {
  const { map } = quantizeScales(Float32Array.of(1));
  const middles = Array.from({ length: 254 }, (_, i) => Math.fround(((map[i] ?? 0) + (map[i + 1] ?? 0)) / 2));
  const { codes, absmax } = quantizeScales(Float32Array.of(...middles, 1, -1)); // of mean 0
  expect([...absmax]).toEqual([1]);
  expect([...codes]).toEqual([...middles.map((_, i) => i + (i % 2)), 255, 0]);
});
