/** `lowrank/tokenizer`: text ⇄ token ids. */
export { loadTokenizer, type Tokenizer } from "./io/tokenizer.ts";
