import { readFile } from "node:fs/promises";
import fc from "fast-check";
import { expect, test } from "vitest";
import { memorySource } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { fileSource } from "../../src/io/files.ts";
import { encodeSafetensors, openSafetensors, type TensorToWrite } from "../../src/io/safetensors.ts";
import { hasShared, shared } from "../shared.ts";

const DAMAGED = "The file is damaged: get it again";
const FOREIGN = "This is not a safetensors file";
const text = new TextEncoder();

function file(header: string | Uint8Array, data: number | Uint8Array = 0, declared?: bigint): Uint8Array {
  const head = typeof header === "string" ? text.encode(header) : header;
  const body = typeof data === "number" ? new Uint8Array(data) : data;
  const bytes = new Uint8Array(8 + head.length + body.length);
  new DataView(bytes.buffer).setBigUint64(0, declared ?? BigInt(head.length), true);
  bytes.set(head, 8);
  bytes.set(body, 8 + head.length);
  return bytes;
}

const entry = (dtype: unknown, shape: unknown, span: unknown): string =>
  JSON.stringify({ dtype, shape, data_offsets: span });

async function collect(pieces: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const parts: Uint8Array[] = [];
  for await (const piece of pieces) parts.push(piece);
  return new Uint8Array(Buffer.concat(parts));
}

const f32 = `"a":${entry("F32", [2], [0, 8])}`;
const DTYPES = "F4 F6_E2M3 F6_E3M2 BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64";

