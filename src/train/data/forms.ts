/** The forms that a record of training data may have. */
import { FormatError } from "../../io/errors.ts";
import { excerpt, isObject, type JsonObject } from "../../io/json.ts";
import { messageOf, messagesOf, sharegptMessages, textOf, toolsOf } from "./messages.ts";

/** What a record says is to be learned. */
export type Example =
  | { readonly kind: "ids"; readonly inputIds: unknown; readonly labels: unknown }
  | { readonly kind: "text"; readonly text: string }
  | { readonly kind: "completion"; readonly prompt: string; readonly completion: string }
  | { readonly kind: "segments"; readonly segments: readonly Segment[] }
  | {
      readonly kind: "chat";
      readonly messages: readonly JsonObject[];
      readonly tools: readonly JsonObject[] | undefined;
      /** So many messages are the prompt of a prompt and its completion. */
      readonly prompted?: number;
    };

export interface Segment {
  readonly isLearned: boolean;
  readonly text: string;
}

interface Form {
  /** Keys that a record of this form must have. */
  readonly keys: readonly string[];
  /** Keys that it may have, too. */
  readonly optional: readonly string[];
  parse(record: JsonObject, where: string, hasTemplate: boolean): Example;
}

const FORMS: Readonly<Record<string, Form>> = {
  messages: {
    keys: ["messages"],
    optional: ["tools"],
    parse: ({ messages, tools }, where) => ({
      kind: "chat",
      messages: messagesOf(messages, "messages", where),
      tools: toolsOf(tools, where),
    }),
  },
  completion: { keys: ["prompt", "completion"], optional: ["tools"], parse: completion },
  text: {
    keys: ["text"],
    optional: [],
    parse: ({ text }, where) => ({ kind: "text", text: textOf(text, "text", where) }),
  },
  instruction: {
    keys: ["instruction", "output"],
    optional: ["input", "system", "history"],
    parse: instruction,
  },
  conversations: {
    keys: ["conversations"],
    optional: ["system", "tools"],
    parse: ({ conversations, system, tools }, where) => ({
      kind: "chat",
      messages: [...systemMessage(system, where), ...sharegptMessages(conversations, where)],
      tools: toolsOf(tools, where),
    }),
  },
  segments: { keys: ["segments"], optional: [], parse: segments },
  ids: {
    keys: ["input_ids"],
    optional: ["labels"],
    parse: ({ input_ids: inputIds, labels }) => ({ kind: "ids", inputIds, labels }),
  },
};

/** The forms, for messages. */
export const FORM_LIST: string = Object.values(FORMS)
  .map(({ keys }) => `{${keys.map((key) => JSON.stringify(key)).join(",")}}`)
  .join(", ")
  .replace(/, ([^,]*)$/, " or $1");

export interface Parsed {
  /** "messages", "completion", "text", "instruction", "conversations", "segments" or "ids". */
  readonly form: string;
  readonly example: Example;
  /** Keys that say nothing to this form. */
  readonly ignored: readonly string[];
}

/**
 * A record by the form that its keys say. `hasTemplate` tells whether instructions may become messages; else they are plain text. Throws a
 * FormatError where it has no form or several, or is not what its form demands.
 */
export function parseExample(record: JsonObject, where: string, hasTemplate: boolean): Parsed {
  const keys = Object.keys(record);
  const found = Object.entries(FORMS).filter(([, known]) => known.keys.every((key) => keys.includes(key)));
  const [first, second] = found;
  if (!first) {
    const got = keys.map((key) => JSON.stringify(excerpt(key))).join(", ") || "no keys";
    const isPair = keys.includes("chosen") && keys.includes("rejected");
    throw new FormatError(
      `${where}: a row must be ${FORM_LIST}, got ${got}${isPair ? ". Pairs are learned by train --preference dpo" : ""}`,
    );
  }
  if (second)
    throw new FormatError(
      `${where}: a row must have one form, got both "${first[1].keys.join('","')}" and "${second[1].keys.join('","')}". Leave one of them out`,
    );
  const [form, { parse, keys: required, optional }] = first;
  const ignored = keys.filter((key) => !required.includes(key) && !optional.includes(key));
  return { form, example: parse(record, where, hasTemplate), ignored };
}

function completion(record: JsonObject, where: string): Example {
  const { prompt, completion: answer } = record;
  if (Array.isArray(prompt) !== Array.isArray(answer))
    throw new FormatError(`${where}: "prompt" and "completion" must both be strings, or both lists of messages`);
  if (!Array.isArray(prompt))
    return {
      kind: "completion",
      prompt: textOf(prompt, "prompt", where),
      completion: textOf(answer, "completion", where),
    };
  const before = messagesOf(prompt, "prompt", where);
  const messages = [...before, ...messagesOf(answer, "completion", where)];
  return { kind: "chat", messages, tools: toolsOf(record.tools, where), prompted: before.length };
}

/** Alpaca's rows: with a template a chat of its history and the instruction, else prompt and completion with blank lines between. */
function instruction(record: JsonObject, where: string, hasTemplate: boolean): Example {
  const input = record.input === undefined ? "" : textOf(record.input, "input", where);
  const asked = textOf(record.instruction, "instruction", where);
  const question = input === "" ? asked : `${asked}\n\n${input}`;
  const output = textOf(record.output, "output", where);
  const before = [...systemMessage(record.system, where), ...historyMessages(record.history, where)];
  if (hasTemplate) {
    const messages = [...before, messageOf("user", question, where), messageOf("assistant", output, where)];
    return { kind: "chat", messages, tools: undefined };
  }
  const prompt = [...before.map(({ content }) => `${content}\n\n`), `${question}\n\n`].join("");
  return { kind: "completion", prompt, completion: output };
}

const systemMessage = (system: unknown, where: string): JsonObject[] =>
  system === undefined || system === "" ? [] : [messageOf("system", textOf(system, "system", where), where)];

/** Pairs of what was asked and answered before. */
function historyMessages(history: unknown, where: string): JsonObject[] {
  if (history === undefined || history === null) return [];
  if (!Array.isArray(history) || !history.every((turn) => Array.isArray(turn) && turn.length === 2))
    throw new FormatError(
      `${where}: "history" must be a list of pairs of texts, got ${excerpt(JSON.stringify(history))}`,
    );
  return history.flatMap(([asked, answered]: [unknown, unknown]) => [
    messageOf("user", textOf(asked, "history", where), where),
    messageOf("assistant", textOf(answered, "history", where), where),
  ]);
}

function segments(record: JsonObject, where: string): Example {
  const given = record.segments;
  if (!Array.isArray(given) || given.length === 0)
    throw new FormatError(
      `${where}: "segments" must be a list of {"label","text"}, got ${excerpt(JSON.stringify(given))}`,
    );
  return {
    kind: "segments",
    segments: given.map((segment: unknown, i) => {
      const { label, text } = isObject(segment) ? segment : {};
      if (typeof label !== "boolean")
        throw new FormatError(
          `${where}: segments[${i}].label must be true or false, got ${excerpt(JSON.stringify(label) ?? "none")}`,
        );
      return { isLearned: label, text: textOf(text, `segments[${i}].text`, where) };
    }),
  };
}
