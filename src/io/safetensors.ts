/**
 * The safetensors format: an 8-byte little-endian header length, a JSON header, then the tensors without a gap.
 * The reader checks everything that a header declares before it allocates anything of a declared size.
 * https://github.com/huggingface/safetensors#format
 */
import type { ByteSource } from "./bytes.ts";
import { FormatError } from "./errors.ts";
import { duplicateKey, excerpt, isObject, parseJsonObject, utf8 } from "./json.ts";

/** In upstream's order: its files hold the tensors of the last type first. */
const DTYPES = [
  "F4",
  "F6_E2M3",
  "F6_E3M2",
  "BOOL",
  "U8",
  "I8",
  "F8_E5M2",
  "F8_E4M3",
  "F8_E8M0",
  "I16",
  "U16",
  "F16",
  "BF16",
  "I32",
  "U32",
  "F32",
  "C64",
  "F64",
  "I64",
  "U64",
] as const;
export type Dtype = (typeof DTYPES)[number];

const HEADER_LIMIT_BYTES = 25e6;

export interface TensorInfo {
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  /** From the start of the file. */
  readonly offset: number;
  readonly sizeBytes: number;
}

export interface SafetensorsFile {
  readonly metadata: ReadonlyMap<string, string>;
  /** In the order of the file. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** The bytes of one tensor. Throws a FormatError if the file has no such tensor. */
  read(name: string): Promise<Uint8Array>;
  /** The same in pieces, so that a large tensor never lies in memory whole; or some of its bytes. */
  readPieces(name: string, pieceBytes?: number, from?: number, to?: number): AsyncIterable<Uint8Array>;
}

/** Reads and checks the header; tensors are read when asked for. Throws a FormatError that names file, rule and value. */
export async function openSafetensors(source: ByteSource, fileName: string): Promise<SafetensorsFile> {
  const fail = (rule: string, got: string, wayOut = "The file is damaged: get it again"): never => {
    throw new FormatError(`${fileName}: ${rule}, got ${got}. ${wayOut}`);
  };
  const { sizeBytes } = source;
  if (sizeBytes < 8) fail("a safetensors file must have at least 8 bytes", `${sizeBytes}`);
  const prefix = await source.read(0, 8);
  const declared = new DataView(prefix.buffer, prefix.byteOffset, 8).getBigUint64(0, true);
  if (declared > HEADER_LIMIT_BYTES)
    fail(`the header must be at most ${HEADER_LIMIT_BYTES} bytes`, `${declared}`, "This is not a safetensors file");
  const headerBytes = Number(declared);
  if (headerBytes > sizeBytes - 8)
    fail("the header must fit into the file", `a header of ${headerBytes} bytes in a file of ${sizeBytes}`);
  const raw = await source.read(8, headerBytes);
  if (raw[0] !== 0x7b)
    fail(
      'the header must start with "{"',
      raw.length ? `byte ${raw[0]}` : "no header",
      "This is not a safetensors file",
    );
  const text = utf8(raw, `${fileName}: the header`);
  const header = parseJsonObject(text, `${fileName}: the header`);
  const duplicate = duplicateKey(text);
  if (duplicate !== undefined) fail("a name must not occur twice in the header", quote(duplicate));

  const given = header.__metadata__ ?? {};
  if (!isObject(given) || Object.values(given).some((value) => typeof value !== "string"))
    fail("__metadata__ must map strings to strings", show(given));
  const metadata = new Map(Object.entries(given as Record<string, string>));

  const found: { name: string; info: TensorInfo }[] = [];
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const tensor = `tensor ${quote(name)}`;
    const { dtype, shape, data_offsets: span } = isObject(entry) ? entry : {};
    if (!isDtype(dtype)) return fail(`${tensor} must have a dtype of ${DTYPES.join(" ")}`, show(dtype));
    if (!isSizes(shape)) return fail(`${tensor} must have a shape of whole numbers`, show(shape));
    if (!isSizes(span) || span.length !== 2)
      return fail(`${tensor} must have two whole numbers as data_offsets`, show(span));
    const [begin = 0, end = 0] = span;
    if (begin > end || end > sizeBytes - 8 - headerBytes)
      fail(`${tensor} must lie within the ${sizeBytes - 8 - headerBytes} bytes of data`, `[${span}]`);
    const expected = byteLength(dtype, shape);
    if (expected !== end - begin)
      fail(
        `${tensor} must have the bytes of ${dtype} [${shape}], ${expected ?? "more than can be counted"}`,
        `${end - begin}`,
      );
    found.push({ name, info: { dtype, shape, offset: 8 + headerBytes + begin, sizeBytes: end - begin } });
  }

  found.sort((a, b) => a.info.offset - b.info.offset || a.info.sizeBytes - b.info.sizeBytes);
  let position = 8 + headerBytes;
  for (const { name, info } of found) {
    if (info.offset !== position)
      fail(
        `tensor ${quote(name)} must start where the one before it ends, at byte ${position}`,
        `${info.offset} (${info.offset < position ? "an overlap" : "a hole"})`,
      );
    position += info.sizeBytes;
  }
  if (position !== sizeBytes) fail(`the file must end with its last tensor, at byte ${position}`, `${sizeBytes} bytes`);

  const tensors = new Map(found.map(({ name, info }) => [name, info]));
  const find = (name: string): TensorInfo =>
    tensors.get(name) ??
    fail(
      `there must be a tensor ${quote(name)}`,
      `${tensors.size} others`,
      `It has ${excerpt([...tensors.keys()].join(", "))}`,
    );
  return {
    metadata,
    tensors,
    async read(name) {
      const { offset, sizeBytes: length } = find(name);
      return source.read(offset, length);
    },
    async *readPieces(name, pieceBytes = 64 * 2 ** 20, from = 0, to = find(name).sizeBytes) {
      const { offset } = find(name);
      for (let at = from; at < to; at += pieceBytes) yield source.read(offset + at, Math.min(pieceBytes, to - at));
    },
  };
}

