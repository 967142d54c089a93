/** From tokens to text, as they come. */
import type { Tokenizer } from "../io/tokenizer.ts";
import type { SampledToken } from "./sampling.ts";

export interface TextToken extends SampledToken {
  /** Where its text begins in the answer; a token that ends a character begun before has that character's place. */
  readonly offset: number;
  /** The same in characters, of which one beyond U+FFFF counts once. */
  readonly characters: number;
}

export interface TextPiece {
  /** What the answer's text grows by; a text that was given never changes. */
  readonly text: string;
  /** The tokens since the piece before. Those whose offset is beyond the text so far are of a stop, or have no text. */
  readonly tokens: readonly TextToken[];
  /** Of the last piece alone: "length" where no more tokens were allowed or fitted, else "stop". */
  readonly finishReason: "stop" | "length" | undefined;
}

export interface TextOptions {
  readonly tokenizer: Tokenizer;
  /** What the tokens continue. */
  readonly promptIds: readonly number[];
  /** The answer ends before the first of these texts, wherever the borders of tokens are. */
  readonly stop?: readonly string[] | undefined;
  /** So many tokens may come at most. */
  readonly room: number;
  /** Whether the answer is whole where it ends, although no end of text came. */
  readonly isDone?: (() => boolean) | undefined;
}

/**
 * The text of an answer. Characters are given whole, and what may begin a stop is held back only as long as it may. Ends, and ends the tokens, at a
 * stop or the tokenizer's own end of text. The last piece, and it alone, has a `finishReason`.
 */
export async function* textOf(
  tokens: AsyncIterable<SampledToken>,
  { tokenizer, promptIds, stop = [], room, isDone }: TextOptions,
): AsyncGenerator<TextPiece, void, undefined> {
  const decoder = new AnswerDecoder(tokenizer, promptIds);
  const search = new StopSearch(stop);
  let waiting: TextToken[] = [];
  let [count, decoded, characters, given] = [0, 0, 0, 0];
  const taken = (added: string): string => {
    decoded += added.length;
    characters += [...added].length;
    return search.push(added);
  };
  for await (const token of tokens) {
    if (token.id === tokenizer.eosId) break;
    count++;
    waiting.push({ ...token, offset: decoded, characters });
    const text = taken(decoder.push(token.id));
    if (search.isFound) {
      yield { text, tokens: waiting, finishReason: "stop" };
      return;
    }
    if (text === "") continue;
    given += text.length;
    yield { text, tokens: waiting.filter(({ offset }) => offset < given), finishReason: undefined };
    waiting = waiting.filter(({ offset }) => offset >= given);
  }
  const rest = taken(decoder.end());
  const text = search.isFound ? rest : rest + search.end();
  yield { text, tokens: waiting, finishReason: search.isFound || count < room || isDone?.() ? "stop" : "length" };
}

/** A character is at most so many bytes, so a token that does not end one is one of so many at most. */
const LONGEST_CHARACTER = 4;
/** Tokens before, which a decoder is shown with the new ones: at the start of a text it may drop a space. */
const CONTEXT = 4;
/** As many at most where they begin within a character. */
const LONGEST_CONTEXT = 64;

/** Turns the ids of one answer into text, each looked at a few times only, however long the answer. */
class AnswerDecoder {
  readonly #tokenizer: Tokenizer;
  /** Ids that were decoded, in groups that end where a character does. */
  #context: readonly (readonly number[])[];
  #contextText: string;
  #pending: number[] = [];

  constructor(tokenizer: Tokenizer, promptIds: readonly number[]) {
    this.#tokenizer = tokenizer;
    const end: number[] = [];
    const isEnough = (): boolean => end.length >= CONTEXT && /^[^\ufffd]/.test(tokenizer.decode(end));
    for (let i = promptIds.length - 1; i >= 0 && end.length < LONGEST_CONTEXT && !isEnough(); i--)
      if (this.#hasText(promptIds.slice(i, i + 1))) end.unshift(promptIds[i] as number);
    this.#context = [end];
    this.#contextText = tokenizer.decode(end);
  }

  /** Whether they are no special tokens. By the second time a space is one that is not dropped. */
  #hasText(ids: readonly number[]): boolean {
    return this.#tokenizer.decode([...ids, ...ids]) !== "";
  }

  /** The text that is certain with this id. */
  push(id: number): string {
    this.#pending.push(id);
    const text = this.#added(this.#pending);
    if (text !== undefined && !text.endsWith("\ufffd")) return this.#settle(this.#pending.length, text);
    if (this.#pending.length <= LONGEST_CHARACTER) return "";
    // No later byte can make a character of the oldest.
    const oldest = this.#pending.slice(0, 1);
    return this.#settle(1, this.#added(oldest) ?? this.#tokenizer.decode(oldest));
  }

  /** What is left, with U+FFFD for a character that is not whole. */
  end(): string {
    return this.#added(this.#pending) ?? this.#tokenizer.decode(this.#pending);
  }

  /** What the ids add to the text of the context; undefined where they change it, as bytes that are not a character yet may. */
  #added(ids: readonly number[]): string | undefined {
    const all = this.#tokenizer.decode([...this.#context.flat(), ...ids]);
    return all.startsWith(this.#contextText) ? all.slice(this.#contextText.length) : undefined;
  }

  #settle(count: number, text: string): string {
    const settled = this.#pending.slice(0, count);
    this.#pending = this.#pending.slice(count);
    if (text === "" && !this.#hasText(settled)) return "";
    const groups = [...this.#context, settled];
    while (groups.length > 1 && groups.slice(1).flat().length >= CONTEXT) {
      if (this.#tokenizer.decode(groups.slice(1).flat()) === "") break;
      groups.shift();
    }
    this.#context = groups;
    this.#contextText = this.#tokenizer.decode(groups.flat());
    return text;
  }
}

/** Looks for stops in a text that comes in pieces. */
class StopSearch {
  readonly #stops: readonly string[];
  readonly #longest: number;
  #held = "";
  isFound = false;

  constructor(stops: readonly string[]) {
    this.#stops = stops;
    this.#longest = Math.max(0, ...stops.map((stop) => stop.length));
  }

  /** What of the text so far is no stop and can become none. */
  push(piece: string): string {
    const text = this.#held + piece;
    const places = this.#stops.map((stop) => text.indexOf(stop)).filter((place) => place >= 0);
    this.isFound = places.length > 0;
    if (this.isFound) return text.slice(0, Math.min(...places));
    let at = Math.max(0, text.length - this.#longest + 1);
    while (at < text.length && !this.#stops.some((stop) => stop.startsWith(text.slice(at)))) at++;
    this.#held = text.slice(at);
    return text.slice(0, at);
  }

  /** What was held back. */
  end(): string {
    return this.#held;
  }
}

/** One token's own text, with the space that it begins with, special tokens too; U+FFFD where it is a part of a character. */
export function tokenText(tokenizer: Tokenizer, id: number): string {
  const [one, two] = [[id], [id, id]].map((ids) => tokenizer.decode(ids, { skipSpecialTokens: false }));
  return (two ?? "").slice((one ?? "").length); // a decoder may drop the space at the start of a text
}
