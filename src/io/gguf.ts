/**
 * The GGUF format of llama.cpp, versions 2 and 3, little-endian: typed metadata, then what there is of tensors, then their bytes, each
 * aligned. The reader checks everything that a header declares before it allocates anything of a declared size.
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
 */
import type { ByteSource } from "./bytes.ts";
import type { FloatDtype } from "./dtype.ts";
import { FormatError } from "./errors.ts";
import { excerpt, utf8 } from "./json.ts";
import { type TensorToWrite, tensorBytes } from "./safetensors.ts";

/** A value, or an array of values of one type; 64-bit integers are bigints. */
export type GgufEntry =
  | { readonly type: "string"; readonly value: string | readonly string[] }
  | { readonly type: "bool"; readonly value: boolean | readonly boolean[] }
  | { readonly type: "u64" | "i64"; readonly value: bigint | readonly bigint[] }
  | { readonly type: NumberType; readonly value: number | readonly number[] };
type NumberType = "u8" | "i8" | "u16" | "i16" | "u32" | "i32" | "f32" | "f64";
type Scalar = string | boolean | bigint | number;

export interface GgufTensor {
  readonly dtype: FloatDtype;
  /** Row-major, as everywhere: the file has it the other way around. */
  readonly shape: readonly number[];
  readonly sizeBytes: number;
  read(): Promise<Uint8Array>;
}

export interface GgufFile {
  readonly metadata: ReadonlyMap<string, GgufEntry>;
  /** In the order of the file. */
  readonly tensors: ReadonlyMap<string, GgufTensor>;
}

/** By their numbers in the file. */
const TYPES = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"] as const;
/** What DataView calls the numbers. */
const KINDS = {
  ...({ u8: "Uint8", i8: "Int8", u16: "Uint16", i16: "Int16", u32: "Uint32", i32: "Int32" } as const),
  ...({ u64: "BigUint64", i64: "BigInt64", f32: "Float32", f64: "Float64", bool: "Uint8" } as const),
};
const DTYPES: Readonly<Record<string, number>> = { F32: 0, F16: 1, BF16: 30 } satisfies Record<FloatDtype, number>;
const FLOATS = Object.keys(DTYPES) as readonly FloatDtype[];

/** More than the vocabulary of any model. */
const HEADER_LIMIT_BYTES = 100e6;
const WINDOW_BYTES = 2 ** 20;

/** Goes through a header that may be cut short anywhere. */
class Cursor {
  at = 0;
  readonly #source: ByteSource;
  readonly #name: string;
  #window = new Uint8Array();
  #start = 0;

  constructor(source: ByteSource, name: string) {
    this.#source = source;
    this.#name = name;
  }

