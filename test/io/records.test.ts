import { readFile } from "node:fs/promises";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type ByteSource, memoryDirectory, memorySource } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { fileSource } from "../../src/io/files.ts";
import { readLines } from "../../src/io/lines.ts";
import { type DataRecord, dataSplits, type RecordOptions, readRecords } from "../../src/io/records.ts";

const source = (content: string): ByteSource => memorySource(new TextEncoder().encode(content));

async function records(name: string, content: string, options?: RecordOptions): Promise<DataRecord[]> {
  return all(readRecords(source(content), name, options));
}

async function all<T>(values: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = [];
  for await (const value of values) found.push(value);
  return found;
}

const of = (where: string, value: Record<string, unknown>): DataRecord => ({ where, value });

test.each<[string, string, DataRecord[]]>([
  [
    "a.jsonl",
    '\ufeff{"text":"a"}\r\n\n  {"text":"b"}',
    [of("a.jsonl:1", { text: "a" }), of("a.jsonl:3", { text: "b" })],
  ],
  ["a.NDJSON", '{"text":"a"}', [of("a.NDJSON:1", { text: "a" })]],
  ["a.json", '{"text":"a"}\n{"text":"b"}', [of("a.json:1", { text: "a" }), of("a.json:2", { text: "b" })]],
  ["a.json", "\n [ ]\n", []],
  [
    "a.json",
    '[{"text":"a, ] \\" {"},\n{\n"text": [1,\n{"b":[]}]},{"text":"c"}\n]\n',
    [of("a.json:1", { text: 'a, ] " {' }), of("a.json:2", { text: [1, { b: [] }] }), of("a.json:4", { text: "c" })],
  ],
  [
    "a.csv",
    'prompt,completion,id\n"a, ""b""\nc",d,\n\n[e],f,7\n',
    [
      of("a.csv:3", { prompt: 'a, "b"\nc', completion: "d" }),
      of("a.csv:5", { prompt: "[e]", completion: "f", id: "7" }),
    ],
  ],
  ["a.tsv", 'input_ids\tlabels\n"[1,2]"\t\n', [of("a.tsv:2", { input_ids: [1, 2] })]],
  ["a.txt", "\none\ntwo\r\n\n \nthree\n", [of("a.txt:2", { text: "one\ntwo" }), of("a.txt:6", { text: "three" })]],
])("%s of %j is read", async (name, content, want) => {
  expect(await records(name, content)).toEqual(want);
});

test("a CSV file of several MiB is read piece by piece, also where a piece would end within quotes", async () => {
  const count = 40_000;
  const rows = Array.from({ length: count }, (_row, i) => `"a ""${"b".repeat(i % 97)}""\n,c\n",${i}\n`);
  const content = `text,id\n${rows.join("")}`;
  expect(content.length).toBeGreaterThan(2.5e6);
  const inside = source(content);
  let bytesRead = 0;
  const counted: ByteSource = {
    ...inside,
    read(offset, length) {
      bytesRead += length;
      return inside.read(offset, length);
    },
  };
  let read = 0;
  for await (const record of readRecords(counted, "a.csv")) {
    if (read === 0) expect(bytesRead).toBeLessThan(content.length);
    const want = of(`a.csv:${4 + 3 * read}`, { text: `a "${"b".repeat(read % 97)}"\n,c\n`, id: `${read}` });
    if (JSON.stringify(record) !== JSON.stringify(want)) expect(record).toEqual(want);
    read++;
  }
  expect(read).toBe(count);
  await expect(records("a.csv", `${content}x"y,1\n`)).rejects.toThrow(
    new FormatError(
      `a.csv:${2 + 3 * count}: must be CSV, got a quote inside a cell that does not begin with one. Quote a cell that holds quotes, and double them`,
    ),
  );
  await expect(records("a.csv", `${content}x\n`)).rejects.toThrow(
    new FormatError(
      `a.csv:${2 + 3 * count}: a row must have 2 cells, as many as line 1, got 1. Quote cells that hold the separator`,
    ),
  );
});

