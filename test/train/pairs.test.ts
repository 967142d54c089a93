import { expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { loadChatTemplate } from "../../src/io/chat-template.ts";
import { FormatError } from "../../src/io/errors.ts";
import type { Tokenizer } from "../../src/io/tokenizer.ts";
import { IGNORED, type RowOptions, readPairs } from "../../src/train/data.ts";

/** One id per letter: a is 3, b is 4; a space is 30, a bar 31. BOS 1, EOS 2 ("$"). */
const idOf = (s: string): number => ({ $: 2, " ": 30, "|": 31 })[s] ?? s.charCodeAt(0) - 94;
const letters: Tokenizer = {
  encode: (text, { addSpecialTokens = true } = {}) => [
    ...(addSpecialTokens ? [1] : []),
    ...(text.match(/[a-z$ |]/g) ?? []).map(idOf),
  ],
  decode: (ids, { skipSpecialTokens = true } = {}) =>
    ids.map((id) => (id === 2 ? (skipSpecialTokens ? "" : "$") : "x")).join(""),
  bosId: 1,
  eosId: 2,
  vocabSize: 100,
};
const limits = { maxLength: 16, contextLength: 32, vocabSize: 100 };
const read = (lines: string, more: Partial<RowOptions> = {}) =>
  readPairs(lines, "pairs.jsonl", letters, { ...limits, ...more });
const none = (n: number): number[] => new Array<number>(n).fill(IGNORED);
const chatTemplate = await loadChatTemplate(
  memoryDirectory("model", { "tokenizer_config.json": '{"eos_token":"$"}' }),
  {
    name: "bars",
    text: "{% for m in messages %}{{ m.role[0] }}|{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}a|{% endif %}",
  },
);
const user = { role: "user", content: "c" };
const turn = (content: string) => ({ role: "assistant", content });
const line = (record: object): string => JSON.stringify(record);

test("of texts only the answers and their EOS are learned; keys that say nothing are listed", () => {
  const { pairs, stats } = read('{"prompt":"c","chosen":"de","rejected":"f","score":1}');
  expect(pairs).toEqual([
    {
      chosen: { inputIds: [1, 5, 6, 7, 2], labels: [...none(2), 6, 7, 2] },
      rejected: { inputIds: [1, 5, 8, 2], labels: [...none(2), 8, 2] },
    },
  ]);
  expect(stats).toEqual({
    ...{ rows: 1, truncated: 0, dropped: 0, tokens: 9, trainedTokens: 5, unclearBoundaries: 0 },
    ...{ forms: { preference: 1 }, ignoredKeys: ["score"] },
  });
});

test("texts without a prompt begin with it: what they share up to a white space is not learned", () => {
  const { pairs } = read('{"chosen":"c d ef","rejected":"c d eg"}\n{"chosen":"c","rejected":"d"}');
  expect(pairs[0]?.chosen).toEqual({ inputIds: [1, 5, 30, 6, 30, 7, 8, 2], labels: [...none(4), 30, 7, 8, 2] });
  expect(pairs[0]?.rejected).toEqual({ inputIds: [1, 5, 30, 6, 30, 7, 9, 2], labels: [...none(4), 30, 7, 9, 2] });
  expect(pairs[1]?.chosen).toEqual({ inputIds: [1, 5, 2], labels: [IGNORED, 5, 2] });
});

test("a prompt of messages, its messages within the conversations, and as text beside them come to the same pair", () => {
  const { pairs, stats } = read(
    [
      line({ prompt: [user], chosen: [turn("d")], rejected: [turn("ef")] }),
      line({ chosen: [user, turn("d")], rejected: [user, turn("ef")] }),
      line({ prompt: "c", chosen: [user, turn("d")], rejected: [user, turn("ef")] }),
    ].join("\n"),
    { chatTemplate },
  );
  const [u, a] = [idOf("u"), idOf("a")];
  const chosen = { inputIds: [u, 31, 5, a, 31, 6, 2], labels: [...none(5), 6, 2] };
  const rejected = { inputIds: [u, 31, 5, a, 31, 7, 8, 2], labels: [...none(5), 7, 8, 2] };
  expect(pairs).toEqual([1, 2, 3].map(() => ({ chosen, rejected })));
  expect(stats).toMatchObject({ rows: 3, unclearBoundaries: 0 });
});

test("turns of the assistant in the prompt are not learned", () => {
  const history = [user, turn("b"), user];
  const { pairs } = read(line({ prompt: history, chosen: [turn("d")], rejected: [turn("e")] }), { chatTemplate });
  expect(pairs[0]?.chosen.labels.filter((id) => id !== IGNORED)).toEqual([6, 2]);
});

test("pairs that are cut are counted, and those without a token to learn or with no difference are dropped", () => {
  const { pairs, stats } = read(
    [
      '{"prompt":"cc","chosen":"def","rejected":"d"}',
      '{"prompt":"ccccc","chosen":"d","rejected":"e"}',
      '{"prompt":"c","chosen":"d","rejected":"d"}',
      '{"prompt":"c","chosen":"ddda","rejected":"dddb"}',
    ].join("\n"),
    { maxLength: 5 },
  );
  expect(pairs).toHaveLength(1);
  expect(pairs[0]?.chosen.inputIds).toEqual([1, 5, 5, 6, 7]);
  expect(stats).toMatchObject({ rows: 1, truncated: 3, dropped: 3 });
});

const forms = '{"prompt","chosen","rejected"} or {"chosen","rejected"}';
test.each([
  [
    "another row",
    '{"text":"a"}',
    `:1: a pair must be ${forms}, got "text". Other rows are learned without --preference`,
  ],
  [
    "half a pair",
    '{"prompt":"a","chosen":"b"}',
    `:1: a pair must be ${forms}, got "prompt", "chosen". Other rows are learned without --preference`,
  ],
  [
    "text and messages",
    line({ prompt: "a", chosen: "b", rejected: [turn("b")] }),
    ':1: "prompt", "chosen" and "rejected" must all be strings, or all lists of messages',
  ],
  ["a number", '{"prompt":"a","chosen":1,"rejected":"b"}', ':1: "chosen" must be a string, got 1'],
  [
    "conversations that begin otherwise",
    line({ chosen: [user, turn("d")], rejected: [{ ...user, content: "d" }, turn("d")] }),
    ':1: "chosen" and "rejected" must begin with the same messages',
  ],
  [
    "another prompt",
    line({ prompt: "d", chosen: [user, turn("d")], rejected: [user, turn("e")] }),
    ':1: "prompt" must be the last message that "chosen" and "rejected" share, got "d"',
  ],
  [
    "an answer of the user",
    line({ prompt: [user], chosen: [user], rejected: [turn("e")] }),
    ":1: what follows the prompt must begin with a message of the assistant",
  ],
  ["an empty file", "", `: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`],
])("%s is refused with its line", (_what, text, message) => {
  expect(() => read(text, { chatTemplate })).toThrow(new FormatError(`pairs.jsonl${message}`));
});
