/** Tokenizers that need no files. */
import type { Tokenizer } from "../../src/io/tokenizer.ts";

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