  get left(): number {
    return Math.min(this.#source.sizeBytes, HEADER_LIMIT_BYTES) - this.at;
  }

  fail(rule: string, got: unknown, wayOut = "The file is damaged: get it again"): never {
    throw new FormatError(`${this.#name}: ${rule}, got ${got}. ${wayOut}`);
  }

  async take(length: number, what: string): Promise<DataView> {
    if (length > this.left) this.fail(`${what} must lie within the ${this.left} bytes that are left`, length);
    if (this.at + length > this.#start + this.#window.length) {
      const bytes = await this.#source.read(this.at, Math.min(this.left, Math.max(length, WINDOW_BYTES)));
      [this.#window, this.#start] = [new Uint8Array(bytes), this.at];
    }
    const view = new DataView(this.#window.buffer, this.at - this.#start, length);
    this.at += length;
    return view;
  }

  async number(type: keyof typeof KINDS, what: string): Promise<number | bigint> {
    return (await this.take(bytesOf(type), what))[`get${KINDS[type]}`](0, true);
  }

  /** So many things of at least `bytes` bytes. */
  async count(what: string, bytes: number): Promise<number> {
    const n = Number(await this.number("u64", what));
    if (n * bytes > this.left) this.fail(`${what} must be at most the ${Math.floor(this.left / bytes)} that fit`, n);
    return n;
  }

  async string(what: string): Promise<string> {
    const { buffer, byteOffset, byteLength } = await this.take(await this.count(`length of ${what}`, 1), what);
    return utf8(new Uint8Array(buffer, byteOffset, byteLength), `${this.#name}: ${what}`);
  }

  async scalar(type: GgufEntry["type"], what: string): Promise<Scalar> {
    if (type === "string") return this.string(what);
    const value = await this.number(type, what);
    if (type !== "bool") return value;
    return value === 0 || value === 1 ? value === 1 : this.fail(`${what} must be 0 or 1`, value);
  }

  async entry(what: string, isElement = false): Promise<GgufEntry> {
    const n = Number(await this.number("u32", `type of ${what}`));
    const type = TYPES[n] ?? this.fail(`type of ${what} must be 0 to ${TYPES.length - 1}`, n);
    if (type !== "array") return { type, value: isElement ? [] : await this.scalar(type, what) } as GgufEntry;
    if (isElement) this.fail(`${what} must be an array of values`, "one of arrays", "It is not supported");
    const array = await this.entry(what, true);
    const length = await this.count(`length of ${what}`, bytesOf(array.type));
    const value: Scalar[] = [];
    for (let i = 0; i < length; i++) value.push(await this.scalar(array.type, what));
    return { ...array, value } as GgufEntry;
  }
}

/** At least, for strings. */
const bytesOf = (type: GgufEntry["type"]): number => (type === "string" ? 8 : Number(/\d+/.exec(KINDS[type])?.[0]) / 8);

/** Reads and checks the header; tensors are read when asked for. Throws a FormatError that names file, rule and value. */
export async function openGguf(source: ByteSource, fileName: string): Promise<GgufFile> {
  const cursor = new Cursor(source, fileName);
  if (!(await isGguf(source))) cursor.fail('the file must begin with "GGUF"', "something else", "It is no GGUF file");
  cursor.at = 4;
  const version = Number(await cursor.number("u32", "version"));
  if (version !== 2 && version !== 3)
    cursor.fail("the version must be 2 or 3, little-endian", version, "Convert the model again");
  const tensorCount = await cursor.count("number of tensors", 24);
  const entryCount = await cursor.count("number of metadata entries", 13);

  const metadata = new Map<string, GgufEntry>();
  for (let i = 0; i < entryCount; i++) {
    const key = await cursor.string("a metadata key");
    if (metadata.has(key)) cursor.fail("a metadata key must be there once", `${quote(key)} again`);
    metadata.set(key, await cursor.entry(`metadata ${quote(key)}`));
  }
  const alignment = alignmentOf(metadata, fileName);
  const infos = new Map<string, { dtype: FloatDtype; shape: number[]; sizeBytes: number; offset: number }>();
  let end = 0;
  for (let i = 0; i < tensorCount; i++) {
    const name = await cursor.string("a tensor's name");
    const what = `tensor ${quote(name)}`;
    if (infos.has(name)) cursor.fail("a tensor's name must be there once", `${quote(name)} again`);
    const rank = Number(await cursor.number("u32", `${what}: number of dimensions`));
    if (rank < 1 || rank > 4) cursor.fail(`${what} must have 1 to 4 dimensions`, rank);
    const shape: number[] = [];
    for (let d = 0; d < rank; d++) shape.unshift(Number(await cursor.number("u64", `${what}: a dimension`)));
    const number = await cursor.number("u32", `${what}: type`);
    const dtype =
      FLOATS.find((float) => DTYPES[float] === number) ??
      cursor.fail(`${what} must be F32, F16 or BF16`, `type ${number}`, "Convert it without quantising");
    const sizeBytes = shape.reduce((bytes, n) => bytes * n, dtype === "F32" ? 4 : 2);
    if (!Number.isSafeInteger(sizeBytes)) cursor.fail(`${what} must have a size that can be counted`, `[${shape}]`);
    const offset = Number(await cursor.number("u64", `${what}: offset`));
    if (offset !== end) cursor.fail(`${what} must start at byte ${end} of the data, aligned`, offset);
    end = roundUp(offset + sizeBytes, alignment);
    infos.set(name, { dtype, shape, sizeBytes, offset });
  }
  const start = roundUp(cursor.at, alignment);
  const tensors = [...infos].map(([name, { offset, ...info }]): [string, GgufTensor] => {
    const { sizeBytes } = info;
    if (start + offset + sizeBytes > source.sizeBytes)
      cursor.fail(
        `tensor ${quote(name)} must lie within the ${source.sizeBytes} bytes of the file`,
        `${sizeBytes} from ${start + offset} on`,
      );
    return [name, { ...info, read: () => source.read(start + offset, sizeBytes) }];
  });
  return { metadata, tensors: new Map(tensors) };
}

/** Whether the first bytes say that it is one. */
export async function isGguf(source: ByteSource): Promise<boolean> {
  return source.sizeBytes >= 4 && String.fromCharCode(...(await source.read(0, 4))) === "GGUF";
}

/**
 * The file of version 3 piece by piece, tensors in the order given. `general.alignment` counts where it is given. Throws a FormatError for
 * values out of the range of their type, for tensors of other types than F32, F16 and BF16, and for names that come twice.
 */
export async function* encodeGguf(
  metadata: ReadonlyMap<string, GgufEntry>,
  tensors: readonly TensorToWrite[],
): AsyncGenerator<Uint8Array> {
  const alignment = alignmentOf(metadata, "gguf");
  const parts: Uint8Array[] = [new TextEncoder().encode("GGUF")];
  const put = (type: GgufEntry["type"], value: Scalar, what = "a count"): void => {
    if (type !== "string") return void parts.push(encodeNumber(type, value, what));
    const text = new TextEncoder().encode(String(value));
    parts.push(encodeNumber("u64", BigInt(text.length), what), text);
  };
  put("u32", 3);
  put("u64", BigInt(tensors.length));
  put("u64", BigInt(metadata.size));
  for (const [key, { type, value }] of metadata) {
    put("string", key);
    const what = `metadata ${quote(key)}`;
    if (Array.isArray(value)) {
      put("u32", TYPES.indexOf("array"));
      put("u32", TYPES.indexOf(type));
      put("u64", BigInt(value.length));
    } else put("u32", TYPES.indexOf(type));
    for (const one of Array.isArray(value) ? value : [value]) put(type, one as Scalar, what);
  }
  const names = new Set<string>();
  let end = 0;
  for (const { name, dtype, shape, sizeBytes } of tensors) {
    const type = DTYPES[dtype];
    if (type === undefined) throw new FormatError(`gguf: tensor ${quote(name)} must be F32, F16 or BF16, got ${dtype}`);
    if (names.has(name)) throw new FormatError(`gguf: a tensor needs a name of its own, got ${quote(name)} again`);
    names.add(name);
    put("string", name);
    put("u32", shape.length);
    for (const n of shape.toReversed()) put("u64", BigInt(n));
    put("u32", type);
    put("u64", BigInt(end));
    end = roundUp(end + sizeBytes, alignment);
  }
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  yield* parts;
  yield new Uint8Array(roundUp(length, alignment) - length);
  for (const tensor of tensors) {
    yield* tensorBytes(tensor, "gguf");
    yield new Uint8Array(roundUp(tensor.sizeBytes, alignment) - tensor.sizeBytes);
  }
}

function alignmentOf(metadata: ReadonlyMap<string, GgufEntry>, name: string): number {
  const alignment = Number(metadata.get("general.alignment")?.value ?? 32);
  if (alignment >= 8 && Number.isInteger(Math.log2(alignment))) return alignment;
  throw new FormatError(`${name}: "general.alignment" must be a power of two, from 8 on, got ${alignment}`);
}

function encodeNumber(type: Exclude<GgufEntry["type"], "string">, value: Scalar, what: string): Uint8Array {
  const view = new DataView(new ArrayBuffer(bytesOf(type)));
  const number = typeof value === "boolean" ? Number(value) : value;
  view[`set${KINDS[type]}`](0, number as never, true);
  if (view[`get${KINDS[type]}`](0, true) !== number && !/^f/.test(type))
    throw new FormatError(`gguf: ${what} must fit into ${type}, got ${value}`);
  return new Uint8Array(view.buffer);
}

const roundUp = (n: number, step: number): number => Math.ceil(n / step) * step;
const quote = (name: string): string => JSON.stringify(excerpt(name));
