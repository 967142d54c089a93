/** Text files of any size, line by line. */
import type { ByteSource } from "./bytes.ts";
import { FormatError } from "./errors.ts";

export interface Line {
  readonly text: string;
  /** From 1. */
  readonly number: number;
}

const CHUNK_BYTES = 2 ** 20;
const LONGEST_BYTES = 64 * 2 ** 20;
const NEWLINE = 10;

/** How files begin that are no UTF-8 text, and what to do about them. */
const SIGNATURES: readonly (readonly [bytes: readonly number[], what: string])[] = [
  [[0xff, 0xfe], "UTF-16. Save it as UTF-8"],
  [[0xfe, 0xff], "UTF-16. Save it as UTF-8"],
  [[0x1f, 0x8b], "a gzip file. Unpack it"],
  [[0x28, 0xb5, 0x2f, 0xfd], "a Zstandard file. Unpack it"],
  [[0x50, 0x4b, 0x03, 0x04], "a ZIP file. Unpack it"],
  [[0x50, 0x41, 0x52, 0x31], "a Parquet file. Name it .parquet"],
];

/** The lines without their ends, "\n" or "\r\n", and without a byte order mark. Throws a FormatError that names file and line. */
export async function* readLines(source: ByteSource, name: string): AsyncGenerator<Line, void, undefined> {
  let begun: Uint8Array[] = []; // pieces of a line whose end has not come
  let number = 0;
  for (let offset = 0; offset < source.sizeBytes; offset += CHUNK_BYTES) {
    const chunk = await source.read(offset, Math.min(CHUNK_BYTES, source.sizeBytes - offset));
    if (offset === 0) checkSignature(chunk, name);
    const isLast = offset + CHUNK_BYTES >= source.sizeBytes;
    const end = isLast ? chunk.length : chunk.lastIndexOf(NEWLINE) + 1;
    if (end === 0) {
      begun.push(chunk);
      if (begun.length * CHUNK_BYTES > LONGEST_BYTES)
        throw new FormatError(`${name}:${number + 1}: a line must have at most ${LONGEST_BYTES} bytes, got more`);
      continue;
    }
    const block = joined([...begun, chunk.subarray(0, end)]);
    begun = [chunk.subarray(end)];
    const lines = decode(block, name, number).split("\n");
    if (lines.at(-1) === "") lines.pop(); // what follows the last newline comes with the next block
    for (const text of lines) {
      const bare = number === 0 ? text.replace(/^\ufeff/, "") : text;
      yield { text: bare.endsWith("\r") ? bare.slice(0, -1) : bare, number: ++number };
    }
  }
}

function joined(pieces: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(pieces.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}

function checkSignature(bytes: Uint8Array, name: string): void {
  const found = SIGNATURES.find(([signature]) => signature.every((byte, i) => bytes[i] === byte));
  if (found) throw new FormatError(`${name}: must be UTF-8 text, got ${found[1]}`);
}

/** Whole lines as text; `before` is the number of lines before them. */
function decode(bytes: Uint8Array, name: string, before: number): string {
  const text = strictly(bytes);
  if (text !== undefined && !text.includes("\0")) return text;
  for (let begin = 0, line = before + 1; ; line++) {
    const newline = bytes.indexOf(NEWLINE, begin);
    const part = strictly(bytes.subarray(begin, newline < 0 ? bytes.length : newline));
    if (part === undefined)
      throw new FormatError(`${name}:${line}: must be UTF-8 text, got bytes that are not. Save it as UTF-8`);
    if (part.includes("\0")) throw new FormatError(`${name}:${line}: must be text, got a NUL byte. Save it as UTF-8`);
    begin = newline + 1;
  }
}

function strictly(bytes: Uint8Array): string | undefined {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return undefined;
  }
}
