/** Chats → token ids, and where the assistant's turns stand in them. */
import type { ChatTemplate } from "../../io/chat-template.ts";
import { FormatError } from "../../io/errors.ts";
import type { JsonObject } from "../../io/json.ts";
import { isSpecial } from "../../io/special-tokens.ts";
import type { Tokenizer } from "../../io/tokenizer.ts";
import type { Example } from "./forms.ts";
import { commonPrefix, commonSuffix, type Encoded, type LossOn, masked, type Span } from "./masks.ts";

type ChatExample = Extract<Example, { kind: "chat" }>;
type IdsOf = (messages: readonly JsonObject[], addGenerationPrompt?: boolean) => number[];

/**
 * A template says nothing about which of its text is whose, so turns are found by writing parts of the chat. A turn starts where the
 * messages before it end, written with the prompt for an answer; it ends where the messages up to it end. Both are to be prefixes of
 * the whole. The token that ends a turn is learned, white space that the template writes after it is not.
 *
 * Throws a FormatError where the template refuses the messages.
 */
export function chatRow(
  { messages, tools, prompted }: ChatExample,
  template: ChatTemplate,
  tokenizer: Tokenizer,
  lossOn: LossOn | undefined,
  where: string,
): Encoded {
  const idsOf: IdsOf = (part, addGenerationPrompt = false) =>
    tokenizer.encode(written(template, { messages: part, tools, addGenerationPrompt }, where), {
      addSpecialTokens: false,
    });
  const inputIds = idsOf(messages);
  if (lossOn === "all") return { inputIds, labels: inputIds, unclear: false };
  const turns = learnedTurns(messages, prompted, lossOn);
  const spans = turns.map((turn) => turnSpan(inputIds, messages, turn, idsOf, tokenizer));
  const labels = masked(
    inputIds,
    spans.map(({ span }) => span),
  );
  return { inputIds, labels, unclear: spans.some(({ unclear }) => unclear) };
}

function written(template: ChatTemplate, chat: Parameters<ChatTemplate["render"]>[0], where: string): string {
  try {
    return template.render(chat);
  } catch (error) {
    throw error instanceof FormatError ? new FormatError(`${where}: ${error.message}`) : error;
  }
}

/** The messages of the assistant that are learned. */
function learnedTurns(messages: readonly JsonObject[], prompted: number | undefined, lossOn?: LossOn): number[] {
  const turns = [...messages.keys()].filter((i) => messages[i]?.role === "assistant");
  if (lossOn === "last" || (lossOn === "completion" && prompted === undefined)) return turns.slice(-1);
  return lossOn === "assistant" || prompted === undefined ? turns : turns.filter((i) => i >= prompted);
}

function turnSpan(
  ids: readonly number[],
  messages: readonly JsonObject[],
  turn: number,
  idsOf: IdsOf,
  tokenizer: Tokenizer,
): { readonly span: Span; readonly unclear: boolean } {
  if (turn === 0) {
    const [start, end] = contentSpan(ids, messages, turn, idsOf);
    return { span: [start, endOfTurn(ids, end, tokenizer)], unclear: false };
  }
  const before = idsOf(messages.slice(0, turn), true);
  const start = commonPrefix(before, ids);
  const upTo = idsOf(messages.slice(0, turn + 1));
  const end =
    commonPrefix(upTo, ids) === upTo.length
      ? withoutSpace(ids, start, upTo.length, tokenizer)
      : endOfTurn(ids, contentSpan(ids, messages, turn, idsOf)[1], tokenizer);
  return { span: [start, end], unclear: start < before.length };
}

/**
 * Where the ids change when the message says something else: for templates that write the last turn in another way than those before it,
 * and for a first turn, which has nothing before it.
 */
function contentSpan(ids: readonly number[], messages: readonly JsonObject[], turn: number, idsOf: IdsOf): Span {
  const { tool_calls: _, content, ...rest } = messages[turn] ?? {};
  const other = { ...rest, content: String(content).endsWith("x") ? "y" : "x" };
  const changed = idsOf([...messages.slice(0, turn), other, ...messages.slice(turn + 1)]);
  const start = commonPrefix(changed, ids);
  return [start, Math.max(start, ids.length - commonSuffix(changed, ids))];
}

/** Past the special token that follows, if one does. */
const endOfTurn = (ids: readonly number[], end: number, tokenizer: Tokenizer): number =>
  end < ids.length && isSpecial(ids[end], tokenizer) ? end + 1 : end;

/** Without white space after the special token that ends it, if one does. */
function withoutSpace(ids: readonly number[], start: number, end: number, tokenizer: Tokenizer): number {
  let last = end;
  while (last > start && isBlank(ids[last - 1], tokenizer)) last--;
  return last > start && isSpecial(ids[last - 1], tokenizer) ? last : end;
}

const isBlank = (id: number | undefined, tokenizer: Tokenizer): boolean =>
  id !== undefined && /^\s+$/.test(tokenizer.decode([id], { skipSpecialTokens: false }));
