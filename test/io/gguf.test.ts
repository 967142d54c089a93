import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { GGMLQuantizationType, gguf } from "@huggingface/gguf";
import fc from "fast-check";
import { afterAll, beforeAll, expect, test } from "vitest";
import { memorySource } from "../../src/io/bytes.ts";
import { decodeFloats, type FloatDtype } from "../../src/io/dtype.ts";
import { FormatError } from "../../src/io/errors.ts";
import { encodeGguf, type GgufEntry, isGguf, openGguf } from "../../src/io/gguf.ts";
import type { TensorToWrite } from "../../src/io/safetensors.ts";
import { collect } from "../collect.ts";
import { floatTensor } from "../tiny-model.ts";

let home = "";
beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-gguf-"));
});
afterAll(() => rm(home, { recursive: true, force: true }));

const METADATA: ReadonlyMap<string, GgufEntry> = new Map<string, GgufEntry>([
  ["general.architecture", { type: "string", value: "llama" }],
  ["a.u8", { type: "u8", value: 255 }],
  ["a.i8", { type: "i8", value: -128 }],
  ["a.u16", { type: "u16", value: 65535 }],
  ["a.i16", { type: "i16", value: -32768 }],
  ["a.u32", { type: "u32", value: 2 ** 32 - 1 }],
  ["a.i32", { type: "i32", value: -(2 ** 31) }],
  ["a.f32", { type: "f32", value: 0.5 }],
  ["a.f64", { type: "f64", value: 0.1 }],
  ["a.bool", { type: "bool", value: true }],
  ["a.u64", { type: "u64", value: 2n ** 64n - 1n }],
  ["a.i64", { type: "i64", value: -(2n ** 63n) }],
  ["a.string", { type: "string", value: "ΔW = B·A, 重み" }],
  ["a.strings", { type: "string", value: ["a", "", "重"] }],
  ["a.numbers", { type: "i32", value: [1, -2, 3] }],
  ["a.bools", { type: "bool", value: [true, false] }],
  ["a.nothing", { type: "u64", value: [] }],
]);
const VALUES = Float32Array.of(1, -2, 0.5, 4, 0, -0.25);
const TENSORS = [
  floatTensor("blk.0.attn_q.weight.lora_a", [2, 3], VALUES),
  floatTensor("half", [6], VALUES, "F16"),
  floatTensor("brain", [1, 2, 3, 1], VALUES, "BF16"),
];
const open = (bytes: Uint8Array, name = "x.gguf") => openGguf(memorySource(bytes), name);

/** A file by its numbers and texts, little-endian. */
const bytesOf = (...parts: readonly (string | number | bigint | Uint8Array)[]): Uint8Array =>
  Buffer.concat(
    parts.map((part) => {
      const view = new DataView(new ArrayBuffer(typeof part === "number" ? 4 : 8));
      if (typeof part === "string") return Buffer.from(part);
      if (typeof part === "number") view.setUint32(0, part, true);
      else if (typeof part === "bigint") view.setBigUint64(0, part, true);
      else return part;
      return new Uint8Array(view.buffer);
    }),
  );
const head = (tensors: bigint, entries: bigint): Uint8Array => bytesOf("GGUF", 3, tensors, entries);
const text = (value: string): Uint8Array => bytesOf(BigInt(Buffer.byteLength(value)), value);
const tensor = (name: string, shape: readonly bigint[], type: number, offset: bigint): Uint8Array =>
  bytesOf(text(name), shape.length, ...shape, type, offset);

test("what was written is read: every type of metadata, tensors of three types, shapes row-major, data aligned", async () => {
  const bytes = await collect(encodeGguf(METADATA, TENSORS));
  const file = await open(bytes);
  expect(await isGguf(memorySource(bytes))).toBe(true);
  expect([...file.metadata]).toEqual([...METADATA]);
  expect([...file.tensors.keys()]).toEqual(TENSORS.map(({ name }) => name));
  for (const { name, dtype, shape } of TENSORS) {
    const found = file.tensors.get(name);
    expect(found).toMatchObject({ dtype, shape });
    expect(decodeFloats(dtype as FloatDtype, (await found?.read()) ?? new Uint8Array())).toEqual(VALUES);
  }
  expect(bytes.length % 32).toBe(0);
});

test("the alignment that the metadata ask for is that of the data", async () => {
  const metadata = new Map<string, GgufEntry>([["general.alignment", { type: "u32", value: 8 }]]);
  const [a, b] = await Promise.all([encodeGguf(metadata, TENSORS), encodeGguf(new Map(), TENSORS)].map(collect));
  expect(a?.length).toBeLessThan(b?.length ?? 0);
  expect(
    decodeFloats("F16", (await (await open(a ?? new Uint8Array())).tensors.get("half")?.read()) as Uint8Array),
  ).toEqual(VALUES);
});