test.each<[what: string, bytes: Uint8Array, message: string]>([
  ["an empty file", new Uint8Array(), `a safetensors file must have at least 8 bytes, got 0. ${DAMAGED}`],
  ["seven bytes", new Uint8Array(7), `a safetensors file must have at least 8 bytes, got 7. ${DAMAGED}`],
  [
    "a header that ends after the file",
    file("{}", 0, 3n),
    `the header must fit into the file, got a header of 3 bytes in a file of 10. ${DAMAGED}`,
  ],
  [
    "a header length near 2⁶⁴",
    file("{}", 0, 2n ** 64n - 1n),
    `the header must be at most 25000000 bytes, got 18446744073709551615. ${FOREIGN}`,
  ],
  [
    "a header above the limit",
    file("{}", 0, 25_000_001n),
    `the header must be at most 25000000 bytes, got 25000001. ${FOREIGN}`,
  ],
  ["no header", file("", 0), `the header must start with "{", got no header. ${FOREIGN}`],
  ["a header that starts with a space", file(" {}"), `the header must start with "{", got byte 32. ${FOREIGN}`],
  [
    "a header that is not UTF-8",
    file(Uint8Array.of(0x7b, 0x22, 0xff, 0x22, 0x7d)),
    "the header: must be UTF-8 text, got bytes that are not. Save it as UTF-8",
  ],
  [
    "the same tensor twice",
    file(`{${f32},${f32}}`, 8),
    `a name must not occur twice in the header, got "a". ${DAMAGED}`,
  ],
  [
    "the same tensor twice, once with an escape",
    file(`{${f32},${f32.replace('"a"', '"\\u0061"')}}`, 8),
    `a name must not occur twice in the header, got "a". ${DAMAGED}`,
  ],
  [
    "the same field of a tensor twice",
    file('{"a":{"dtype":"F32","shape":[2],"dtype":"F32","data_offsets":[0,8]}}', 8),
    `a name must not occur twice in the header, got "dtype". ${DAMAGED}`,
  ],
  [
    "metadata that is not of strings",
    file('{"__metadata__":{"format":1}}'),
    `__metadata__ must map strings to strings, got {"format":1}. ${DAMAGED}`,
  ],
  [
    "metadata that is a list",
    file('{"__metadata__":["pt"]}'),
    `__metadata__ must map strings to strings, got ["pt"]. ${DAMAGED}`,
  ],
  ["a tensor that is null", file('{"a":null}'), `tensor "a" must have a dtype of ${DTYPES}, got none. ${DAMAGED}`],
  [
    "an unknown dtype",
    file(`{"a":${entry("F128", [1], [0, 16])}}`, 16),
    `tensor "a" must have a dtype of ${DTYPES}, got "F128". ${DAMAGED}`,
  ],
  [
    "a dtype that every object has",
    file(`{"a":${entry("constructor", [1], [0, 16])}}`, 16),
    `tensor "a" must have a dtype of ${DTYPES}, got "constructor". ${DAMAGED}`,
  ],
  [
    "a negative dimension",
    file(`{"a":${entry("F32", [-1], [0, 4])}}`, 4),
    `tensor "a" must have a shape of whole numbers, got [-1]. ${DAMAGED}`,
  ],
  [
    "a dimension with a fraction",
    file(`{"a":${entry("F32", [1.5], [0, 6])}}`, 6),
    `tensor "a" must have a shape of whole numbers, got [1.5]. ${DAMAGED}`,
  ],
  [
    "a dimension that is no exact number",
    file(`{"a":{"dtype":"U8","shape":[9007199254740993],"data_offsets":[0,1]}}`, 1),
    `tensor "a" must have a shape of whole numbers, got [9007199254740992]. ${DAMAGED}`,
  ],
  [
    "three offsets",
    file(`{"a":${entry("F32", [1], [0, 4, 8])}}`, 8),
    `tensor "a" must have two whole numbers as data_offsets, got [0,4,8]. ${DAMAGED}`,
  ],
  [
    "offsets that go backwards",
    file(`{"a":${entry("F32", [1], [4, 0])}}`, 4),
    `tensor "a" must lie within the 4 bytes of data, got [4,0]. ${DAMAGED}`,
  ],
  [
    "a tensor that ends after the file",
    file(`{"a":${entry("F32", [2], [0, 8])}}`, 7),
    `tensor "a" must lie within the 7 bytes of data, got [0,8]. ${DAMAGED}`,
  ],
  [
    "a shape that is larger than its bytes",
    file(`{"a":${entry("F32", [3], [0, 8])}}`, 8),
    `tensor "a" must have the bytes of F32 [3], 12, got 8. ${DAMAGED}`,
  ],
  [
    "a shape whose product overflows to its bytes",
    file(`{"a":${entry("U8", [2 ** 32, 2 ** 32], [0, 0])}}`),
    `tensor "a" must have the bytes of U8 [4294967296,4294967296], more than can be counted, got 0. ${DAMAGED}`,
  ],
  [
    "a first tensor that does not start at 0",
    file(`{"a":${entry("F32", [1], [4, 8])}}`, 8),
    `tensor "a" must start where the one before it ends, at byte 62, got 66 (a hole). ${DAMAGED}`,
  ],
  [
    "a hole",
    file(`{"a":${entry("U8", [1], [0, 1])},"b":${entry("U8", [1], [2, 3])}}`, 3),
    `tensor "b" must start where the one before it ends, at byte 114, got 115 (a hole). ${DAMAGED}`,
  ],
  [
    "an overlap",
    file(`{"a":${entry("U8", [2], [0, 2])},"b":${entry("U8", [2], [1, 3])}}`, 3),
    `tensor "b" must start where the one before it ends, at byte 115, got 114 (an overlap). ${DAMAGED}`,
  ],
  [
    "two names for the same bytes",
    file(`{"a":${entry("U8", [2], [0, 2])},"b":${entry("U8", [2], [0, 2])}}`, 2),
    `tensor "b" must start where the one before it ends, at byte 115, got 113 (an overlap). ${DAMAGED}`,
  ],
  [
    "bytes after the last tensor",
    file(`{${f32}}`, 9),
    `the file must end with its last tensor, at byte 70, got 71 bytes. ${DAMAGED}`,
  ],
])("a file with %s is refused", async (_, bytes, message) => {
  const opened = openSafetensors(memorySource(bytes), "w.safetensors");
  await expect(opened).rejects.toThrow(new FormatError(`w.safetensors: ${message}`));
});

test("a header that is not JSON is refused with the beginning of it", async () => {
  await expect(openSafetensors(memorySource(file("{nonsense")), "w.safetensors")).rejects.toThrow(
    /^w\.safetensors: the header: must be JSON, got "\{nonsense" \(.+\)$/,
  );
});

