/** Chat templates, which write messages as the text a model was trained on: Jinja by `@huggingface/jinja`, as transformers renders it. */
import { Environment, Interpreter, parse, tokenize } from "@huggingface/jinja";
import type { Directory } from "./bytes.ts";
import { FormatError } from "./errors.ts";
import { isObject, type JsonObject, readJson, readText } from "./json.ts";

export interface Chat {
  readonly messages: readonly JsonObject[];
  /** JSON schemas of the functions that may be called. */
  readonly tools?: readonly JsonObject[] | undefined;
  /** End with what comes before an answer. */
  readonly addGenerationPrompt?: boolean;
}

export interface ChatTemplate {
  /** Throws a FormatError with the template's own words where it refuses the messages. */
  render(chat: Chat): string;
}

/** A template comes from wherever the model does: it may take so long, and make strings and lists of such a length. */
const LIMITS = { milliseconds: 2000, characters: 2 ** 23, items: 1e5 };

/** `<|im_start|>role`, content and `<|im_end|>`: for a model that has no template of its own. */
export const CHATML: string =
  "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{% endfor %}" +
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/**
 * The template of a model's directory: chat_template.jinja, or chat_template of tokenizer_config.json, which may be several by name ("default",
 * and "tool_use" for chats with tools). Undefined where it has none. `source` takes the place of that. Throws a FormatError.
 */
export async function loadChatTemplate(
  directory: Directory,
  source?: { readonly name: string; readonly text: string },
): Promise<ChatTemplate | undefined> {
  const config = (await readJson(directory, "tokenizer_config.json", 50e6)) ?? {};
  const special = (await readJson(directory, "special_tokens_map.json")) ?? {};
  const tokens = specialTokens({ ...special, ...config });
  if (source) return chatTemplate(source.text, source.name, tokens);
  const file = await readText(directory, "chat_template.jinja");
  if (file !== undefined) return chatTemplate(file, `${directory.name}/chat_template.jinja`, tokens);
  const name = `${directory.name}/tokenizer_config.json: chat_template`;
  const given = config.chat_template;
  if (given === undefined || given === null) return undefined;
  if (typeof given === "string") return chatTemplate(given, name, tokens);
  const templates = new Map(Array.isArray(given) ? given.map((entry) => namedTemplate(entry, name)) : []);
  const [first] = templates.values();
  const usual = templates.get("default") ?? first;
  if (usual === undefined) throw new FormatError(`${name} must be a text or a list of named ones, got neither`);
  const plain = chatTemplate(usual, name, tokens);
  const withTools = chatTemplate(templates.get("tool_use") ?? usual, name, tokens);
  return { render: (chat) => (chat.tools ? withTools : plain).render(chat) };
}

function namedTemplate(entry: unknown, name: string): [string, string] {
  const { name: key, template } = isObject(entry) ? entry : {};
  if (typeof key !== "string" || typeof template !== "string")
    throw new FormatError(`${name} must be a list of {"name","template"}, got ${JSON.stringify(entry)}`);
  return [key, template];
}

/** "bos_token" and the like, each as its text. */
function specialTokens(config: JsonObject): JsonObject {
  const tokens = Object.entries(config).map(([key, token]) => [key, isObject(token) ? token.content : token] as const);
  return Object.fromEntries(tokens.filter(([key, text]) => key.endsWith("_token") && typeof text === "string"));
}

/** `name` is for messages, `variables` what the template may use besides, such as bos_token. Throws a FormatError where it is no Jinja. */
export function chatTemplate(text: string, name: string, variables: JsonObject = {}): ChatTemplate {
  const program = attempt(`${name} must be Jinja`, () =>
    parse(tokenize(text, { trim_blocks: true, lstrip_blocks: true })),
  );
  return {
    render: ({ messages, tools = null, addGenerationPrompt = false }) =>
      attempt("the chat template must take these messages", () => {
        const environment = new Environment();
        const given = { messages, tools, add_generation_prompt: addGenerationPrompt, documents: null };
        for (const [key, value] of Object.entries({ ...GLOBALS, ...variables, ...given })) environment.set(key, value);
        return String(new LimitedInterpreter(environment).run(program).value);
      }),
  };
}

function attempt<T>(rule: string, action: () => T): T {
  try {
    return action();
  } catch (error) {
    throw new FormatError(`${rule}, got ${error instanceof Error ? error.message : String(error)}`);
  }
}

/** What is used of the library's interpreter: its own types do not resolve under Node's rules for modules. */
interface JinjaInterpreter {
  run(program: unknown): { readonly value: unknown };
  evaluate(statement: unknown, scope: unknown): { readonly value: unknown };
}
const UnlimitedInterpreter = Interpreter as unknown as new (environment: unknown) => JinjaInterpreter;

class LimitedInterpreter extends UnlimitedInterpreter {
  readonly #deadline = performance.now() + LIMITS.milliseconds;

  override evaluate(statement: unknown, scope: unknown): { readonly value: unknown } {
    if (performance.now() > this.#deadline) throw new Error(`more than ${LIMITS.milliseconds / 1000} seconds`);
    const result = super.evaluate(statement, scope);
    const { value } = result;
    if (typeof value === "string" && value.length > LIMITS.characters)
      throw new Error(`a text of more than ${LIMITS.characters} characters`);
    if (Array.isArray(value) && value.length > LIMITS.items)
      throw new Error(`a list of more than ${LIMITS.items} items`);
    return result;
  }
}

/** Jinja's constants, and the functions that transformers gives to templates. */
const GLOBALS = {
  ...{ true: true, false: false, none: null, True: true, False: false, None: null },
  range(first: number, last?: number, step = 1): number[] {
    const [start, stop] = last === undefined ? [0, first] : [first, last];
    const count = Math.max(0, Math.ceil((stop - start) / step));
    if (!(count <= LIMITS.items)) throw new Error(`a list of more than ${LIMITS.items} items`);
    return Array.from({ length: count }, (_, i) => start + i * step);
  },
  raise_exception(message: string): never {
    throw new Error(message);
  },
  strftime_now: (format: string): string => strftime(new Date(), format),
};

const pad = (n: number, width = 2): string => String(n).padStart(width, "0");
const english = (date: Date, options: Intl.DateTimeFormatOptions): string => date.toLocaleString("en-US", options);

/** The codes of C's strftime, in English, by local time. */
const DATE_CODES: Readonly<Record<string, (date: Date) => string>> = {
  Y: (date) => String(date.getFullYear()),
  y: (date) => pad(date.getFullYear() % 100),
  m: (date) => pad(date.getMonth() + 1),
  d: (date) => pad(date.getDate()),
  e: (date) => String(date.getDate()).padStart(2, " "),
  H: (date) => pad(date.getHours()),
  I: (date) => pad(date.getHours() % 12 || 12),
  M: (date) => pad(date.getMinutes()),
  S: (date) => pad(date.getSeconds()),
  p: (date) => (date.getHours() < 12 ? "AM" : "PM"),
  B: (date) => english(date, { month: "long" }),
  b: (date) => english(date, { month: "short" }),
  A: (date) => english(date, { weekday: "long" }),
  a: (date) => english(date, { weekday: "short" }),
  "%": () => "%",
};

/** Codes that are not known stay as they are. */
export const strftime = (date: Date, format: string): string =>
  format.replace(/%(.)/g, (code, letter: string) => DATE_CODES[letter]?.(date) ?? code);
