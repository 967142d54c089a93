/** BERT's tokenizer against transformers: scripts/golden/wordpiece.py made what is expected. */
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadTokenizer } from "../../src/io/tokenizer.ts";

interface Tokens {
  readonly ids: number[];
  readonly types: number[];
}
interface Case extends Tokens {
  readonly text: string;
  readonly pair: string | null;
  readonly cut: Readonly<Record<string, Tokens>>;
}
const folder = "test/golden/wordpiece";
const { cases } = JSON.parse(readFileSync(`${folder}/expected.json`, "utf8")) as { cases: Case[] };

test("ids and token types of texts, pairs and cut ones are those of transformers", async () => {
  const tokenizer = await loadTokenizer(diskDirectory(folder));
  expect(cases.length).toBeGreaterThanOrEqual(10);
  for (const { text, pair, ids, types, cut } of cases) {
    if (pair === null) expect(tokenizer.encode(text), text).toEqual(ids);
    const whole = tokenizer.encodeTexts(text, pair ?? undefined, 512);
    expect(whole, `${text} + ${pair}`).toEqual({ ids, tokenTypes: types, isCut: false });
    for (const [length, expected] of Object.entries(cut))
      expect(tokenizer.encodeTexts(text, pair ?? undefined, Number(length)), `${text} + ${pair} to ${length}`).toEqual({
        ...{ ids: expected.ids, tokenTypes: expected.types },
        isCut: expected.ids.length < ids.length,
      });
  }
});

test("a tokenizer without a template for pairs gives one text as it is, cut at its end", async () => {
  const vocab = { a: 0, b: 1, ab: 2 };
  const files = { "vocab.json": JSON.stringify(vocab), "merges.txt": "a b\n" };
  const tokenizer = await loadTokenizer(memoryDirectory("m", files));
  expect(tokenizer.encodeTexts("ababb", undefined, 9)).toEqual({ ids: [2, 2, 1], tokenTypes: [0, 0, 0], isCut: false });
  expect(tokenizer.encodeTexts("ababb", undefined, 2)).toEqual({ ids: [2, 2], tokenTypes: [0, 0], isCut: true });
});
