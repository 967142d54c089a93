import { readFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadTokenizer, type Tokenizer } from "../../src/io/tokenizer.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import {
  type DataLimits,
  IGNORED,
  type LossOn,
  RowMaker,
  type RowOptions,
  readRows,
  rowsOf,
} from "../../src/train/data.ts";
import { hasShared, shared } from "../shared.ts";

/** One id per letter: a is 3, b is 4; "ab" side by side is one token, 99. BOS 1, EOS 2 ("$"). */
const letters: Tokenizer = {
  encode: (text) => [
    1,
    ...(text.match(/ab|[a-z$]/g) ?? []).map((s) => (s === "ab" ? 99 : s === "$" ? 2 : s.charCodeAt(0) - 94)),
  ],
  decode: () => "",
  bosId: 1,
  eosId: 2,
  vocabSize: 100,
};
const limits: DataLimits = { maxLength: 16, contextLength: 32, vocabSize: 100 };
const read = (lines: string, more: Partial<RowOptions> = {}, tokenizer: Tokenizer | undefined = letters) =>
  readRows(lines, "train.jsonl", tokenizer, { ...limits, ...more });

test("a text row is learned whole, with an EOS at its end where it has none", () => {
  const { rows, stats } = read('{"text":"cd"}\r\n\n{"text":"c$"}\n');
  expect(rows).toEqual([
    { inputIds: [1, 5, 6, 2], labels: [1, 5, 6, 2] },
    { inputIds: [1, 5, 2], labels: [1, 5, 2] },
  ]);
  expect(stats).toEqual({
    ...{ rows: 2, truncated: 0, dropped: 0, tokens: 7, trainedTokens: 5, unclearBoundaries: 0 },
    ...{ forms: { text: 2 }, ignoredKeys: [] },
  });
});

test("of a prompt and its completion only the completion and its EOS are learned", () => {
  const { rows, stats } = read('{"completion":"de","prompt":"c"}');
  expect(rows).toEqual([{ inputIds: [1, 5, 6, 7, 2], labels: [IGNORED, IGNORED, 6, 7, 2] }]);
  expect(stats.trainedTokens).toBe(3);
});

test("where the prompt's ids are no prefix of the whole, learning starts where they part, and is counted", () => {
  const { rows, stats } = read('{"prompt":"ca","completion":"bd"}\n{"prompt":"c","completion":"abd"}');
  expect(rows).toEqual([
    { inputIds: [1, 5, 99, 6, 2], labels: [IGNORED, IGNORED, 99, 6, 2] },
    { inputIds: [1, 5, 99, 6, 2], labels: [IGNORED, IGNORED, 99, 6, 2] },
  ]);
  expect(stats).toMatchObject({ unclearBoundaries: 1, firstUnclear: "train.jsonl:1" });
});

test("rows of ids need no tokenizer, and their labels default to the ids", () => {
  const lines = '{"input_ids":[7,8,9]}\n{"input_ids":[7,8,9],"labels":[-100,-100,9]}';
  const { rows, stats } = readRows(lines, "train.jsonl", undefined, limits);
  expect(rows).toEqual([
    { inputIds: [7, 8, 9], labels: [7, 8, 9] },
    { inputIds: [7, 8, 9], labels: [IGNORED, IGNORED, 9] },
  ]);
  expect(stats.trainedTokens).toBe(3);
});

test("a longer row is cut and counted; a row that is left with no target is dropped and counted", () => {
  const lines = [
    '{"text":"cdefg"}', // 7 ids
    '{"prompt":"cdef","completion":"g"}', // the prompt fills the whole length
    '{"input_ids":[7],"labels":[7]}', // nothing comes before the only label
    '{"input_ids":[7,8],"labels":[7,-100]}', // nor here
    '{"input_ids":[1,2,3,4,5]}', // fits exactly
  ];
  const { rows, stats } = read(lines.join("\n"), { maxLength: 5 });
  expect(rows.map((row) => row.inputIds)).toEqual([
    [1, 5, 6, 7, 8],
    [1, 2, 3, 4, 5],
  ]);
  expect(stats).toEqual({
    ...{ rows: 2, truncated: 2, dropped: 3, tokens: 10, trainedTokens: 8, unclearBoundaries: 0 },
    ...{ forms: { text: 1, completion: 1, ids: 3 }, ignoredKeys: [] },
  });
});