test("names that every object has, or that set a prototype, are names like others", async () => {
  const names = ["__proto__", "constructor", "toString"];
  const header = `{"__metadata__":{"__proto__":"p"},${names.map((n, i) => `"${n}":${entry("U8", [1], [i, i + 1])}`)}}`;
  const opened = await openSafetensors(memorySource(file(header, Uint8Array.of(7, 8, 9))), "w.safetensors");
  expect([...opened.tensors.keys()]).toEqual(names);
  expect([...opened.metadata]).toEqual([["__proto__", "p"]]);
  expect(await opened.read("__proto__")).toEqual(Uint8Array.of(7));
  expect(({} as Record<string, unknown>).dtype).toBeUndefined();
  await expect(opened.read("valueOf")).rejects.toThrow(
    new FormatError(
      'w.safetensors: there must be a tensor "valueOf", got 3 others. It has __proto__, constructor, toString',
    ),
  );
});

test("nothing of a declared size is read before the header is checked", async () => {
  const sizes: number[] = [];
  const bytes = file(`{"a":${entry("U8", [2 ** 40], [0, 2 ** 40])}}`, 10);
  const inner = memorySource(bytes);
  const source = {
    sizeBytes: bytes.length,
    read(offset: number, length: number) {
      sizes.push(length);
      return inner.read(offset, length);
    },
  };
  await expect(openSafetensors(source, "w")).rejects.toThrow(FormatError);
  expect(Math.max(...sizes)).toBeLessThan(bytes.length);
});

test("a tensor can be read in pieces", async () => {
  const data = Uint8Array.from({ length: 10 }, (_, i) => i);
  const opened = await openSafetensors(memorySource(file(`{"a":${entry("U8", [10], [0, 10])}}`, data)), "w");
  const pieces: number[] = [];
  for await (const piece of opened.readPieces("a", 4)) pieces.push(piece.length);
  expect(pieces).toEqual([4, 4, 2]);
  expect(await collect(opened.readPieces("a", 3))).toEqual(data);
});

const toWrite = (name: string, dtype: TensorToWrite["dtype"], shape: number[], data: Uint8Array): TensorToWrite => ({
  name,
  dtype,
  shape,
  sizeBytes: data.length,
  data: async () => data,
});

test("a written file is byte for byte what safetensors 0.8.0 for Python writes", async () => {
  const zeros = (n: number): Uint8Array => new Uint8Array(n);
  const bytes = await collect(
    encodeSafetensors(
      [
        toWrite("z", "F16", [2], zeros(4)),
        toWrite("b", "F32", [3], zeros(12)),
        toWrite("a", "I64", [1], zeros(8)),
        toWrite("y", "BF16", [2], zeros(4)),
        toWrite("c", "F64", [1], zeros(8)),
        toWrite("é", "F32", [1], zeros(4)),
        toWrite('e\u0001"\\', "F32", [0], zeros(0)),
      ],
      { z: "1", format: "pt" },
    ),
  );
  const header =
    '{"__metadata__":{"format":"pt","z":"1"},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"c":{"dtype":"F64","shape":[1],"data_offsets":[8,16]},"b":{"dtype":"F32","shape":[3],"data_offsets":[16,28]},"e\\u0001\\"\\\\":{"dtype":"F32","shape":[0],"data_offsets":[28,28]},"é":{"dtype":"F32","shape":[1],"data_offsets":[28,32]},"y":{"dtype":"BF16","shape":[2],"data_offsets":[32,36]},"z":{"dtype":"F16","shape":[2],"data_offsets":[36,40]}}      ';
  expect(bytes).toEqual(file(header, 40));
  expect(await collect(encodeSafetensors([]))).toEqual(file("{}      "));
});

test.skipIf(!hasShared)("an adapter that PEFT wrote, read and written again, is the same file", async () => {
  const path = shared("golden/stories260K-lora/final/adapter_model.safetensors");
  const opened = await openSafetensors(await fileSource(path), path);
  const again = await collect(
    encodeSafetensors(
      [...opened.tensors].map(([name, info]) => ({ name, ...info, data: () => opened.readPieces(name, 1000) })),
      Object.fromEntries(opened.metadata),
    ),
  );
  expect(Buffer.compare(again, await readFile(path))).toBe(0);
});

