/** Text ⇄ token ids, by `@huggingface/tokenizers` from the `tokenizer.json` beside a model. */
import { Tokenizer as Library } from "@huggingface/tokenizers";
import type { Directory } from "./bytes.ts";
import { FormatError } from "./errors.ts";
import { isObject, type JsonObject, readJson, readText } from "./json.ts";

const LIMIT_BYTES = 50e6;

/** A text as ids and back. */
export interface Tokenizer {
  /** Token ids; with the special tokens that the model's template adds (such as a first `<s>`) unless told not to. */
  encode(text: string, options?: { readonly addSpecialTokens?: boolean }): number[];
  /** The text of these ids; special tokens are left out unless told not to. */
  decode(ids: readonly number[], options?: { readonly skipSpecialTokens?: boolean }): string;
  readonly bosId: number | undefined;
  readonly eosId: number | undefined;
  /** One more than the largest id. */
  readonly vocabSize: number;
}

/** A text, or two, as encoders read them: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP]. */
export interface EncodedTexts {
  readonly ids: readonly number[];
  /** Of each token: 1 for those of the pair and what ends it, by the tokenizer's template, else 0. */
  readonly tokenTypes: readonly number[];
  /** Whether something was cut off. */
  readonly isCut: boolean;
}

/** Tokens as bytes of UTF-8, of which one may have a part of a character. */
export interface TokenBytes {
  readonly eosId: number | undefined;
  /** What a token adds within a text; undefined for a special token, and where there is none. */
  tokenBytes(id: number): Uint8Array | undefined;
}

export interface PairTokenizer extends Tokenizer, TokenBytes {
  /**
   * The ids of one text or a pair, with special tokens. Of more than `maxLength`, tokens of the texts are cut off at their ends, of the longer
   * text first, as transformers does (truncation "longest_first").
   */
  encodeTexts(text: string, pair: string | undefined, maxLength: number): EncodedTexts;
}

/**
 * From tokenizer.json, or vocab.json and merges.txt of GPT-2 and Qwen2, with tokenizer_config.json and special_tokens_map.json (which may be
 * missing). Throws a FormatError.
 */
export async function loadTokenizer(directory: Directory): Promise<PairTokenizer> {
  const name = `${directory.name}/tokenizer.json`;
  const config = (await readJson(directory, "tokenizer_config.json", LIMIT_BYTES)) ?? {};
  const definition =
    (await readJson(directory, "tokenizer.json", LIMIT_BYTES)) ?? (await fromVocabulary(directory, config));
  if (!definition)
    throw new FormatError(
      `${name}: must be there to turn text into ids, or vocab.json and merges.txt of GPT-2 or Qwen2, got neither. Copy it from the model, or train on rows of input_ids`,
    );
  const special = (await readJson(directory, "special_tokens_map.json", LIMIT_BYTES)) ?? {};
  const library = attempt(name, () => new Library(definition, config));
  repairByteFallback(library.decoder as LibraryDecoder | null);

  const idOf = (role: string): number | undefined => {
    const token = tokenText(config[role]) ?? tokenText(special[role]);
    if (token !== undefined) return library.token_to_id(token);
    // GPT-2's own files name none: transformers has it in the class.
    return role in config || role in special ? undefined : library.token_to_id("<|endoftext|>");
  };
  // As transformers 5 does: the clean-up strips real spaces, so it is off unless asked for, and never done for BPE.
  const cleanUp = config.clean_up_tokenization_spaces === true && (definition.model as JsonObject).type !== "BPE";
  const decode: Tokenizer["decode"] = (ids, { skipSpecialTokens = true } = {}) =>
    ids.length === 0
      ? "" // the library throws
      : library.decode([...ids], { skip_special_tokens: skipSpecialTokens, clean_up_tokenization_spaces: cleanUp });
  const bytes = new Map<number, Uint8Array | undefined>();
  return {
    encode: (text, { addSpecialTokens = true } = {}) =>
      library.encode(text, { add_special_tokens: addSpecialTokens }).ids,
    decode,
    tokenBytes: (id) => {
      if (!bytes.has(id)) bytes.set(id, bytesOf(library, id, decode));
      return bytes.get(id);
    },
    encodeTexts: (text, pair, maxLength) => encodeTexts(library, [text, pair], maxLength),
    bosId: idOf("bos_token"),
    eosId: idOf("eos_token"),
    vocabSize: [...library.get_vocab().values()].reduce((largest, id) => Math.max(largest, id), -1) + 1,
  };
}

function encodeTexts(
  library: Library,
  [text, pair]: readonly [string, string | undefined],
  maxLength: number,
): EncodedTexts {
  const plain = (t: string | undefined): number[] =>
    t === undefined ? [] : library.encode(t, { add_special_tokens: false }).ids;
  const options = { text_pair: pair ?? null, return_token_type_ids: true } as const;
  const { ids, token_type_ids: types = ids.map(() => 0) } = library.encode(text, options);
  const [a, b] = [plain(text), plain(pair)];
  const room = Math.max(0, maxLength - (ids.length - a.length - b.length));
  const [keptA, keptB] = keptLengths(a.length, b.length, room);
  const startA = firstOf(a, ids);
  const startB = startA + a.length + firstOf(b, ids.slice(startA + a.length));
  const isKept = (at: number): boolean =>
    !(at >= startA + keptA && at < startA + a.length) && !(at >= startB + keptB && at < startB + b.length);
  const kept = <T>(values: readonly T[]): T[] => values.filter((_, at) => isKept(at));
  return { ids: kept(ids), tokenTypes: kept(types), isCut: keptA + keptB < a.length + b.length };
}

