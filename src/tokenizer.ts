/** `lowrank/tokenizer`: text ⇄ token ids. */
export {
  type EncodedTexts,
  loadTokenizer,
  type PairTokenizer,
  type TokenBytes,
  type Tokenizer,
} from "./io/tokenizer.ts";
