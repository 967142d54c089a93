/** Records of two answers to one prompt. */
import { FormatError } from "../../io/errors.ts";
import { excerpt, type JsonObject } from "../../io/json.ts";
import type { Example } from "./forms.ts";
import { messagesOf, textOf, toolsOf } from "./messages.ts";

/** The forms, for messages. */
export const PAIR_FORMS = '{"prompt","chosen","rejected"} or {"chosen","rejected"}';

const KEYS = ["prompt", "chosen", "rejected", "tools"];

interface ParsedPair {
  /** "preference" */
  readonly form: string;
  readonly chosen: Example;
  readonly rejected: Example;
  /** Keys that say nothing. */
  readonly ignored: readonly string[];
}

/**
 * A pair of texts or of lists of messages. Without a prompt it is what both begin with. A prompt that is text beside conversations must be the
 * last message they share. Throws a FormatError.
 */
export function parsePair(record: JsonObject, where: string): ParsedPair {
  const keys = Object.keys(record);
  if (!["chosen", "rejected"].every((key) => keys.includes(key)))
    throw new FormatError(
      `${where}: a pair must be ${PAIR_FORMS}, got ${keys.map((key) => JSON.stringify(excerpt(key))).join(", ") || "no keys"}. Other rows are learned without --preference`,
    );
  const { prompt, chosen, rejected } = record;
  const isChat = Array.isArray(chosen);
  if (isChat !== Array.isArray(rejected) || (Array.isArray(prompt) && !isChat))
    throw new FormatError(`${where}: "prompt", "chosen" and "rejected" must all be strings, or all lists of messages`);
  const parts = isChat ? chats(record, where) : texts(record, where);
  return { form: "preference", ...parts, ignored: keys.filter((key) => !KEYS.includes(key)) };
}

type Answers = Pick<ParsedPair, "chosen" | "rejected">;

function texts(record: JsonObject, where: string): Answers {
  const chosen = textOf(record.chosen, "chosen", where);
  const rejected = textOf(record.rejected, "rejected", where);
  const isWhole = record.prompt === undefined;
  const prompt = isWhole ? sharedText(chosen, rejected) : textOf(record.prompt, "prompt", where);
  const example = (answer: string): Example => ({
    kind: "completion",
    prompt,
    completion: isWhole ? answer.slice(prompt.length) : answer,
  });
  return { chosen: example(chosen), rejected: example(rejected) };
}

/** What both begin with, up to the last white space: no word is cut. */
function sharedText(a: string, b: string): string {
  let n = 0;
  while (n < a.length && a[n] === b[n]) n++;
  return a.slice(0, n).replace(/\s*\S*$/, "");
}

function chats(record: JsonObject, where: string): Answers {
  const tools = toolsOf(record.tools, where);
  const chosen = messagesOf(record.chosen, "chosen", where);
  const rejected = messagesOf(record.rejected, "rejected", where);
  const isWhole = !Array.isArray(record.prompt);
  const before = isWhole ? sharedMessages(chosen, rejected) : messagesOf(record.prompt, "prompt", where);
  const answers = [chosen, rejected].map((messages) => (isWhole ? messages.slice(before.length) : messages));
  if (before.length === 0) throw new FormatError(`${where}: "chosen" and "rejected" must begin with the same messages`);
  if (typeof record.prompt === "string" && before.at(-1)?.content !== record.prompt)
    throw new FormatError(
      `${where}: "prompt" must be the last message that "chosen" and "rejected" share, got ${excerpt(JSON.stringify(record.prompt))}`,
    );
  if (!answers.every(([start]) => start?.role === "assistant"))
    throw new FormatError(`${where}: what follows the prompt must begin with a message of the assistant`);
  const [first, second] = answers.map(
    (answer): Example => ({ kind: "chat", messages: [...before, ...answer], tools, prompted: before.length }),
  ) as [Example, Example];
  return { chosen: first, rejected: second };
}

/** What both begin with; each has a message more. */
function sharedMessages(a: readonly JsonObject[], b: readonly JsonObject[]): JsonObject[] {
  const most = Math.min(a.length, b.length) - 1;
  let n = 0;
  while (n < most && JSON.stringify(a[n]) === JSON.stringify(b[n])) n++;
  return a.slice(0, n);
}
