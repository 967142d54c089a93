import { expect, test } from "vitest";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { loadTokenizer } from "../../src/tokenizer.ts";
import { type ClassificationLimits, readClassificationRows } from "../../src/train/classification-rows.ts";

const LIMITS: ClassificationLimits = {
  ...{ vocabSize: 64, tokenTypes: 2, padId: 0, labels: ["no", "yes"] },
  ...{ maxLength: 9, contextLength: 32 },
};
const tokenizer = await loadTokenizer(diskDirectory("test/golden/wordpiece"));
const readLines = (lines: readonly unknown[], limits = LIMITS) =>
  readClassificationRows(lines.map((line) => `${JSON.stringify(line)}\n`).join("\n"), "f.jsonl", tokenizer, limits);

test("rows of text, of pairs and of ids are read, labels by number or name, and cut to the length", () => {
  const { rows, stats } = readLines([
    { text: "the film was good", label: 1 },
    { sentence: "Fun.", label: "no" },
    { text: "a film", text_pair: "it was good and very very fun", label: "yes" },
    { input_ids: [2, 5, 3], token_type_ids: [0, 1, 1], label: 0 },
    { input_ids: new Array(12).fill(7), label: 0 },
  ]);
  expect(rows).toEqual([
    { inputIds: [2, 5, 7, 8, 11, 3], tokenTypeIds: [0, 0, 0, 0, 0, 0], label: 1 },
    { inputIds: [2, 15, 27, 3], tokenTypeIds: [0, 0, 0, 0], label: 0 },
    { inputIds: [2, 6, 7, 3, 22, 8, 11, 20, 3], tokenTypeIds: [0, 0, 0, 0, 1, 1, 1, 1, 1], label: 1 },
    { inputIds: [2, 5, 3], tokenTypeIds: [0, 1, 1], label: 0 },
    { inputIds: new Array(9).fill(7), label: 0 },
  ]);
  expect(stats).toEqual({ rows: 5, truncated: 2, tokens: 31, counts: [3, 2] });
});

test("a model with one kind of tokens gets none told apart", () => {
  const { rows } = readLines([{ text: "a", text_pair: "a", label: 0 }], { ...LIMITS, tokenTypes: 1 });
  expect(rows).toEqual([{ inputIds: [2, 6, 3, 6, 3], label: 0 }]);
});

const FORMS = 'a row must be {"text","label"}, {"text","text_pair","label"} or {"input_ids","label"}, got';
test.each<[unknown, string]>([
  [{ text: "a" }, `${FORMS} "text"`],
  [{ text: "a", sentence: "b", label: 0 }, `${FORMS} "text", "sentence", "label"`],
  [{}, `${FORMS} no keys`],
  [{ text: 3, label: 0 }, '"text" must be a string, got 3'],
  [{ text: "a", text_pair: 3, label: 0 }, '"text_pair" must be a string, got 3'],
  [{ text: "a", label: 2 }, '"label" must be a number from 0 to 1 or one of no, yes, got 2'],
  [{ text: "a", label: "maybe" }, '"label" must be a number from 0 to 1 or one of no, yes, got "maybe"'],
  [{ input_ids: [5] }, '"label" must be a number from 0 to 1 or one of no, yes, got none'],
  [{ input_ids: 5, label: 0 }, "input_ids must be a list of numbers, got 5"],
  [{ input_ids: [], label: 0 }, "input_ids must have at least one id, got none"],
  [
    { input_ids: [64], label: 0 },
    "input_ids must be whole numbers from 0 to 63, got 64. Was this made for another model?",
  ],
  [{ input_ids: [5, 0], label: 0 }, "input_ids must be without padding, got the padding's id 0. Leave it out"],
  [
    { input_ids: [5], token_type_ids: [2], label: 0 },
    "token_type_ids must be whole numbers from 0 to 1, got 2. Was this made for another model?",
  ],
  [{ input_ids: [5], token_type_ids: [0, 0], label: 0 }, "token_type_ids must be as many as input_ids (1), got 2"],
])("%j is refused", (row, message) => {
  expect(() => readLines([row])).toThrow(new FormatError(`f.jsonl:1: ${message}`));
});

test("a file needs a row, text a tokenizer, and the length has to suit the model", () => {
  expect(() => readLines([])).toThrow(
    new FormatError(
      'f.jsonl: must have at least one row, got an empty file. Write one JSON object per line: {"text","label"}, {"text","text_pair","label"} or {"input_ids","label"}',
    ),
  );
  expect(() => readClassificationRows('{"text":"a","label":0}', "f", undefined, LIMITS)).toThrow(
    new FormatError('f:1: a row of text needs a tokenizer, got a model without one. Use rows of {"input_ids"}'),
  );
  for (const maxLength of [3, 33])
    expect(() => readLines([], { ...LIMITS, maxLength })).toThrow(
      new ShapeError(
        `readClassificationRows: maxLength must be a whole number from 4 to the model's context of 32, got ${maxLength}`,
      ),
    );
});
