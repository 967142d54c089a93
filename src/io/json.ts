/** Small text and JSON files of a directory. */
import type { Directory } from "./bytes.ts";
import { FormatError } from "./errors.ts";

/** A JSON object whose keys came from a file: look keys up, never merge it into another object. */
export type JsonObject = Readonly<Record<string, unknown>>;

/** The file as text, or undefined when there is none. Throws a FormatError if it is too long or not UTF-8. */
export async function readText(directory: Directory, file: string, limitBytes = 10e6): Promise<string | undefined> {
  const source = await directory.open(file);
  if (!source) return undefined;
  const name = `${directory.name}/${file}`;
  if (source.sizeBytes > limitBytes)
    throw new FormatError(`${name}: must be at most ${limitBytes} bytes, got ${source.sizeBytes}`);
  return utf8(await source.read(0, source.sizeBytes), name);
}

/** The file as a JSON object, or undefined when there is none. Throws a FormatError if it is anything else. */
export async function readJson(
  directory: Directory,
  file: string,
  limitBytes?: number,
): Promise<JsonObject | undefined> {
  const text = await readText(directory, file, limitBytes);
  return text === undefined ? undefined : parseJsonObject(text, `${directory.name}/${file}`);
}

/** Throws a FormatError unless the text is one JSON object. `where` is the file, or the file and the line. */
export function parseJsonObject(text: string, where: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FormatError(`${where}: must be JSON, got ${JSON.stringify(excerpt(text))} (${(error as Error).message})`);
  }
  if (!isObject(value)) throw new FormatError(`${where}: must be a JSON object, got ${excerpt(JSON.stringify(value))}`);
  return value;
}

/** As `parseJsonObject`, and throws a FormatError where a key occurs twice. */
export function parseRecord(text: string, where: string): JsonObject {
  const value = parseJsonObject(text, where);
  const duplicate = duplicateKey(text);
  if (duplicate !== undefined)
    throw new FormatError(`${where}: a key must not occur twice, got ${JSON.stringify(excerpt(duplicate))}`);
  return value;
}

export const isObject = (value: unknown): value is JsonObject =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** Strict: throws a FormatError on a byte that is not UTF-8. A byte order mark at the start is dropped. */
export function utf8(bytes: Uint8Array, where: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new FormatError(`${where}: must be UTF-8 text, got bytes that are not. Save it as UTF-8`);
  }
}

/** The first key that an object of this (valid) JSON text holds twice: `JSON.parse` keeps the last and says nothing. */
export function duplicateKey(json: string): string | undefined {
  const objects: (Set<string> | undefined)[] = []; // the keys of each open object; undefined for an open array
  let mayBeKey = false;
  for (let i = 0; i < json.length; i++) {
    const c = json[i];
    if (c === "{") objects.push(new Set());
    else if (c === "[") objects.push(undefined);
    else if (c === "}" || c === "]") objects.pop();
    if (c === "{" || c === ",") mayBeKey = true;
    if (c !== '"') continue;
    const begin = i++;
    while (json[i] !== '"') i += json[i] === "\\" ? 2 : 1;
    const keys = mayBeKey ? objects.at(-1) : undefined;
    mayBeKey = false;
    if (!keys) continue;
    const key = JSON.parse(json.slice(begin, i + 1)) as string;
    if (keys.has(key)) return key;
    keys.add(key);
  }
  return undefined;
}

/** At most 60 characters, for a message. */
export const excerpt = (text: string): string => (text.length > 60 ? `${text.slice(0, 57)}...` : text);
