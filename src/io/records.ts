/** Data files as records: JSON Lines, JSON, CSV, TSV, Parquet and plain text. */
import type { ByteSource, Directory } from "./bytes.ts";
import { FormatError } from "./errors.ts";
import { excerpt, type JsonObject, parseRecord } from "./json.ts";
import { type Line, readLines } from "./lines.ts";
import { csvRecords, parquetRecords } from "./tables.ts";

/** One example as its file has it. */
export interface DataRecord {
  readonly value: JsonObject;
  /** "train.jsonl:12", or "train.parquet:row 12": for messages. */
  readonly where: string;
}

export interface RecordOptions {
  /** In plain text: each line is a prompt, up to and with this separator, and its completion. Else a blank line ends a document. */
  readonly separator?: string | undefined;
}

type Reader = (source: ByteSource, name: string, options: RecordOptions) => AsyncGenerator<DataRecord, void, undefined>;

const READERS: Readonly<Record<string, Reader>> = {
  jsonl: (source, name) => jsonLines(readLines(source, name), name),
  ndjson: (source, name) => jsonLines(readLines(source, name), name),
  json: jsonRecords,
  csv: (source, name) => csvRecords(readLines(source, name), name, ","),
  tsv: (source, name) => csvRecords(readLines(source, name), name, "\t"),
  parquet: parquetRecords,
  txt: (source, name, { separator }) =>
    separator === undefined
      ? documents(readLines(source, name), name)
      : pairs(readLines(source, name), name, separator),
};

/** The endings of file names that `readRecords` knows. */
export const DATA_ENDINGS: readonly string[] = Object.keys(READERS);

/**
 * The records of a data file; its name's ending says what it is. Reads as it goes, in pieces of a MiB, of a Parquet file a group at a time.
 * Throws a FormatError that names file and line.
 */
export function readRecords(
  source: ByteSource,
  name: string,
  options: RecordOptions = {},
): AsyncGenerator<DataRecord, void, undefined> {
  const ending = /\.([^./\\]+)$/.exec(name)?.[1]?.toLowerCase() ?? "";
  const reader = Object.hasOwn(READERS, ending) ? READERS[ending] : undefined;
  if (!reader)
    throw new FormatError(
      `${name}: the name of a data file must end with ${DATA_ENDINGS.map((known) => `.${known}`).join(", ")}, got ${ending ? `.${ending}` : "no ending"}`,
    );
  return reader(source, name, options);
}

export interface DataFile {
  readonly name: string;
  readonly source: ByteSource;
}

const SPLITS = { train: ["train"], valid: ["valid", "validation"], test: ["test"] } as const;

/** The files of a directory named train, valid (or validation) and test, of any kind. Throws a FormatError where one is there twice, or none. */
export async function dataSplits(
  directory: Directory,
): Promise<{ readonly [split in keyof typeof SPLITS]?: DataFile | undefined }> {
  const entries: [string, DataFile | undefined][] = [];
  for (const [split, names] of Object.entries(SPLITS)) {
    const found: string[] = [];
    for (const file of names.flatMap((name) => DATA_ENDINGS.map((ending) => `${name}.${ending}`)))
      if (await directory.open(file)) found.push(file);
    if (found.length > 1)
      throw new FormatError(`${directory.name}: must have one file for ${split}, got ${found.join(", ")}`);
    const source = found[0] === undefined ? undefined : await directory.open(found[0]);
    entries.push([split, source && { name: `${directory.name}/${found[0]}`, source }]);
  }
  if (entries.every(([, file]) => file === undefined))
    throw new FormatError(
      `${directory.name}: a directory of data must have train, valid or test with one of the endings .${DATA_ENDINGS.join(" .")}, got none`,
    );
  return Object.fromEntries(entries);
}

async function* jsonLines(
  lines: AsyncIterable<Line>,
  name: string,
  isList = false,
): AsyncGenerator<DataRecord, void, undefined> {
  for await (const { text, number } of lines)
    if (text.trim() !== "" || isList) {
      const where = `${name}:${number}`;
      yield { value: parseRecord(text, where), where };
    }
}

/** A list of objects; a file that does not begin with one is taken as JSON Lines. */
async function* jsonRecords(source: ByteSource, name: string): AsyncGenerator<DataRecord, void, undefined> {
  for await (const { text } of readLines(source, name)) {
    if (text.trim() === "") continue;
    const lines = readLines(source, name);
    const isList = text.trimStart().startsWith("[");
    yield* jsonLines(isList ? listItems(lines, name) : lines, name, isList);
    return;
  }
}

/** Strings, brackets, commas, and whatever stands between them. */
const TOKENS = /"(?:[^"\\]|\\.)*"?|[[\]{},]|[^\s"[\]{},]+/g;

/** The text of each item of a JSON list, with the line where it begins. */
async function* listItems(lines: AsyncIterable<Line>, name: string): AsyncGenerator<Line, void, undefined> {
  let depth = 0;
  let isClosed = false;
  let text = "";
  let begun: number | undefined;
  let last = 1;
  for await (const line of lines) {
    last = line.number;
    let from = 0; // of what belongs to the item in this line
    for (const { 0: token, index } of line.text.matchAll(TOKENS)) {
      if (depth === 0) {
        if (isClosed) throw new FormatError(`${name}:${last}: nothing may follow a JSON list, got ${excerpt(token)}`);
        depth = 1;
        from = index + 1;
      } else if (depth === 1 && (token === "," || token === "]")) {
        text += line.text.slice(from, index);
        if (token === "," || begun !== undefined) yield { text: text.trim(), number: begun ?? last };
        text = "";
        begun = undefined;
        from = index + 1;
        isClosed = token === "]";
        if (isClosed) depth = 0;
      } else {
        begun ??= last;
        depth += Number(token === "[" || token === "{") - Number(token === "]" || token === "}");
      }
    }
    if (depth > 0) text += `${line.text.slice(from)}\n`;
  }
  if (!isClosed) throw new FormatError(`${name}:${last}: a JSON list must end with "]", got the end of the file`);
}

/** Documents with blank lines between them. */
async function* documents(lines: AsyncIterable<Line>, name: string): AsyncGenerator<DataRecord, void, undefined> {
  let text: string[] = [];
  let where = "";
  const record = (): DataRecord => ({ value: { text: text.join("\n") }, where });
  for await (const line of lines) {
    if (line.text.trim() === "") {
      if (text.length > 0) yield record();
      text = [];
    } else {
      if (text.length === 0) where = `${name}:${line.number}`;
      text.push(line.text);
    }
  }
  if (text.length > 0) yield record();
}

async function* pairs(
  lines: AsyncIterable<Line>,
  name: string,
  separator: string,
): AsyncGenerator<DataRecord, void, undefined> {
  for await (const { text, number } of lines) {
    if (text.trim() === "") continue;
    const where = `${name}:${number}`;
    const at = text.indexOf(separator);
    if (at < 0)
      throw new FormatError(
        `${where}: a line must have ${JSON.stringify(separator)} between prompt and completion, got ${JSON.stringify(excerpt(text))}`,
      );
    const end = at + separator.length;
    yield { value: { prompt: text.slice(0, end), completion: text.slice(end) }, where };
  }
}