test("another reader, @huggingface/gguf, finds the same", async () => {
  const path = join(home, "theirs.gguf");
  await writeFile(path, encodeGguf(METADATA, TENSORS));
  const { metadata, tensorInfos, tensorDataOffset } = await gguf(path, { allowLocalFile: true });
  for (const [key, { value }] of METADATA) expect((metadata as Record<string, unknown>)[key], key).toEqual(value);
  expect(metadata).toMatchObject({ version: 3, tensor_count: 3n, kv_count: BigInt(METADATA.size) });
  expect(tensorInfos.map(({ name, shape, dtype, offset }) => [name, shape, dtype, offset])).toEqual([
    ["blk.0.attn_q.weight.lora_a", [3n, 2n], GGMLQuantizationType.F32, 0n],
    ["half", [6n], GGMLQuantizationType.F16, 32n],
    ["brain", [1n, 3n, 2n, 1n], GGMLQuantizationType.BF16, 64n],
  ]);
  expect(Number(tensorDataOffset) % 32).toBe(0);
});

const DAMAGED = "The file is damaged: get it again";
const one = (info: Uint8Array, data = 0): Uint8Array => {
  const start = bytesOf(head(1n, 0n), info);
  return bytesOf(start, new Uint8Array(Math.ceil(start.length / 32) * 32 - start.length + data));
};
const entry = (type: number, ...value: readonly (string | number | bigint | Uint8Array)[]): Uint8Array =>
  bytesOf(head(0n, 1n), text("k"), type, ...value);

test.each<[what: string, bytes: Uint8Array, message: string]>([
  ["an empty file", new Uint8Array(), 'the file must begin with "GGUF", got something else. It is no GGUF file'],
  ["other magic", bytesOf("GGML", 3), 'the file must begin with "GGUF", got something else. It is no GGUF file'],
  ["no version", bytesOf("GGUF"), `version must lie within the 0 bytes that are left, got 4. ${DAMAGED}`],
  ["version 1", bytesOf("GGUF", 1), "the version must be 2 or 3, little-endian, got 1. Convert the model again"],
  [
    "big-endian numbers",
    bytesOf("GGUF", 3 * 2 ** 24),
    "the version must be 2 or 3, little-endian, got 50331648. Convert the model again",
  ],
  [
    "more tensors than fit",
    bytesOf(head(2n ** 63n, 0n)),
    `number of tensors must be at most the 0 that fit, got 9223372036854776000. ${DAMAGED}`,
  ],
  [
    "more metadata than fit",
    bytesOf(head(0n, 3n), new Uint8Array(26)),
    `number of metadata entries must be at most the 2 that fit, got 3. ${DAMAGED}`,
  ],
  [
    "a key longer than the file",
    bytesOf(head(0n, 1n), 2n ** 40n, new Uint8Array(16)),
    `length of a metadata key must be at most the 16 that fit, got 1099511627776. ${DAMAGED}`,
  ],
  ["a type that is none", entry(13, 0n), `type of metadata "k" must be 0 to 12, got 13. ${DAMAGED}`],
  ["half a number", entry(5, "abc"), `metadata "k" must lie within the 3 bytes that are left, got 4. ${DAMAGED}`],
  ["a truth that is neither", entry(7, Uint8Array.of(2, 0, 0, 0)), `metadata "k" must be 0 or 1, got 2. ${DAMAGED}`],
  [
    "a string that is not UTF-8",
    entry(8, 2n, Uint8Array.of(0xff, 0xfe)),
    'metadata "k": must be UTF-8 text, got bytes that are not. Save it as UTF-8',
  ],
  [
    "an array of arrays",
    entry(9, 9, 4, 0n),
    'metadata "k" must be an array of values, got one of arrays. It is not supported',
  ],
  [
    "an array longer than the file",
    entry(9, 10, 5n, new Uint8Array(32)),
    `length of metadata "k" must be at most the 4 that fit, got 5. ${DAMAGED}`,
  ],
  [
    "the same key twice",
    bytesOf(head(0n, 2n), text("k"), 4, 1, text("k"), 4, 2),
    `a metadata key must be there once, got "k" again. ${DAMAGED}`,
  ],
  [
    "an alignment that is none",
    bytesOf(head(0n, 1n), text("general.alignment"), 4, 24),
    '"general.alignment" must be a power of two, from 8 on, got 24',
  ],
  [
    "an alignment that is a word",
    bytesOf(head(0n, 1n), text("general.alignment"), 8, text("x")),
    '"general.alignment" must be a power of two, from 8 on, got NaN',
  ],
  [
    "a tensor without dimensions",
    one(tensor("t", [], 0, 0n), 9),
    `tensor "t" must have 1 to 4 dimensions, got 0. ${DAMAGED}`,
  ],
  [
    "a tensor of five dimensions",
    one(tensor("t", [1n, 1n, 1n, 1n, 1n], 0, 0n)),
    `tensor "t" must have 1 to 4 dimensions, got 5. ${DAMAGED}`,
  ],
  [
    "a quantised tensor",
    one(tensor("t", [32n], 8, 0n), 34),
    'tensor "t" must be F32, F16 or BF16, got type 8. Convert it without quantising',
  ],
  [
    "a size that overflows",
    one(tensor("t", [2n ** 32n, 2n ** 32n], 0, 0n)),
    `tensor "t" must have a size that can be counted, got [4294967296,4294967296]. ${DAMAGED}`,
  ],
  [
    "a tensor that ends after the file",
    one(tensor("t", [4n], 0, 0n), 15),
    `tensor "t" must lie within the 79 bytes of the file, got 16 from 64 on. ${DAMAGED}`,
  ],
  [
    "an offset that is not aligned",
    one(tensor("t", [4n], 0, 4n), 64),
    `tensor "t" must start at byte 0 of the data, aligned, got 4. ${DAMAGED}`,
  ],
  [
    "an offset outside the file",
    one(tensor("t", [4n], 0, 2n ** 50n), 64),
    `tensor "t" must start at byte 0 of the data, aligned, got 1125899906842624. ${DAMAGED}`,
  ],
  [
    "tensors that overlap",
    bytesOf(head(2n, 0n), tensor("a", [4n], 0, 0n), tensor("b", [4n], 0, 0n), new Uint8Array(99)),
    `tensor "b" must start at byte 32 of the data, aligned, got 0. ${DAMAGED}`,
  ],
  [
    "the same tensor twice",
    bytesOf(head(2n, 0n), tensor("a", [4n], 0, 0n), tensor("a", [4n], 0, 32n), new Uint8Array(99)),
    `a tensor's name must be there once, got "a" again. ${DAMAGED}`,
  ],
])("%s is refused", async (_, bytes, message) => {
  await expect(open(bytes)).rejects.toThrow(new FormatError(`x.gguf: ${message}`));
});