const forms =
  '{"messages"}, {"prompt","completion"}, {"text"}, {"instruction","output"}, {"conversations"}, {"segments"} or {"input_ids"}';
const good = '{"text":"a"}\n';

test.each<[what: string, lines: string, message: string]>([
  [
    "an empty file",
    "",
    `train.jsonl: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`,
  ],
  [
    "a file of blank lines",
    "\n  \n",
    `train.jsonl: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`,
  ],
  ["a list", `${good}[1]`, "train.jsonl:2: must be a JSON object, got [1]"],
  [
    "keys of another form",
    `${good}\n{"question":"a","answer":"b"}`,
    `train.jsonl:3: a row must be ${forms}, got "question", "answer"`,
  ],
  [
    "two forms",
    '{"text":"a","messages":[]}',
    'train.jsonl:1: a row must have one form, got both "messages" and "text". Leave one of them out',
  ],
  ["labels alone", '{"labels":[1]}', `train.jsonl:1: a row must be ${forms}, got "labels"`],
  [
    "a key that sets a prototype",
    '{"__proto__":{"text":"a"}}',
    `train.jsonl:1: a row must be ${forms}, got "__proto__"`,
  ],
  ["no keys", "{}", `train.jsonl:1: a row must be ${forms}, got no keys`],
  ["text that is not a string", '{"text":5}', 'train.jsonl:1: "text" must be a string, got 5'],
  [
    "a prompt of messages and a completion of text",
    '{"prompt":[{"role":"user"}],"completion":"x"}',
    'train.jsonl:1: "prompt" and "completion" must both be strings, or both lists of messages',
  ],
  ["ids that are no list", '{"input_ids":"1 2"}', 'train.jsonl:1: input_ids must be a list of ids, got "1 2"'],
  ["no ids", '{"input_ids":[]}', "train.jsonl:1: input_ids must have at least one id, got none"],
  [
    "an id outside the vocabulary",
    '{"input_ids":[1,100]}',
    "train.jsonl:1: input_ids must be whole numbers from 0 to 99, got 100 at index 1. Was this made for another model?",
  ],
  [
    "an ignored id",
    '{"input_ids":[-100,1]}',
    "train.jsonl:1: input_ids must be whole numbers from 0 to 99, got -100 at index 0. Was this made for another model?",
  ],
  [
    "a label outside the vocabulary",
    '{"input_ids":[1,2],"labels":[-100,-1]}',
    "train.jsonl:1: labels must be whole numbers from 0 to 99 or -100, got -1 at index 1. Was this made for another model?",
  ],
  [
    "fewer labels than ids",
    '{"input_ids":[1,2,3],"labels":[2,3]}',
    "train.jsonl:1: labels must be as many as input_ids (3), got 2. Do not shift them, and write -100 where a token is not to be learned",
  ],
  [
    "more labels than ids",
    '{"input_ids":[1],"labels":[2,3]}',
    "train.jsonl:1: labels must be as many as input_ids (1), got 2. Do not shift them, and write -100 where a token is not to be learned",
  ],
  [
    "no target in any row",
    '{"input_ids":[1,2],"labels":[-100,-100]}\n{"input_ids":[1]}',
    "train.jsonl: a row must leave a token to learn, got 2 rows with none in their first 16. Raise maxLength, or shorten the prompts",
  ],
])("a file with %s is refused, and the message says where and why", (_, lines, message) => {
  expect(() => read(lines)).toThrow(new FormatError(message));
});

test("a line that is not JSON is shown with its number", () => {
  expect(() => read(`${good}{"text": oops}`)).toThrow(
    /^train\.jsonl:2: must be JSON, got "\{\\"text\\": oops\}" \(.+\)$/,
  );
});

test("a row of text without a tokenizer is refused", () => {
  expect(() => readRows(good, "train.jsonl", undefined, limits)).toThrow(
    new FormatError(
      'train.jsonl:1: a row of text needs a tokenizer, got a model without one. Use rows of {"input_ids"}',
    ),
  );
});

test("a tokenizer whose ids the model does not have is refused", () => {
  expect(() => read('{"text":"ab"}', { vocabSize: 50 })).toThrow(
    new FormatError(
      "train.jsonl:1: the tokenizer's ids must be whole numbers from 0 to 49, got 99 at index 1. Was this made for another model?",
    ),
  );
});