/** How much is kept of two texts where there is room for so many tokens: the shorter whole if it fits into half. As `tokenizers` (Rust). */
function keptLengths(a: number, b: number, room: number): readonly [a: number, b: number] {
  if (a + b <= room) return [a, b];
  const half = Math.floor(room / 2);
  const least = Math.min(a, b, half);
  return a > b ? [room - least, least] : [least, room - least];
}

/** Where `part` begins in `whole`. */
const firstOf = (part: readonly number[], whole: readonly number[]): number =>
  Math.max(
    0,
    whole.findIndex((_, at) => part.every((id, i) => whole[at + i] === id)),
  );

/** How the byte-level tokenizers that came as two files cut text into words, as `tokenizers` has it for them. */
const BYTE_LEVEL: Readonly<Record<string, Readonly<Record<"normalizer" | "pre_tokenizer", JsonObject | null>>>> = {
  GPT2: {
    normalizer: null,
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
  },
  Qwen2: {
    normalizer: { type: "NFC" },
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        {
          type: "Split",
          pattern: {
            Regex: String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`,
          },
          behavior: "Isolated",
          invert: false,
        },
        { type: "ByteLevel", add_prefix_space: false, trim_offsets: false, use_regex: false },
      ],
    },
  },
};

/** What tokenizer.json would say, of a vocabulary and its merges; undefined where there are none, or of another tokenizer. */
async function fromVocabulary(directory: Directory, config: JsonObject): Promise<JsonObject | undefined> {
  const vocab = await readJson(directory, "vocab.json", LIMIT_BYTES);
  const merges = await readText(directory, "merges.txt", LIMIT_BYTES);
  const words = BYTE_LEVEL[String(config.tokenizer_class ?? "GPT2Tokenizer").replace(/Tokenizer(Fast)?$/, "")];
  if (!vocab || merges === undefined || !words) return undefined;
  const added = isObject(config.added_tokens_decoder) ? Object.entries(config.added_tokens_decoder) : [];
  return {
    version: "1.0",
    added_tokens: added.map(([id, token]) => ({ id: Number(id), ...(token as JsonObject) })),
    ...words,
    post_processor: null,
    decoder: { type: "ByteLevel", add_prefix_space: false, trim_offsets: false, use_regex: false },
    model: {
      ...{
        type: "BPE",
        vocab,
        merges: merges.split("\n").filter((line) => line !== "" && !line.startsWith("#version")),
      },
      ...{ dropout: null, unk_token: null, continuing_subword_prefix: "", end_of_word_suffix: "" },
      ...{ fuse_unk: false, byte_fallback: false, ignore_merges: false },
    },
  };
}

function attempt<T>(name: string, action: () => T): T {
  try {
    return action();
  } catch (error) {
    throw new FormatError(`${name}: must be a tokenizer that @huggingface/tokenizers knows, got ${String(error)}`);
  }
}

/** A special token is written as its text or as {"content": text}. */
const tokenText = (token: unknown): string | undefined =>
  typeof token === "string" ? token : isObject(token) && typeof token.content === "string" ? token.content : undefined;

/**
 * `tokenizers` (Rust) decodes a run of byte tokens that is not UTF-8 to one U+FFFD per byte and keeps a byte order mark;
 * the library (0.2.0) gives one U+FFFD per broken character and drops the mark. Puts the former in place of the latter.
 */
function repairByteFallback(decoder: LibraryDecoder | null): void {
  for (const part of decoder?.decoders ?? []) repairByteFallback(part);
  if (decoder?.config.type !== "ByteFallback") return;
  const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  decoder.decode_chain = (tokens) => {
    const out: string[] = [];
    let bytes: number[] = [];
    const flush = (): void => {
      try {
        if (bytes.length > 0) out.push(strict.decode(Uint8Array.from(bytes)));
      } catch {
        out.push("\ufffd".repeat(bytes.length));
      }
      bytes = [];
    };
    for (const token of tokens) {
      const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1];
      if (byte !== undefined) bytes.push(Number.parseInt(byte, 16));
      else {
        flush();
        out.push(token);
      }
    }
    flush();
    return out;
  };
}

function bytesOf(library: Library, id: number, decode: Tokenizer["decode"]): Uint8Array | undefined {
  const token = library.id_to_token(id);
  const added = library.get_added_tokens_decoder().get(id);
  if (token === undefined || added?.special) return undefined;
  const decoder = library.decoder as LibraryDecoder | null;
  const parts = decoder === null ? [] : [decoder, ...(decoder.decoders ?? [])];
  const levels = parts.find(({ config }) => config.type === "ByteLevel")?.byte_decoder;
  if (levels && !added) {
    const found = [...token].map((character) => levels[character]);
    return found.every((one) => one !== undefined) ? Uint8Array.from(found) : undefined;
  }
  const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1];
  if (byte !== undefined && parts.some(({ config }) => config.type === "ByteFallback"))
    return Uint8Array.of(Number.parseInt(byte, 16));
  const first = decode([id]); // a decoder may drop the space at the start of a text
  return new TextEncoder().encode(decode([id, id]).slice(first.length));
}

interface LibraryDecoder {
  readonly config: { readonly type?: string };
  /** Of a byte-level one: from the characters of tokens. */
  readonly byte_decoder?: Readonly<Record<string, number>>;
  readonly decoders?: readonly LibraryDecoder[];
  decode_chain(tokens: string[]): string[];
}
