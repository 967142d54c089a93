/** What a client asks for, out of OpenAI's JSON. */
import type { ChatTemplate } from "../../io/chat-template.ts";
import { FormatError } from "../../io/errors.ts";
import { isObject } from "../../io/json.ts";
import type { TokenBytes, Tokenizer } from "../../io/tokenizer.ts";
import { ShapeError } from "../../tensor/errors.ts";
import { constraintOf } from "../constraint.ts";
import type { Engine, GenerationRequest } from "../engine-types.ts";
import type { SamplingOptions } from "../sampling.ts";
import { ApiError } from "./errors.ts";
import { Fields, refused } from "./fields.ts";

/** What answers. */
export interface Served {
  readonly engine: Pick<Engine, "contextLength" | "adapters" | "failure">;
  readonly tokenizer: Tokenizer & Partial<TokenBytes>;
  readonly renderChat: ChatTemplate | undefined;
  /** What ends an answer to messages: see `endOfAnswer`. */
  readonly endIds: readonly number[];
  /** What the base goes by. */
  readonly modelName: string;
  readonly limits: PromptLimits;
}

export interface PromptLimits {
  readonly promptTokens: number;
  /** Largest `max_tokens`. */
  readonly maxTokens: number;
}

export interface Asked {
  /** As the client named it. */
  readonly model: string;
  /** Prompt by prompt its choices: the same but for the seed, each beside the one before, and for what goes along with an answer. */
  readonly generations: readonly GenerationRequest[];
  /** Of each prompt once. */
  readonly promptTokens: number;
  readonly stop: readonly string[];
  readonly stream: boolean;
  /** Whether a stream ends with the counts of tokens. */
  readonly includeUsage: boolean;
  readonly hasLogprobs: boolean;
  /** Fields that nobody knows. */
  readonly unknown: readonly string[];
}

/** `POST /v1/chat/completions`. Throws an ApiError that names field, rule and value. */
export function askedChat(fields: Fields, served: Served): Asked {
  const { model, adapter } = modelOf(fields, served);
  const unknown: string[] = [];
  const text = rendered(messagesOf(fields, unknown), served.renderChat);
  const promptIds = encoded(text, "messages", served, false);
  const wantsLogprobs = fields.flag("logprobs") ?? false;
  const top = fields.whole("top_logprobs", 0, 20);
  if (top !== undefined && !wantsLogprobs) throw fields.refuse("top_logprobs", "left out unless logprobs is true");
  const [first, second] = [fields.any("max_completion_tokens"), fields.any("max_tokens")];
  if (first !== undefined && second !== undefined && first !== second)
    throw fields.refuse("max_tokens", "left out where max_completion_tokens is given");
  const most = served.limits.maxTokens;
  const maxTokens = fields.whole("max_completion_tokens", 1, most) ?? fields.whole("max_tokens", 1, most);
  return {
    ...rest(fields, unknown),
    model,
    ...choicesOf(fields, served.tokenizer, [promptIds], {
      ...{ adapter, maxTokens: maxTokens ?? most, endIds: served.endIds },
      ...(wantsLogprobs && { logprobs: top ?? 0 }),
    }),
    hasLogprobs: wantsLogprobs,
    unknown: [...fields.unknown(), ...unknown],
  };
}

/** `POST /v1/completions`. Throws an ApiError that names field, rule and value. */
export function askedCompletion(fields: Fields, served: Served): Asked {
  const { model, adapter } = modelOf(fields, served);
  const prompts = promptsOf(fields, served);
  const logprobs = fields.whole("logprobs", 0, 5);
  const maxTokens = fields.whole("max_tokens", 1, served.limits.maxTokens) ?? Math.min(16, served.limits.maxTokens);
  const unknown: string[] = [];
  return {
    ...rest(fields, unknown),
    model,
    ...choicesOf(fields, served.tokenizer, prompts, {
      ...{ adapter, maxTokens },
      ...(logprobs !== undefined && { logprobs }),
    }),
    hasLogprobs: logprobs !== undefined,
    unknown: [...fields.unknown(), ...unknown],
  };
}

function modelOf(fields: Fields, { engine, modelName }: Served): { model: string; adapter: string | undefined } {
  const model = fields.text("model");
  if (model === undefined) throw refused("model", "a text: that of the base or an adapter", undefined);
  if (model !== modelName && !engine.adapters.includes(model)) throw noSuchModel(model);
  return { model, adapter: model === modelName ? undefined : model };
}

export const noSuchModel = (model: string): ApiError =>
  new ApiError(404, `The model \`${model.slice(0, 64)}\` does not exist.`, { param: "model" });

/** Fields that change what the answer would be in ways that are not there, and what of them does no harm. */
const UNSUPPORTED: Readonly<Record<string, (value: unknown) => boolean>> = {
  ...{ tools: isEmpty, functions: isEmpty },
  ...{ tool_choice: (value) => value === "none" || value === "auto", function_call: (value) => value === "none" },
  modalities: (value) => JSON.stringify(value) === '["text"]',
  ...{ echo: (value) => value === false, suffix: (value) => value === "" },
  ...{ audio: never, prediction: never, web_search_options: never },
};
function isEmpty(value: unknown): boolean {
  return Array.isArray(value) && value.length === 0;
}
function never(): boolean {
  return false;
}

