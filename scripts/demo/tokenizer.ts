/** Trains the demo's tokenizer, a byte-level BPE of 512 tokens, on its stories and writes it to demo/base/. */
import { mkdirSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { baseStories } from "./language.ts";

const VOCAB_SIZE = 512;
const SPECIALS = ["<s>", "</s>"];
const MAX_LENGTH = 256;

/** How GPT-2's byte-level BPE splits text before it merges; no merge crosses a piece. */
const PIECES = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/**
 * GPT-2's name for each byte: a printable byte is itself, the others are U+0100, U+0101, … in order,
 * so that a space is "Ġ" and a newline "Ċ".
 */
export function byteAlphabet(): string[] {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    return String.fromCodePoint(printable ? byte : next++);
  });
}

/**
 * The `count` merges of byte-level BPE (arXiv:1508.07909, algorithm 1): again and again the most frequent pair of
 * neighbours, the first in code-unit order among equals, becomes one token. Fewer if nothing is left to merge.
 */
export function trainBpe(texts: readonly string[], count: number): (readonly [left: string, right: string])[] {
  const alphabet = byteAlphabet();
  const frequency = new Map<string, number>();
  for (const text of texts) {
    for (const [piece] of text.matchAll(PIECES)) frequency.set(piece, (frequency.get(piece) ?? 0) + 1);
  }
  const utf8 = new TextEncoder();
  const words = [...frequency].map(([piece, times]) => ({
    times,
    tokens: Array.from(utf8.encode(piece), (byte) => alphabet[byte] ?? ""),
  }));
  const merges: [string, string][] = [];
  while (merges.length < count) {
    const pairs = new Map<string, number>();
    for (const { times, tokens } of words) {
      for (let i = 1; i < tokens.length; i++) {
        const pair = `${tokens[i - 1]} ${tokens[i]}`;
        pairs.set(pair, (pairs.get(pair) ?? 0) + times);
      }
    }
    let best: readonly [pair: string, times: number] | undefined;
    for (const entry of pairs) {
      if (!best || entry[1] > best[1] || (entry[1] === best[1] && entry[0] < best[0])) best = entry;
    }
    if (!best) break;
    const [left = "", right = ""] = best[0].split(" ");
    merges.push([left, right]);
    for (const { tokens } of words) {
      for (let i = 1; i < tokens.length; i++) {
        if (tokens[i - 1] === left && tokens[i] === right) tokens.splice(i - 1, 2, left + right);
      }
    }
  }
  return merges;
}

/** The files of demo/base/ that are the tokenizer, by name. The same on every machine. */
export function tokenizerFiles(): Record<string, string> {
  const alphabet = byteAlphabet();
  const merges = trainBpe(baseStories(1, 8000), VOCAB_SIZE - SPECIALS.length - alphabet.length);
  const tokens = [...SPECIALS, ...alphabet, ...merges.map((pair) => pair.join(""))];
  const [bos = "", eos = ""] = SPECIALS;
  const byteLevel = { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true };
  const special = (content: string, id: number): object => {
    return { id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  };
  const sequence = (id: string, type_id: number): object[] => {
    return [{ SpecialToken: { id: bos, type_id } }, { Sequence: { id, type_id } }];
  };
  const json = (value: object): string => `${JSON.stringify(value, null, 2)}\n`;
  return {
    "tokenizer.json": json({
      version: "1.0",
      truncation: null,
      padding: null,
      added_tokens: SPECIALS.map(special),
      normalizer: null,
      pre_tokenizer: byteLevel,
      post_processor: {
        type: "TemplateProcessing",
        single: sequence("A", 0),
        pair: [...sequence("A", 0), ...sequence("B", 1)],
        special_tokens: { [bos]: { id: bos, ids: [0], tokens: [bos] } },
      },
      decoder: byteLevel,
      model: {
        type: "BPE",
        dropout: null,
        unk_token: null,
        continuing_subword_prefix: null,
        end_of_word_suffix: null,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: false,
        vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
        merges: merges.map((pair) => pair.join(" ")),
      },
    }),
    "tokenizer_config.json": json({
      tokenizer_class: "PreTrainedTokenizerFast",
      bos_token: bos,
      eos_token: eos,
      pad_token: eos,
      add_prefix_space: false,
      clean_up_tokenization_spaces: false,
      model_max_length: MAX_LENGTH,
    }),
    "special_tokens_map.json": json({ bos_token: bos, eos_token: eos, pad_token: eos }),
  };
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  const directory = new URL("../../demo/base/", import.meta.url);
  mkdirSync(directory, { recursive: true });
  for (const [name, text] of Object.entries(tokenizerFiles())) writeFileSync(new URL(name, directory), text);
}