test("a file that ends anywhere early is a FormatError, never something else", async () => {
  const bytes = await collect(encodeGguf(METADATA, TENSORS));
  const { tensors } = await open(bytes);
  for (let length = 0; length < bytes.length - 32; length++)
    await expect(open(bytes.subarray(0, length)), `${length}`).rejects.toBeInstanceOf(FormatError);
  expect(tensors.size).toBe(3);
});

test("bytes changed at random are a FormatError or a file, never something else", async () => {
  const bytes = await collect(encodeGguf(METADATA, TENSORS));
  const change = fc.tuple(fc.nat(bytes.length - 1), fc.nat(255));
  await fc.assert(
    fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 8 }), async (changes) => {
      const changed = Uint8Array.from(bytes);
      for (const [at, value] of changes) changed[at] = value;
      const error = await open(changed).then(
        () => undefined,
        (reason: unknown) => reason,
      );
      expect(error === undefined || error instanceof FormatError).toBe(true);
    }),
    { numRuns: 300 },
  );
});

test("a header longer than what is read at a time is read", async () => {
  const long = Array.from({ length: 40_000 }, (_, i) => `token ${i} ${"x".repeat(40)}`);
  const metadata = new Map<string, GgufEntry>([["tokens", { type: "string", value: long }]]);
  const bytes = await collect(encodeGguf(metadata, TENSORS));
  expect(bytes.length).toBeGreaterThan(2 ** 21);
  expect((await open(bytes)).metadata.get("tokens")?.value).toEqual(long);
});

const write = (entries: readonly [string, GgufEntry][], tensors: readonly TensorToWrite[]) =>
  collect(encodeGguf(new Map(entries), tensors));
const [first] = TENSORS as [TensorToWrite];

test.each<[what: string, entries: [string, GgufEntry][], tensors: TensorToWrite[], message: string]>([
  ["a negative u32", [["k", { type: "u32", value: -1 }]], [], 'gguf: metadata "k" must fit into u32, got -1'],
  ["a fraction in an i8", [["k", { type: "i8", value: [1, 0.5] }]], [], 'gguf: metadata "k" must fit into i8, got 0.5'],
  [
    "a u64 of 65 bits",
    [["k", { type: "u64", value: 2n ** 64n }]],
    [],
    'gguf: metadata "k" must fit into u64, got 18446744073709551616',
  ],
  [
    "an alignment that is none",
    [["general.alignment", { type: "u32", value: 4 }]],
    [],
    'gguf: "general.alignment" must be a power of two, from 8 on, got 4',
  ],
  [
    "the same tensor twice",
    [],
    [first, first],
    'gguf: a tensor needs a name of its own, got "blk.0.attn_q.weight.lora_a" again',
  ],
  [
    "a tensor of integers",
    [],
    [{ ...first, dtype: "I32" }],
    'gguf: tensor "blk.0.attn_q.weight.lora_a" must be F32, F16 or BF16, got I32',
  ],
  [
    "a tensor that gives too little",
    [],
    [{ ...first, data: async () => new Uint8Array(4) }],
    'gguf: tensor "blk.0.attn_q.weight.lora_a" must give its 24 bytes, got 4',
  ],
])("%s is not written", async (_, entries, tensors, message) => {
  await expect(write(entries, tensors)).rejects.toThrow(new FormatError(message));
});