test.each<[what: string, tensors: TensorToWrite[], message: string]>([
  [
    "a size that is not the shape's",
    [toWrite("a", "F32", [2], new Uint8Array(4))],
    'safetensors: tensor "a" F32 [2] must have 8 bytes, got 4',
  ],
  [
    "a name twice",
    [toWrite("a", "U8", [0], new Uint8Array()), toWrite("a", "U8", [0], new Uint8Array())],
    'safetensors: a tensor needs a name of its own, got "a" again',
  ],
  [
    "the name of the metadata",
    [toWrite("__metadata__", "U8", [0], new Uint8Array())],
    'safetensors: a tensor needs a name of its own, got "__metadata__" again',
  ],
  [
    "data that is longer than promised",
    [{ ...toWrite("a", "U8", [2], new Uint8Array(2)), data: async () => new Uint8Array(3) }],
    'safetensors: tensor "a" must give its 2 bytes, got 3',
  ],
  [
    "data that is shorter than promised",
    [{ ...toWrite("a", "U8", [2], new Uint8Array(2)), data: async () => new Uint8Array(1) }],
    'safetensors: tensor "a" must give its 2 bytes, got 1',
  ],
])("the writer refuses %s", async (_, tensors, message) => {
  await expect(collect(encodeSafetensors(tensors))).rejects.toThrow(new FormatError(message));
});

const anyTensor = fc
  .record({
    name: fc.string({ unit: "binary" }).filter((name) => name !== "__metadata__"),
    dtype: fc.constantFrom<TensorToWrite["dtype"]>("F32", "F16", "BF16", "I64", "U8", "BOOL"),
    shape: fc.array(fc.nat(4), { maxLength: 3 }),
  })
  .chain(({ name, dtype, shape }) => {
    const width = { F32: 4, F16: 2, BF16: 2, I64: 8, U8: 1, BOOL: 1 }[dtype as "F32"];
    const n = shape.reduce((a, b) => a * b, width);
    return fc.uint8Array({ minLength: n, maxLength: n }).map((data) => toWrite(name, dtype, shape, data));
  });
const anyFile = fc.tuple(
  fc.uniqueArray(anyTensor, { maxLength: 5, selector: (t) => t.name }),
  fc.dictionary(fc.string({ unit: "binary" }), fc.string({ unit: "binary" }), { maxKeys: 3 }),
);

test("what is written is what is read", async () => {
  await fc.assert(
    fc.asyncProperty(anyFile, async ([tensors, metadata]) => {
      const bytes = await collect(encodeSafetensors(tensors, metadata));
      const opened = await openSafetensors(memorySource(bytes), "w");
      expect(Object.entries(metadata).sort()).toEqual([...opened.metadata].sort());
      expect(opened.tensors.size).toBe(tensors.length);
      for (const { name, dtype, shape, data } of tensors) {
        expect(opened.tensors.get(name)).toMatchObject({ dtype, shape });
        expect(await opened.read(name)).toEqual(await data());
      }
    }),
    { numRuns: 200 },
  );
});

test("a damaged file is read within its bytes or refused with a FormatError, and nothing else", async () => {
  const edit = fc.record({ at: fc.double({ min: 0, max: 1, noNaN: true }), byte: fc.nat(255), kind: fc.nat(2) });
  let refused = 0;
  await fc.assert(
    fc.asyncProperty(anyFile, fc.array(edit, { minLength: 1, maxLength: 3 }), async ([tensors, metadata], edits) => {
      let bytes = await collect(encodeSafetensors(tensors, metadata));
      for (const { at, byte, kind } of edits) {
        const i = Math.floor(at * bytes.length);
        const [before, after] = [bytes.subarray(0, i), bytes.subarray(kind === 0 ? i : i + 1)];
        bytes = new Uint8Array(Buffer.concat([before, kind === 1 ? new Uint8Array() : Uint8Array.of(byte), after]));
      }
      try {
        const opened = await openSafetensors(memorySource(bytes), "w");
        let end = 0;
        for (const [name, info] of opened.tensors) {
          expect((await opened.read(name)).length).toBe(info.sizeBytes);
          end = info.offset + info.sizeBytes;
        }
        if (opened.tensors.size > 0) expect(end).toBe(bytes.length);
      } catch (error) {
        expect(error).toBeInstanceOf(FormatError);
        refused++;
      }
    }),
    { numRuns: 400 },
  );
  expect(refused).toBeGreaterThan(100);
});
