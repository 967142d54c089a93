/** Messages of a chat, as the templates of Hugging Face models want them. */
import { FormatError } from "../../io/errors.ts";
import { excerpt, isObject, type JsonObject, parseJsonObject } from "../../io/json.ts";

const ROLES: readonly string[] = ["system", "developer", "user", "assistant", "tool"];

/** ShareGPT's names of roles. */
const SHAREGPT_ROLES: Readonly<Record<string, string>> = {
  ...{ system: "system", human: "user", user: "user", gpt: "assistant", assistant: "assistant" },
  ...{ tool: "tool", observation: "tool", function_call: "assistant" },
};

/** A string of well-formed Unicode. */
export function textOf(value: unknown, name: string, where: string): string {
  if (typeof value !== "string")
    throw new FormatError(`${where}: "${name}" must be a string, got ${excerpt(JSON.stringify(value) ?? "none")}`);
  if (/\p{Surrogate}/u.test(value))
    throw new FormatError(`${where}: "${name}" must be Unicode text, got half of a surrogate pair`);
  return value;
}

/** Throws a FormatError where a message has nothing in it. */
export function messageOf(role: string, content: string, where: string): JsonObject {
  if (content === "") throw new FormatError(`${where}: a message must have content, got an empty one of "${role}"`);
  return { role, content };
}

/** A list of messages: content is a string, or the text parts of it; arguments of a tool call are an object. */
export function messagesOf(value: unknown, name: string, where: string): JsonObject[] {
  if (!Array.isArray(value) || value.length === 0)
    throw new FormatError(
      `${where}: "${name}" must be a list of messages, got ${excerpt(JSON.stringify(value) ?? "none")}`,
    );
  return value.map((entry: unknown, i) => {
    const at = `${name}[${i}]`;
    if (!isObject(entry))
      throw new FormatError(`${where}: ${at} must be an object, got ${excerpt(JSON.stringify(entry))}`);
    const { role, content, tool_calls: calls, ...more } = entry;
    if (typeof role !== "string" || !ROLES.includes(role))
      throw new FormatError(
        `${where}: ${at}.role must be ${ROLES.join(", ")}, got ${excerpt(JSON.stringify(role) ?? "none")}`,
      );
    const toolCalls = callsOf(calls, at, where);
    const text = contentOf(content, at, where);
    if (text === "" && toolCalls.length === 0)
      throw new FormatError(
        `${where}: ${at} must have content${role === "assistant" ? " or tool_calls" : ""}, got none`,
      );
    return { role, content: text, ...(toolCalls.length > 0 && { tool_calls: toolCalls }), ...more };
  });
}

function contentOf(content: unknown, at: string, where: string): string {
  if (content === undefined || content === null) return "";
  if (!Array.isArray(content)) return textOf(content, `${at}.content`, where);
  const texts = content.map((part: unknown) => {
    const { type, text } = isObject(part) ? part : {};
    if (type !== "text")
      throw new FormatError(`${where}: ${at}.content must be text or text parts, got ${excerpt(JSON.stringify(part))}`);
    return textOf(text, `${at}.content`, where);
  });
  return texts.join("");
}

/** OpenAI's calls have their arguments as JSON text, templates want them as an object. */
function callsOf(calls: unknown, at: string, where: string): JsonObject[] {
  if (calls === undefined || calls === null) return [];
  if (!Array.isArray(calls))
    throw new FormatError(`${where}: ${at}.tool_calls must be a list, got ${excerpt(JSON.stringify(calls))}`);
  return calls.map((call: unknown, i) => {
    const name = `${at}.tool_calls[${i}]`;
    const wrapped = isObject(call) && isObject(call.function) ? call.function : call;
    if (!isObject(wrapped) || typeof wrapped.name !== "string")
      throw new FormatError(`${where}: ${name} must have the name of a function, got ${excerpt(JSON.stringify(call))}`);
    const given = wrapped.arguments ?? {};
    const found = typeof given === "string" ? parseJsonObject(given, `${where}: ${name}.arguments`) : given;
    const called = { ...wrapped, arguments: found };
    return wrapped === call ? called : { type: "function", ...(call as JsonObject), function: called };
  });
}

/** Undefined where there are none. A list, or JSON text of one. */
export function toolsOf(value: unknown, where: string): JsonObject[] | undefined {
  if (value === undefined || value === null || value === "") return undefined;
  let tools = value;
  if (typeof value === "string") {
    try {
      tools = JSON.parse(value);
    } catch {
      // said below
    }
  }
  if (!Array.isArray(tools) || !tools.every(isObject))
    throw new FormatError(`${where}: "tools" must be a list of objects, got ${excerpt(JSON.stringify(value))}`);
  return tools.length === 0 ? undefined : tools;
}

/** ShareGPT's turns of {"from","value"}. A function_call is JSON of a name and arguments, or a list of such. */
export function sharegptMessages(value: unknown, where: string): JsonObject[] {
  if (!Array.isArray(value) || value.length === 0)
    throw new FormatError(
      `${where}: "conversations" must be a list of {"from","value"}, got ${excerpt(JSON.stringify(value))}`,
    );
  const messages = value.map((turn: unknown, i) => {
    const at = `conversations[${i}]`;
    const { from, value: text } = isObject(turn) ? turn : {};
    const role = typeof from === "string" && Object.hasOwn(SHAREGPT_ROLES, from) ? SHAREGPT_ROLES[from] : undefined;
    if (role === undefined)
      throw new FormatError(
        `${where}: ${at}.from must be ${Object.keys(SHAREGPT_ROLES).join(", ")}, got ${excerpt(JSON.stringify(from) ?? "none")}`,
      );
    const content = textOf(text, `${at}.value`, where);
    if (from !== "function_call") return { role, content };
    const calls: unknown = content.trimStart().startsWith("[")
      ? parseJsonObject(`{"calls":${content}}`, `${where}: ${at}.value`).calls
      : [parseJsonObject(content, `${where}: ${at}.value`)];
    return { role, tool_calls: (calls as unknown[]).map((call) => ({ type: "function", function: call })) };
  });
  return messagesOf(messages, "conversations", where);
}