test("a maximum length that the model does not have, or that leaves nothing to learn, is refused", () => {
  expect(() => read(good, { maxLength: 33 })).toThrow(
    new ShapeError("readRows: maxLength must be at most the model's context of 32, got 33. Set it to 32 or less"),
  );
  expect(() => read(good, { maxLength: 1 })).toThrow(
    new ShapeError("readRows: maxLength must be a whole number of at least 2, got 1"),
  );
});

test("rows come one by one from records that come one by one", async () => {
  let asked = 0;
  async function* records() {
    for (const text of ["cd", "e"]) {
      asked++;
      yield { value: { text }, where: `record ${asked}` };
    }
  }
  const maker = new RowMaker(letters, limits);
  const rows = rowsOf(records(), maker);
  expect((await rows.next()).value).toEqual({ inputIds: [1, 5, 6, 2], labels: [1, 5, 6, 2] });
  expect({ asked, rows: maker.stats.rows }).toEqual({ asked: 1, rows: 1 });
});

test("keys beside those of a form are ignored and listed once", () => {
  const lines = '{"text":"a","id":1}\n{"text":"b","id":2,"source":"s"}\n{"prompt":"c","completion":"d","tag":null}';
  expect(read(lines).stats.ignoredKeys).toEqual(["id", "source", "tag"]);
});

test("a row is learned as asked", () => {
  const of = (line: string, lossOn: LossOn) => read(line, { lossOn }).rows[0]?.labels;
  expect(of('{"prompt":"c","completion":"d"}', "all")).toEqual([1, 5, 6, 2]);
  expect(of('{"prompt":"c","completion":"d"}', "assistant")).toEqual([IGNORED, IGNORED, 6, 2]);
  expect(of('{"text":"cd"}', "all")).toEqual([1, 5, 6, 2]);
  expect(() => of('{"text":"cd"}', "last")).toThrow(
    new FormatError(
      "train.jsonl:1: a row of text can be learned as a whole, got --loss-on last. Use all, or leave it out",
    ),
  );
});

test("segments are learned where their label is true, each in tokens of its own and no others", () => {
  const line = '{"segments":[{"label":false,"text":"ca"},{"label":true,"text":"b$"},{"label":false,"text":"c"}]}';
  const plain = { ...letters, encode: (text: string) => letters.encode(text).slice(1) };
  const { rows } = read(line, {}, plain);
  expect(rows).toEqual([{ inputIds: [5, 3, 4, 2, 5], labels: [IGNORED, IGNORED, 4, 2, IGNORED] }]);
});

test("an instruction without a chat template is its text, its input and its answer with blank lines between", () => {
  const seen: string[] = [];
  const encode = (text: string): number[] => {
    seen.push(text);
    return letters.encode(text);
  };
  read('{"instruction":"a","input":"b","output":"c","system":"d","history":[["e","f"]]}', {}, { ...letters, encode });
  expect(seen).toEqual(["d\n\ne\n\nf\n\na\n\nb\n\nc", "d\n\ne\n\nf\n\na\n\nb\n\n"]);
});

test.skipIf(!hasShared)("the rows of the golden run are read as they are", async () => {
  const path = shared("golden/stories260K-lora/train.jsonl");
  const { rows, stats } = readRows(await readFile(path, "utf8"), path, undefined, {
    maxLength: 512,
    contextLength: 512,
    vocabSize: 512,
  });
  expect(rows).toHaveLength(80);
  expect(stats).toMatchObject({ truncated: 0, dropped: 0, unclearBoundaries: 0 });
  expect(stats.trainedTokens).toBe(4728); // eval_tokens of expected.json
});

test.skipIf(!hasShared)("with a real tokenizer a completion after a space starts at its own token", async () => {
  const tokenizer = await loadTokenizer(diskDirectory(shared("models/stories260K")));
  const { rows, stats } = readRows(
    '{"prompt":"Once upon a time,","completion":" there was a dog."}',
    "train.jsonl",
    tokenizer,
    { maxLength: 512, contextLength: 512, vocabSize: 512 },
  );
  const [row] = rows;
  const learned = row?.labels.filter((label) => label !== IGNORED) ?? [];
  expect(tokenizer.decode(row?.inputIds ?? [])).toBe("Once upon a time, there was a dog.");
  expect(learned.at(-1)).toBe(tokenizer.eosId);
  expect(learned.slice(0, -1)).toEqual(tokenizer.encode("there was a dog.", { addSpecialTokens: false }));
  expect(stats.unclearBoundaries).toBe(0);
});
