/** Tokenizers that need no files. */
import type { TokenBytes, Tokenizer } from "../../src/io/tokenizer.ts";

/** One token per byte; 256 ends a text, 257 begins one. */
export function bytesTokenizer(): Tokenizer {
  const special = ["</s>", "<s>"];
  return {
    encode: (text, { addSpecialTokens = true } = {}) => [
      ...(addSpecialTokens ? [257] : []),
      ...new TextEncoder().encode(text),
    ],
    decode: (ids, { skipSpecialTokens = true } = {}) => {
      const bytes = ids.flatMap((id) =>
        id < 256 ? [id] : skipSpecialTokens ? [] : [...new TextEncoder().encode(special[id - 256])],
      );
      return new TextDecoder().decode(Uint8Array.from(bytes));
    },
    bosId: 257,
    eosId: 256,
    vocabSize: 258,
  };
}

/** A token for each character, and for each of four special tokens, those of ChatML among them. */
export function charactersTokenizer(): Tokenizer & TokenBytes {
  const special = ["</s>", "<s>", "<|im_start|>", "<|im_end|>"];
  const first = 0x10000;
  return {
    encode: (text) =>
      text
        .split(/(<\/?s>|<\|im_\w+\|>)/)
        .flatMap((part) =>
          special.includes(part)
            ? [first + special.indexOf(part)]
            : Array.from(part, (c) => c.codePointAt(0) as number),
        ),
    decode: (ids, { skipSpecialTokens = true } = {}) =>
      ids
        .map((id) => (id < first ? String.fromCodePoint(id) : skipSpecialTokens ? "" : (special[id - first] as string)))
        .join(""),
    tokenBytes: (id) => (id < first ? new TextEncoder().encode(String.fromCodePoint(id)) : undefined),
    ...{ bosId: first + 1, eosId: first, vocabSize: first + special.length },
  };
}
