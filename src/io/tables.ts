/** Tables as records: CSV and TSV by `csv-parse`, Parquet by `hyparquet`. */
import { type CsvError, type Info, parse } from "csv-parse/sync";
import { parquetMetadataAsync, parquetReadObjects } from "hyparquet";
import { compressors } from "hyparquet-compressors";
import type { ByteSource } from "./bytes.ts";
import { FormatError } from "./errors.ts";
import { excerpt, isObject, type JsonObject } from "./json.ts";
import type { Line } from "./lines.ts";
import type { DataRecord } from "./records.ts";

/** Columns that hold lists: their cells are JSON. */
const LIST_COLUMNS: ReadonlySet<string> = new Set([
  "messages",
  "tools",
  "conversations",
  "history",
  "segments",
  "input_ids",
  "labels",
]);

/** The first line names the columns. Cells are text, those of `LIST_COLUMNS` JSON; empty ones count as not there. */
export async function* csvRecords(
  lines: AsyncIterable<Line>,
  name: string,
  delimiter: string,
): AsyncGenerator<DataRecord, void, undefined> {
  let columns: readonly string[] | undefined;
  for await (const { record, line } of csvRows(lines, name, delimiter)) {
    if (!columns) {
      columns = record;
      const twice = record.find((column, i) => record.indexOf(column) !== i);
      if (twice === undefined) continue;
      throw new FormatError(`${name}:1: a column must not occur twice, got ${JSON.stringify(excerpt(twice))}`);
    }
    const where = `${name}:${line}`;
    if (record.length !== columns.length)
      throw new FormatError(
        `${where}: a row must have ${columns.length} cells, as many as line 1, got ${record.length}. Quote cells that hold the separator`,
      );
    const cells = columns.map((column, i) => [column, cell(column, record[i] ?? "", where)] as const);
    yield { value: Object.fromEntries(cells.filter(([, value]) => value !== undefined)), where };
  }
}

const CSV_REASONS: Readonly<Record<string, string>> = {
  CSV_QUOTE_NOT_CLOSED: "a quote that is not closed",
  INVALID_OPENING_QUOTE: "a quote inside a cell that does not begin with one",
  CSV_INVALID_CLOSING_QUOTE: "something behind the closing quote of a cell",
};

interface CsvRow {
  readonly record: readonly string[];
  /** Where the row ends. */
  readonly line: number;
}

/** Letters that are parsed at a time, and the rest of the last row. */
const CSV_BLOCK = 2 ** 20;

/** Block by block: a block ends with a line up to which the quotes are closed, that is even in number (RFC 4180). */
async function* csvRows(lines: AsyncIterable<Line>, name: string, delimiter: string): AsyncGenerator<CsvRow> {
  let [text, before, isQuoted] = ["", 0, false];
  for await (const line of lines) {
    text += `${line.text}\n`;
    if (line.text.split('"').length % 2 === 0) isQuoted = !isQuoted;
    if (isQuoted || text.length < CSV_BLOCK) continue;
    yield* cellsOf(text, name, delimiter, before);
    [text, before] = ["", line.number];
  }
  yield* cellsOf(text, name, delimiter, before);
}

/** The rows of a text that has so many lines before it. */
function cellsOf(text: string, name: string, delimiter: string, before: number): CsvRow[] {
  try {
    const options = { delimiter, info: true, skip_empty_lines: true, relax_column_count: true } as const;
    const rows = parse(text, options) as unknown as { readonly record: readonly string[]; readonly info: Info }[];
    return rows.map(({ record, info }) => ({ record, line: before + info.lines }));
  } catch (error) {
    const { code, lines } = error as CsvError & { readonly lines?: number };
    const reason = CSV_REASONS[String(code)] ?? String(code);
    throw new FormatError(
      `${name}:${before + (lines ?? 1)}: must be CSV, got ${reason}. Quote a cell that holds quotes, and double them`,
    );
  }
}

function cell(column: string, text: string, where: string): unknown {
  if (text === "") return undefined;
  if (!LIST_COLUMNS.has(column)) return text;
  try {
    return JSON.parse(text);
  } catch {
    throw new FormatError(`${where}: a cell of "${column}" must be a JSON list, got ${JSON.stringify(excerpt(text))}`);
  }
}

/** Rows group by group. What is null counts as not there: Parquet gives every struct the fields of all. */
export async function* parquetRecords(source: ByteSource, name: string): AsyncGenerator<DataRecord, void, undefined> {
  if (source.sizeBytes < 12) throw new FormatError(`${name}: must be a Parquet file, got ${source.sizeBytes} bytes`);
  const read = async (start: number, length: number): Promise<ArrayBuffer> =>
    (await source.read(start, length)).slice().buffer as ArrayBuffer;
  const file = {
    byteLength: source.sizeBytes,
    slice(start: number, end: number = source.sizeBytes): Promise<ArrayBuffer> {
      const bytes = read(start, end - start);
      bytes.catch(() => {}); // the reader asks for several ranges at once and leaves the others when one fails
      return bytes;
    },
  };
  const metadata = await parquet(name, () => parquetMetadataAsync(file));
  let rowStart = 0;
  for (const group of metadata.row_groups) {
    const rowEnd = rowStart + Number(group.num_rows);
    const rows = await parquet(name, () => parquetReadObjects({ file, metadata, rowStart, rowEnd, compressors }));
    for (const [i, row] of rows.entries())
      yield { value: plain(row) as JsonObject, where: `${name}:row ${rowStart + i + 1}` };
    rowStart = rowEnd;
  }
}

async function parquet<T>(name: string, action: () => Promise<T>): Promise<T> {
  try {
    return await action();
  } catch (error) {
    if (error instanceof FormatError) throw error;
    const reason = error instanceof Error ? error.message : String(error);
    throw new FormatError(`${name}: must be a Parquet file that can be read, got an error (${reason})`);
  }
}

/** As JSON would have it: whole numbers are numbers, lists plain, and what is null is left out. */
function plain(value: unknown): unknown {
  if (typeof value === "bigint") return Number(value);
  if (ArrayBuffer.isView(value) || Array.isArray(value)) return Array.from(value as ArrayLike<unknown>, plain);
  if (!isObject(value)) return value;
  const entries = Object.entries(value).filter(([, part]) => part !== null && part !== undefined);
  return Object.fromEntries(entries.map(([key, part]) => [key, plain(part)]));
}
