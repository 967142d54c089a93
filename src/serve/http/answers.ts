/** Answers as OpenAI's JSON, whole or in chunks. */
import type { Tokenizer } from "../../io/tokenizer.ts";
import type { ScoredToken } from "../sampling.ts";
import { type TextPiece, type TextToken, tokenText } from "../text.ts";

/** What all parts of an answer begin with. */
export interface AnswerHead {
  readonly id: string;
  /** Seconds since 1970. */
  readonly created: number;
  readonly model: string;
  readonly system_fingerprint: string;
}

export interface Usage {
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
  readonly total_tokens: number;
}

/** How one of OpenAI's two endpoints writes an answer. */
export interface AnswerStyle {
  readonly idPrefix: string;
  /** Values of `object`. */
  readonly whole: string;
  readonly chunk: string;
  /** The answer in a choice: `text` whole. */
  wholeText(text: string): object;
  /** What a stream begins with, before there is text. */
  readonly beginning: object | undefined;
  /** More text in a choice of a chunk; none in the last. */
  moreText(text: string | undefined): object;
  logprobs(tokens: readonly TextToken[], texts: TokenTexts): object;
}

/** Texts of tokens, each made once. */
export class TokenTexts {
  readonly #tokenizer: Tokenizer;
  readonly #texts = new Map<number, string>();

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
  }

  of(id: number): string {
    const text = this.#texts.get(id) ?? tokenText(this.#tokenizer, id);
    this.#texts.set(id, text);
    return text;
  }
}

/** JSON has no −∞: OpenAI's value for it. */
const finite = (logprob: number): number => Math.max(logprob, -9999);

export const chatStyle: AnswerStyle = {
  ...{ idPrefix: "chatcmpl-", whole: "chat.completion", chunk: "chat.completion.chunk" },
  wholeText: (content) => ({ message: { role: "assistant", content, refusal: null } }),
  beginning: { delta: { role: "assistant", content: "" } },
  moreText: (content) => ({ delta: content === undefined ? {} : { content } }),
  logprobs(tokens, texts) {
    const scored = ({ id, logprob }: ScoredToken): object => {
      const token = texts.of(id);
      // A part of a character has bytes, but no tokenizer says which.
      const bytes = token.includes("\ufffd") ? null : [...new TextEncoder().encode(token)];
      return { token, logprob: finite(logprob), bytes };
    };
    return { content: tokens.map((one) => ({ ...scored(one), top_logprobs: one.top.map(scored) })), refusal: null };
  },
};

/** Log-probabilities by texts, of equal ones (parts of characters) that of the first. */
function byText(tokens: readonly ScoredToken[], texts: TokenTexts): Record<string, number> {
  const logprobs = new Map<string, number>();
  for (const { id, logprob } of tokens) {
    const text = texts.of(id);
    if (!logprobs.has(text)) logprobs.set(text, finite(logprob));
  }
  return Object.fromEntries(logprobs);
}

export const completionStyle: AnswerStyle = {
  ...{ idPrefix: "cmpl-", whole: "text_completion", chunk: "text_completion" },
  wholeText: (text) => ({ text }),
  beginning: undefined,
  moreText: (text = "") => ({ text }),
  logprobs: (tokens, texts) => ({
    tokens: tokens.map(({ id }) => texts.of(id)),
    token_logprobs: tokens.map(({ logprob }) => finite(logprob)),
    top_logprobs: tokens.map((one) => byText([...one.top, one], texts)),
    text_offset: tokens.map(({ characters }) => characters),
  }),
};

export interface AnswerOptions {
  readonly style: AnswerStyle;
  readonly head: AnswerHead;
  readonly promptTokens: number;
  /** Of tokens, where log-probabilities are asked for. */
  readonly texts: TokenTexts | undefined;
}

const usageOf = (promptTokens: number, count: number): Usage => ({
  ...{ prompt_tokens: promptTokens, completion_tokens: count, total_tokens: promptTokens + count },
});

/** What of the tokens is in the text: not those of a stop. */
const shown = (tokens: readonly TextToken[], length: number): TextToken[] =>
  tokens.filter(({ offset }) => offset < length);

/** A piece of one of the choices. */
export type Indexed = readonly [index: number, piece: TextPiece];

/** The answer in one object. */
export async function wholeAnswer(pieces: AsyncIterable<Indexed>, options: AnswerOptions): Promise<object> {
  const { style, head, promptTokens, texts } = options;
  const choices: { text: string; reason: TextPiece["finishReason"]; readonly tokens: TextToken[] }[] = [];
  for await (const [index, piece] of pieces) {
    const choice = choices[index] ?? { text: "", reason: undefined, tokens: [] };
    choices[index] = choice;
    choice.text += piece.text;
    choice.tokens.push(...piece.tokens);
    choice.reason = piece.finishReason;
  }
  const said = choices.map(({ text, reason, tokens }, index) => {
    const logprobs = texts ? style.logprobs(shown(tokens, text.length), texts) : null;
    return { index, ...style.wholeText(text), logprobs, finish_reason: reason };
  });
  const count = choices.reduce((sum, { tokens }) => sum + tokens.length, 0);
  return { object: style.whole, ...head, choices: said, usage: usageOf(promptTokens, count) };
}

/** The answer in chunks: of each choice the text, then the reason of its end; then the counts where they are asked for. */
export async function* answerChunks(
  pieces: AsyncIterable<Indexed>,
  { style, head, promptTokens, texts, includeUsage }: AnswerOptions & { readonly includeUsage: boolean },
): AsyncGenerator<object, void, undefined> {
  const chunk = (choices: readonly object[], usage: Usage | null = null): object => ({
    ...{ object: style.chunk, ...head, choices },
    ...(includeUsage && { usage }),
  });
  const lengths: number[] = [];
  let count = 0;
  for await (const [index, { text, tokens, finishReason }] of pieces) {
    const choice = (what: object, its: readonly TextToken[] = [], reason: string | null = null): object[] => {
      const logprobs = texts && its.length > 0 ? style.logprobs(its, texts) : null;
      return [{ index, ...what, logprobs, finish_reason: reason }];
    };
    if (lengths[index] === undefined && style.beginning) yield chunk(choice(style.beginning));
    const length = (lengths[index] ?? 0) + text.length;
    lengths[index] = length;
    count += tokens.length;
    if (text !== "") yield chunk(choice(style.moreText(text), shown(tokens, length)));
    if (finishReason) yield chunk(choice(style.moreText(undefined), [], finishReason));
  }
  if (includeUsage) yield chunk([], usageOf(promptTokens, count));
}