test("lines of plain text are prompts and completions where a separator is given", async () => {
  expect(await records("a.txt", "p||c||d\n\nq|| e\n", { separator: "||" })).toEqual([
    of("a.txt:1", { prompt: "p||", completion: "c||d" }),
    of("a.txt:3", { prompt: "q||", completion: " e" }),
  ]);
});

describe("a Parquet file", () => {
  const read = async (name: string): Promise<DataRecord[]> =>
    all(readRecords(await fileSource(`test/golden/data/${name}`), name));

  test("of messages is read in all its groups, without what is null", async () => {
    expect(await read("messages.parquet")).toEqual([
      of("messages.parquet:row 1", {
        messages: [
          { role: "user", content: "a" },
          { role: "assistant", content: "é 🙂" },
        ],
        id: 1,
      }),
      of("messages.parquet:row 2", {
        messages: [
          { role: "user", content: "b" },
          { role: "assistant", tool_calls: [{ function: { name: "f", arguments: '{"x":1}' } }] },
        ],
        id: 2,
      }),
      of("messages.parquet:row 3", {
        messages: [
          { role: "user", content: "c" },
          { role: "assistant", content: "d" },
        ],
        id: 3,
      }),
    ]);
  });

  test.each(["zstd", "gzip", "plain"])("that is compressed by %s is read", async (name) => {
    const rows = (await read(`${name}.parquet`)).map(({ value }) => value);
    expect(rows).toEqual([
      { input_ids: [1, 2, 3], labels: [-100, 2, 3] },
      { input_ids: [4], labels: [-100] },
      { input_ids: [5, 6], labels: [-100, 6] },
    ]);
  });

  test("that is damaged is read or refused with a FormatError, and nothing else", async () => {
    const whole = new Uint8Array(await readFile("test/golden/data/messages.parquet"));
    const damage = fc.record({ at: fc.nat(whole.length - 1), value: fc.nat(255), length: fc.nat(whole.length) });
    await fc.assert(
      fc.asyncProperty(damage, async ({ at, value, length }) => {
        const bytes = whole.slice(0, at % 3 === 0 ? length : whole.length);
        if (at < bytes.length) bytes[at] = value;
        try {
          await all(readRecords(memorySource(bytes), "a.parquet"));
        } catch (error) {
          expect(error).toBeInstanceOf(FormatError);
        }
      }),
      { numRuns: 200 },
    );
  });
});

test("a directory's files are found by their names", async () => {
  const directory = memoryDirectory("d", { "train.csv": "", "validation.jsonl": "", "other.txt": "" });
  const { train, valid, test: held } = await dataSplits(directory);
  expect([train?.name, valid?.name, held]).toEqual(["d/train.csv", "d/validation.jsonl", undefined]);
});

test("lines and characters across the pieces that a file is read in stay whole", async () => {
  const line = `${"é🙂".repeat(150_000)}x`; // 900,001 bytes: pieces of 2²⁰ end anywhere in it
  const lines = await all(readLines(source(`${line}\r\n${line}\n\n${line}`), "a.txt"));
  expect(lines.map(({ number }) => number)).toEqual([1, 2, 3, 4]);
  expect(lines.every(({ text }) => text === line || text === "")).toBe(true);
});

test("a bad byte far into a file is found in its line", async () => {
  const bytes = new TextEncoder().encode("0123456789\n".repeat(200_000));
  bytes[11 * 150_000] = 0xff;
  await expect(all(readLines(memorySource(bytes), "a.txt"))).rejects.toThrow(
    new FormatError("a.txt:150001: must be UTF-8 text, got bytes that are not. Save it as UTF-8"),
  );
});

test("a line without end is refused before memory is", async () => {
  const endless: ByteSource = { sizeBytes: 2 ** 40, read: async (_, length) => new Uint8Array(length).fill(97) };
  await expect(all(readLines(endless, "a.txt"))).rejects.toThrow(
    new FormatError("a.txt:1: a line must have at most 67108864 bytes, got more"),
  );
});