/** Fields for the books of whoever serves; they change no answer. */
const SILENT = [
  ...["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"],
];

function rest(fields: Fields, unknown: string[]): Pick<Asked, "stop" | "stream" | "includeUsage"> {
  for (const [field, isHarmless] of Object.entries(UNSUPPORTED)) {
    const value = fields.any(field);
    if (value !== undefined && !isHarmless(value)) throw fields.refuse(field, "left out: it is not supported");
  }
  for (const field of SILENT) fields.any(field);
  const stream = fields.flag("stream") ?? false;
  const options = fields.object("stream_options");
  if (options && !stream) throw fields.refuse("stream_options", "left out unless stream is true");
  const includeUsage = options?.flag("include_usage") ?? false;
  options?.flag("include_obfuscation");
  unknown.push(...(options?.unknown() ?? []));
  return { stream, includeUsage, stop: stopsOf(fields) };
}

function stopsOf(fields: Fields): readonly string[] {
  const value = fields.any("stop") ?? [];
  const stops: unknown[] = Array.isArray(value) ? value : [value];
  if (stops.length > 4 || !stops.every((stop) => typeof stop === "string" && stop.length >= 1 && stop.length <= 64))
    throw fields.refuse("stop", "a text of 1 to 64 characters, or at most 4 of them");
  return stops as string[];
}

const MOST_CHOICES = 16;

/** As many to each prompt as `n` says. */
function choicesOf(
  fields: Fields,
  tokenizer: Served["tokenizer"],
  prompts: readonly (readonly number[])[],
  request: Omit<GenerationRequest, keyof SamplingOptions | "promptIds">,
): Pick<Asked, "generations" | "promptTokens"> {
  const n = fields.whole("n", 1, Math.floor(MOST_CHOICES / prompts.length)) ?? 1;
  const best = fields.any("best_of");
  if (best !== undefined && best !== n) throw fields.refuse("best_of", `left out, or n = ${n}`);
  const { seed, ...sampling } = samplingOf(fields, tokenizer);
  const constraint = formatOf(fields, tokenizer);
  const generations = prompts.flatMap((promptIds) =>
    Array.from({ length: n }, (_, i) => ({
      ...{ ...request, promptIds, ...sampling, seed: seed > 0 ? seed - i : seed + i },
      constraint: constraint?.fork(),
    })),
  );
  return { generations, promptTokens: prompts.flat().length };
}

/** OpenAI's defaults: a temperature of 1 and another answer each time. */
function samplingOf(fields: Fields, tokenizer: Served["tokenizer"]): SamplingOptions & { readonly seed: number } {
  const topK = fields.whole("top_k", -1, 2 ** 31);
  const topP = fields.number("top_p", "a number above 0 and at most 1", (x) => x > 0 && x <= 1);
  const minP = fields.range("min_p", 0, 1);
  const positive = (x: number): boolean => x > 0 && x <= 100;
  const repetitionPenalty = fields.number("repetition_penalty", "a number above 0 and at most 100", positive);
  const presencePenalty = fields.range("presence_penalty", -2, 2);
  const frequencyPenalty = fields.range("frequency_penalty", -2, 2);
  const logitBias = biasOf(fields.object("logit_bias"), tokenizer.vocabSize);
  return {
    temperature: fields.range("temperature", 0, 2) ?? 1,
    seed: fields.whole("seed", Number.MIN_SAFE_INTEGER, Number.MAX_SAFE_INTEGER) ?? freshSeed(),
    ...(topK !== undefined && topK > 0 && { topK }), // −1 and 0 mean all, as in vLLM
    ...(topP !== undefined && { topP }),
    ...(minP !== undefined && { minP }),
    ...(repetitionPenalty !== undefined && { repetitionPenalty }),
    ...(presencePenalty !== undefined && { presencePenalty }),
    ...(frequencyPenalty !== undefined && { frequencyPenalty }),
    ...(logitBias && { logitBias }),
  };
}

function formatOf(fields: Fields, { eosId, tokenBytes }: Served["tokenizer"]): SamplingOptions["constraint"] {
  const format = fields.any("response_format");
  if (format === undefined || (isObject(format) && format.type === "text")) return undefined;
  if (!tokenBytes)
    throw fields.refuse("response_format", "left out: the server's tokenizer does not say what bytes its tokens are");
  try {
    return constraintOf(format, { eosId, tokenBytes });
  } catch (error) {
    if (error instanceof ShapeError) throw new ApiError(400, error.message, { param: "response_format" });
    throw error;
  }
}

const freshSeed = (): number => crypto.getRandomValues(new Uint32Array(1))[0] ?? 0;

