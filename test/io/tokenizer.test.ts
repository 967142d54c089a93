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

test.skipIf(!hasShared)("the ids of GPT-2's tokenizer are those of the published test vectors", async () => {
  const tokenizer = await loadTokenizer(diskDirectory(shared("tokenizers/gpt2")));
  const vectors = shared("tokenizers/vectors/ggml-vocab-gpt-2.gguf");
  const texts = (await readFile(`${vectors}.inp`, "utf8")).split("\n__ggml_vocab_test__\n");
  const ids = (await readFile(`${vectors}.out`, "utf8"))
    .split("\n")
    .map((line) => line.trim().split(/\s+/).map(Number));
  expect(texts.length).toBeGreaterThan(40);
  for (const [i, text] of texts.entries())
    if (text !== "") expect(tokenizer.encode(text), JSON.stringify(text)).toEqual(ids[i]);
  expect(tokenizer.bosId).toBeUndefined(); // no tokenizer_config.json there
});

test("a model without a tokenizer, or with one that is no tokenizer, is told apart", async () => {
  await expect(loadTokenizer(memoryDirectory("m", {}))).rejects.toThrow(
    new FormatError(
      "m/tokenizer.json: must be there to turn text into ids, got no such file. Copy it from the model, or train on rows of input_ids",
    ),
  );
  await expect(loadTokenizer(memoryDirectory("m", { "tokenizer.json": "{}" }))).rejects.toThrow(
    /^m\/tokenizer\.json: must be a tokenizer that @huggingface\/tokenizers knows, got Error: .+/,
  );
});
