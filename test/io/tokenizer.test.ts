import { readFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadTokenizer } from "../../src/io/tokenizer.ts";
import { hasShared, shared } from "../shared.ts";

interface Golden {
  vocabSize: number;
  bosId: number;
  eosId: number;
  cases: { text: string; ids: number[]; plainIds: number[]; decoded: string; decodedWithSpecial: string }[];
  decodes: { ids: number[]; decoded: string }[];
}
const goldenFile = new URL("../golden/tokenizer-stories260k.json", import.meta.url);
const golden: Golden = JSON.parse(await readFile(goldenFile, "utf8"));

test.skipIf(!hasShared)("ids and texts are those of transformers for Python", async () => {
  const tokenizer = await loadTokenizer(diskDirectory(shared("models/stories260K")));
  const { vocabSize, bosId, eosId } = tokenizer;
  expect({ vocabSize, bosId, eosId }).toEqual({
    vocabSize: golden.vocabSize,
    bosId: golden.bosId,
    eosId: golden.eosId,
  });
  expect(golden.cases.length).toBeGreaterThanOrEqual(30);
  for (const { text, ids, plainIds, decoded, decodedWithSpecial } of golden.cases) {
    expect(tokenizer.encode(text), text).toEqual(ids);
    expect(tokenizer.encode(text, { addSpecialTokens: false }), text).toEqual(plainIds);
    expect(tokenizer.decode(ids), text).toBe(decoded);
    expect(tokenizer.decode(ids, { skipSpecialTokens: false }), text).toBe(decodedWithSpecial);
  }
  for (const { ids, decoded } of golden.decodes) expect(tokenizer.decode(ids), `${ids}`).toBe(decoded);
  expect(tokenizer.decode([])).toBe("");
});

test.skipIf(!hasShared)(
  "the ids of GPT-2's and Qwen2's tokenizers are those of the published test vectors",
  async () => {
    for (const [directory, vectors] of [
      ["gpt2", "gpt-2"], // tokenizer.json
      ["qwen2.5", "qwen2"], // vocab.json and merges.txt
    ]) {
      const tokenizer = await loadTokenizer(diskDirectory(shared(`tokenizers/${directory}`)));
      const file = (ending: string): Promise<string> =>
        readFile(shared(`tokenizers/vectors/ggml-vocab-${vectors}.gguf.${ending}`), "utf8");
      const texts = (await file("inp")).split("\n__ggml_vocab_test__\n");
      const lines = (await file("out")).split("\n");
      expect(texts).toHaveLength(47);
      for (const [i, text] of texts.entries()) {
        const ids = (lines[i] ?? "").trim().split(/\s+/).filter(Boolean).map(Number);
        expect(tokenizer.encode(text, { addSpecialTokens: false }), JSON.stringify(text)).toEqual(ids);
      }
    }
  },
);

test.skipIf(!hasShared)(
  "text goes through SmolLM's and Qwen2's tokenizers and back, special tokens as they are",
  async () => {
    const texts = [
      "Hello, world!",
      "  two  spaces\n\n\ttab",
      "naïve café 北京 🚀🏳️‍🌈",
      "<|im_start|>user\nHi<|im_end|>\n",
      "1234567 − 0.5",
    ];
    for (const directory of ["smollm", "qwen2.5"]) {
      const tokenizer = await loadTokenizer(diskDirectory(shared(`tokenizers/${directory}`)));
      for (const text of texts) {
        const ids = tokenizer.encode(text, { addSpecialTokens: false });
        expect(tokenizer.decode(ids, { skipSpecialTokens: false })).toBe(text);
      }
      const chat = tokenizer.encode("<|im_start|>user<|im_end|>", { addSpecialTokens: false });
      expect(chat).toHaveLength(3);
      expect(tokenizer.decode(chat)).toBe("user");
      expect(tokenizer.eosId).toBeDefined();
    }
  },
);

test("a vocabulary and its merges are a tokenizer, of GPT-2's or Qwen2's kind", async () => {
  const vocab = Object.fromEntries(["a", "b", "c", "Ġ", "1", "2", "ab", "Ġab", "12"].map((token, id) => [token, id]));
  const files = { "vocab.json": JSON.stringify(vocab), "merges.txt": "#version: 0.2\na b\nĠ ab\n1 2\n" };
  const gpt2 = await loadTokenizer(memoryDirectory("m", files));
  expect(gpt2.encode("ab abc12")).toEqual([6, 7, 2, 8]);
  expect(gpt2.decode([6, 7, 2, 8])).toBe("ab abc12");
  expect(gpt2.eosId).toBeUndefined();
  const named = { ...vocab, "<|endoftext|>": 9 };
  const ended = await loadTokenizer(memoryDirectory("m", { ...files, "vocab.json": JSON.stringify(named) }));
  expect([ended.eosId, ended.bosId], "as transformers has it for GPT-2, whose files name none").toEqual([9, 9]);
  const config = {
    tokenizer_class: "Qwen2Tokenizer",
    eos_token: "<end>",
    added_tokens_decoder: { 9: { content: "<end>", special: true, normalized: false, lstrip: false, rstrip: false } },
  };
  const qwen = await loadTokenizer(memoryDirectory("m", { ...files, "tokenizer_config.json": JSON.stringify(config) }));
  expect(qwen.encode("ab12<end>")).toEqual([6, 4, 5, 9]); // digits one by one
  expect(qwen.eosId).toBe(9);
  await expect(
    loadTokenizer(memoryDirectory("m", { ...files, "tokenizer_config.json": '{"tokenizer_class":"MarianTokenizer"}' })),
  ).rejects.toThrow(FormatError);
});

test("a model without a tokenizer, or with one that is no tokenizer, is told apart", async () => {
  await expect(loadTokenizer(memoryDirectory("m", {}))).rejects.toThrow(
    new FormatError(
      "m/tokenizer.json: must be there to turn text into ids, or vocab.json and merges.txt of GPT-2 or Qwen2, got neither. Copy it from the model, or train on rows of input_ids",
    ),
  );
  await expect(loadTokenizer(memoryDirectory("m", { "tokenizer.json": "{}" }))).rejects.toThrow(
    /^m\/tokenizer\.json: must be a tokenizer that @huggingface\/tokenizers knows, got Error: .+/,
  );
});
