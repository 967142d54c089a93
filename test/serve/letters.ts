/** A tokenizer and a chat template that need no files, for a model of 64 tokens; they run in a page, too. */
import type { ChatTemplate } from "../../src/io/chat-template.ts";
import type { TokenBytes, Tokenizer } from "../../src/io/tokenizer.ts";

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456 ."; // 61
const FIRST = 3;

/** One token for each of 61 letters, from id 3 on; 1 begins a text, 2 ends it. What is no letter has no token. */
export const lettersTokenizer: Tokenizer & TokenBytes = {
  encode: (text, { addSpecialTokens = true } = {}) => [
    ...(addSpecialTokens ? [1] : []),
    ...[...text].map((letter) => LETTERS.indexOf(letter) + FIRST).filter((id) => id >= FIRST),
  ],
  decode: (ids) => ids.map((id) => LETTERS[id - FIRST] ?? "").join(""),
  tokenBytes: (id) => (LETTERS[id - FIRST] === undefined ? undefined : new TextEncoder().encode(LETTERS[id - FIRST])),
  bosId: 1,
  eosId: 2,
  vocabSize: 64,
};

/** "user hello. assistant " */
export const lettersTemplate: ChatTemplate = {
  render: ({ messages, addGenerationPrompt }) =>
    messages.map(({ role, content }) => `${role} ${content}. `).join("") + (addGenerationPrompt ? "assistant " : ""),
};