function biasOf(fields: Fields | undefined, vocabSize: number): ReadonlyMap<number, number> | undefined {
  const keys = fields?.keys() ?? [];
  if (!fields || keys.length === 0) return undefined;
  if (keys.length > 1024)
    throw new ApiError(400, "`logit_bias` must have at most 1024 tokens", { param: "logit_bias" });
  return new Map(
    keys.map((key) => {
      if (!/^\d{1,9}$/.test(key) || Number(key) >= vocabSize)
        throw refused("logit_bias", `of token ids from 0 to ${vocabSize - 1}`, key);
      return [Number(key), fields.range(key, -100, 100) ?? 0];
    }),
  );
}

interface Message {
  readonly role: string;
  readonly content: string;
}

function messagesOf(fields: Fields, unknown: string[]): Message[] {
  const value = fields.any("messages");
  if (!Array.isArray(value) || value.length < 1 || value.length > 1024)
    throw fields.refuse("messages", "a list of 1 to 1024 messages");
  return value.map((one, i) => {
    const message = new Fields(one, `messages[${i}]`);
    const role = message.text("role");
    if (role === undefined || !["system", "developer", "user", "assistant"].includes(role))
      throw message.refuse("role", "system, developer, user or assistant");
    for (const field of ["tool_calls", "function_call", "audio"])
      if (message.any(field) !== undefined && !isEmpty(message.any(field)))
        throw message.refuse(field, "left out: it is not supported");
    for (const field of ["name", "refusal"]) message.text(field);
    const content = contentOf(message, unknown);
    unknown.push(...message.unknown());
    return { role: role === "developer" ? "system" : role, content }; // what OpenAI calls it now
  });
}

/** A text, or a list of parts that are texts, which are joined as in vLLM. */
function contentOf(message: Fields, unknown: string[]): string {
  const content = message.any("content");
  if (typeof content === "string") return content;
  if (!Array.isArray(content) || content.length === 0)
    throw message.refuse("content", "a text or a list of parts of text");
  const texts = content.map((one, i) => {
    const part = new Fields(one, message.name(`content[${i}]`));
    if (part.text("type") !== "text") throw part.refuse("type", '"text": nothing else is supported');
    const text = part.text("text");
    if (text === undefined) throw part.refuse("text", "a text");
    unknown.push(...part.unknown());
    return text;
  });
  return texts.join("\n");
}

function rendered(messages: readonly Message[], template: ChatTemplate | undefined): string {
  if (!template)
    throw new ApiError(
      400,
      "the model must have a chat template to take messages, got none. Use /v1/completions with a prompt, or start the server with --chat-template",
      { param: "messages" },
    );
  try {
    return template.render({ messages: messages.map((one) => ({ ...one })), addGenerationPrompt: true });
  } catch (error) {
    throw error instanceof FormatError ? new ApiError(400, error.message, { param: "messages" }) : error;
  }
}

/** Of a text, a list of ids, or a list of either. */
function promptsOf(fields: Fields, served: Served): readonly (readonly number[])[] {
  const value = fields.any("prompt");
  if (!Array.isArray(value) || typeof value[0] === "number") return [promptOf(value, fields, served)];
  if (value.length > MOST_CHOICES) throw fields.refuse("prompt", `of at most ${MOST_CHOICES} texts or lists`);
  return value.length === 0 ? [promptOf(value, fields, served)] : value.map((one) => promptOf(one, fields, served));
}

function promptOf(prompt: unknown, fields: Fields, served: Served): readonly number[] {
  const rule = "a text, a list of token ids, or a list of texts or of such lists";
  if (typeof prompt === "string") return encoded(prompt, "prompt", served, true);
  if (!Array.isArray(prompt) || prompt.length === 0) throw fields.refuse("prompt", rule);
  const { vocabSize } = served.tokenizer;
  const isId = (id: unknown): boolean => Number.isInteger(id) && (id as number) >= 0 && (id as number) < vocabSize;
  const bad: unknown = prompt.find((id) => !isId(id));
  if (bad !== undefined)
    throw typeof bad === "number" || bad === null
      ? refused("prompt", `of token ids from 0 to ${vocabSize - 1}`, bad)
      : fields.refuse("prompt", rule);
  return demandFitting(prompt as number[], "prompt", served);
}

/** No token of a sensible text has more characters on average; it takes time to find out for each. */
const CHARACTERS_PER_TOKEN = 16;

function encoded(text: string, param: string, served: Served, addSpecialTokens: boolean): readonly number[] {
  const most = served.limits.promptTokens * CHARACTERS_PER_TOKEN;
  if (text.length > most)
    throw new ApiError(400, `the prompt must be of at most ${most} characters, got ${text.length}`, { param });
  return demandFitting(served.tokenizer.encode(text, { addSpecialTokens }), param, served);
}

function demandFitting(ids: readonly number[], param: string, { limits }: Served): readonly number[] {
  if (ids.length === 0 || ids.length > limits.promptTokens)
    throw new ApiError(400, `the prompt must be of 1 to ${limits.promptTokens} tokens, got ${ids.length}`, { param });
  return ids;
}