/** A tensor to write. `data` is called once, when its turn comes, and must give exactly `sizeBytes` bytes. */
export interface TensorToWrite {
  readonly name: string;
  readonly dtype: Dtype;
  readonly shape: readonly number[];
  readonly sizeBytes: number;
  readonly data: () => Promise<Uint8Array> | AsyncIterable<Uint8Array>;
}

/**
 * The file piece by piece, byte for byte what upstream writes: tensors by dtype (largest first), then name; metadata by
 * name; the header padded with spaces to 8 bytes. Holds one piece at a time. Throws a FormatError on a wrong size or name.
 */
export async function* encodeSafetensors(
  tensors: readonly TensorToWrite[],
  metadata: Readonly<Record<string, string>> = {},
): AsyncGenerator<Uint8Array> {
  const sorted = tensors.toSorted(
    (a, b) => DTYPES.indexOf(b.dtype) - DTYPES.indexOf(a.dtype) || compare(a.name, b.name),
  );
  const entries: string[] = [];
  const add = (name: string, value: unknown): number =>
    entries.push(`${JSON.stringify(name)}:${JSON.stringify(value)}`);
  const notes = Object.entries(metadata).sort(([a], [b]) => compare(a, b));
  if (notes.length > 0)
    entries.push(`"__metadata__":{${notes.map((note) => note.map((s) => JSON.stringify(s)).join(":")).join()}}`);
  const names = new Set(["__metadata__"]);
  let position = 0;
  for (const { name, dtype, shape, sizeBytes } of sorted) {
    if (names.has(name))
      throw new FormatError(`safetensors: a tensor needs a name of its own, got ${quote(name)} again`);
    names.add(name);
    const expected = byteLength(dtype, shape);
    if (expected !== sizeBytes)
      throw new FormatError(
        `safetensors: tensor ${quote(name)} ${dtype} [${shape}] must have ${expected} bytes, got ${sizeBytes}`,
      );
    add(name, { dtype, shape, data_offsets: [position, position + sizeBytes] });
    position += sizeBytes;
  }
  const header = new TextEncoder().encode(`{${entries.join()}}`);
  const padded = Math.ceil(header.length / 8) * 8;
  if (padded > HEADER_LIMIT_BYTES)
    throw new FormatError(`safetensors: the header must be at most ${HEADER_LIMIT_BYTES} bytes, got ${padded}`);
  const start = new Uint8Array(8 + padded).fill(0x20);
  new DataView(start.buffer).setBigUint64(0, BigInt(padded), true);
  start.set(header, 8);
  yield start;

  for (const tensor of sorted) yield* tensorBytes(tensor, "safetensors");
}

/** The bytes of a tensor, never more than it may have. Throws a FormatError if they are not so many. */
export async function* tensorBytes(
  { name, sizeBytes, data }: TensorToWrite,
  format: string,
): AsyncGenerator<Uint8Array> {
  const given = data();
  let written = 0;
  for await (const piece of Symbol.asyncIterator in given ? given : [given]) {
    written += piece.byteLength;
    if (written <= sizeBytes) yield piece;
  }
  if (written !== sizeBytes)
    throw new FormatError(`${format}: tensor ${quote(name)} must give its ${sizeBytes} bytes, got ${written}`);
}

/** Undefined where the product cannot be counted exactly, or is not a whole number of bytes. */
function byteLength(dtype: Dtype, shape: readonly number[]): number | undefined {
  let bits = dtype === "BOOL" ? 8 : Number(/\d+/.exec(dtype)?.[0]); // F8_E4M3 has 8
  for (const n of shape) {
    bits *= n;
    if (!Number.isSafeInteger(bits)) return undefined;
  }
  return bits % 8 === 0 ? bits / 8 : undefined;
}

const isDtype = (value: unknown): value is Dtype => DTYPES.some((dtype) => dtype === value);
const isSizes = (value: unknown): value is number[] =>
  Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0);
const compare = (a: string, b: string): number => (a < b ? -1 : a > b ? 1 : 0);
const quote = (name: string): string => JSON.stringify(excerpt(name));
const show = (value: unknown): string => excerpt(JSON.stringify(value) ?? "none");
