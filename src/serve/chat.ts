/** Conversations with a model and its adapters, in this thread or for a page in another. */
import { blobSource, type Directory, httpDirectory } from "../io/bytes.ts";
import type { ChatTemplate } from "../io/chat-template.ts";
import { endOfAnswer } from "../io/special-tokens.ts";
import type { TokenBytes, Tokenizer } from "../io/tokenizer.ts";
import { readAdapter } from "../lora/adapter-file.ts";
import type { PoolOptions } from "../lora/adapter-pool.ts";
import { openPool } from "../lora/open-pool.ts";
import type { HasLinears } from "../lora/parts.ts";
import { ShapeError } from "../tensor/errors.ts";
import { BatchEngine, type EngineOptions } from "./batch-engine.ts";
import type { AdapterSource, ChatRequest, FromChat, ToChat } from "./chat-messages.ts";
import { constraintOf } from "./constraint.ts";
import type { Engine, EngineStats } from "./engine-types.ts";
import type { PagedModel } from "./paged-step.ts";
import { type TextPiece, textOf } from "./text.ts";

export interface ChatParts {
  /** As `loadTokenizer` of `lowrank/tokenizer` gives it. */
  readonly tokenizer: Tokenizer & TokenBytes;
  /** As `loadChatTemplate` of `lowrank/data` gives it; without one there are prompts and no messages. */
  readonly renderChat?: ChatTemplate | undefined;
}

export interface ChatOptions extends ChatParts {
  /** Directories of adapters by name, as PEFT or mlx-lm write them. */
  readonly adapters?: Readonly<Record<string, Directory>>;
  /** How much room adapters get on the device: for all that are given (or one) and rank 16 (or theirs) unless it says so. */
  readonly pool?: Partial<Omit<PoolOptions, "pages">>;
  readonly engine?: Omit<EngineOptions, "adapters">;
}

/**
 * A chat with a model and adapters of it; answers to several requests are computed in one batch, each by its own adapter (`BatchEngine`).
 *
 * Throws FormatError and ShapeError for what is no adapter of the model, and for settings out of range.
 */
export async function openChat(
  model: PagedModel & HasLinears,
  { adapters = {}, pool: room, engine: settings, ...parts }: ChatOptions,
): Promise<Chat> {
  const read = Object.entries(adapters).map(async ([name, directory]) => [name, await readAdapter(directory)] as const);
  const pool = await openPool(model, new Map(await Promise.all(read)), room);
  try {
    return new Chat(new BatchEngine(model, { ...settings, adapters: pool }), parts, () => pool.destroy());
  } catch (error) {
    pool.destroy();
    throw error;
  }
}

/** An engine that is asked in words. */
export class Chat {
  readonly #engine: Engine;
  readonly #parts: ChatParts;
  readonly #onClose: () => void;
  readonly #endIds: readonly number[];
  #closed: Promise<void> | undefined;

  constructor(engine: Engine, parts: ChatParts, onClose: () => void = () => {}) {
    this.#engine = engine;
    this.#parts = parts;
    this.#endIds = parts.renderChat ? endOfAnswer(parts.renderChat, parts.tokenizer) : [];
    this.#onClose = onClose;
  }

  /** Names of the adapters that may be asked for. */
  get adapters(): readonly string[] {
    return this.#engine.adapters;
  }

  stats(): EngineStats {
    return this.#engine.stats();
  }

  /**
   * The answer as it comes; the last piece, and it alone, has a `finishReason`. Leaving the loop early ends the answer.
   *
   * Throws ShapeError for what cannot be answered (settings out of range, an unknown adapter, a prompt that does not fit), FormatError where the
   * template refuses the messages, QueueFull where too many wait.
   */
  async *ask(request: ChatRequest): AsyncGenerator<TextPiece, void, undefined> {
    const { messages, prompt, stop, maxTokens, responseFormat, ...rest } = request;
    const { tokenizer } = this.#parts;
    const promptIds = this.#promptIds(request);
    const room = Math.max(0, this.#engine.contextLength - promptIds.length);
    const most = maxTokens ?? room;
    const constraint = constraintOf(responseFormat, tokenizer);
    const endIds = messages && this.#endIds;
    const tokens = this.#engine.generate({ ...rest, promptIds, maxTokens: most, constraint, endIds });
    const isDone = (): boolean => constraint?.isDone ?? false;
    yield* textOf(tokens, { tokenizer, promptIds, stop, room: Math.min(most, room), isDone });
  }

  #promptIds({ messages, prompt }: ChatRequest): number[] {
    const { tokenizer, renderChat } = this.#parts;
    if ((messages === undefined) === (prompt === undefined))
      throw new ShapeError(`ask: messages or a prompt must be given, got ${messages ? "both" : "neither"}`);
    if (prompt !== undefined) return tokenizer.encode(prompt);
    if (!renderChat)
      throw new ShapeError(
        "ask: messages must go with a chat template, got none. Give renderChat, or ask with a prompt",
      );
    // The template writes the special tokens, too.
    const text = renderChat.render({ messages: messages ?? [], addGenerationPrompt: true });
    return tokenizer.encode(text, { addSpecialTokens: false });
  }

  /** Throws FormatError or ShapeError where the files are no adapter of this model, or the name is taken. */
  load(name: string, directory: Directory): Promise<void> {
    return this.#engine.load(name, directory);
  }

  /** Waits for those who use it. Throws ShapeError where there is none of this name. */
  unload(name: string): Promise<void> {
    return this.#engine.unload(name);
  }

  /** Takes no more, lets the answers that have begun end, and frees the cache and the adapters; the model stays. */
  close(): Promise<void> {
    this.#closed ??= this.#engine.close().then(this.#onClose);
    return this.#closed;
  }
}

/** What of a worker's `self`, or of a MessagePort, is used. */
export interface ChatPort {
  postMessage(message: FromChat): void;
  addEventListener(type: "message" | "close", listener: (event: MessageEvent) => void): void;
  /** Of a MessagePort. */
  start?(): void;
}

/**
 * Lets a page that has `createChat` of `lowrank/browser` at the other end use this chat. The worker's file:
 *
 *     import { httpDirectory, loadModel, openGpu } from "lowrank";
 *     import { openChat, serveChat } from "lowrank/serve";
 *     import { loadChatTemplate } from "lowrank/data";
 *     import { loadTokenizer } from "lowrank/tokenizer";
 *
 *     async function open() {
 *       const files = httpDirectory("/models/base"); // or await hubDirectory("org/name"), of lowrank/browser
 *       const [tokenizer, renderChat] = await Promise.all([loadTokenizer(files), loadChatTemplate(files)]);
 *       const adapters = { pirate: httpDirectory("/adapters/pirate") };
 *       return openChat(await loadModel(await openGpu(), files), { tokenizer, renderChat, adapters });
 *     }
 *     serveChat(open(), self);
 *
 * While the chat is a promise, calls wait; where that is rejected, so are they. Messages of others on the same port are left alone.
 */
export function serveChat(chat: Chat | Promise<Chat>, port: ChatPort): void {
  const opened = Promise.resolve(chat);
  opened.catch(() => {}); // each call is told
  const asked = new Map<number, { readonly stop: AbortController; readonly ended: Promise<void> }>();
  const answer = async (message: Call, signal?: AbortSignal): Promise<void> => {
    const { id } = message;
    try {
      const onPiece = (piece: TextPiece): void => port.postMessage({ chat: "piece", id, piece });
      const value = await called(await opened, message, onPiece, signal);
      // The last pieces are on their way still when the engine has closed.
      if (message.chat === "close") await Promise.all([...asked.values()].map(({ ended }) => ended));
      port.postMessage({ chat: "value", id, value });
    } catch (error) {
      const { name, message: text } = error instanceof Error ? error : new Error(String(error));
      port.postMessage({ chat: "error", id, name, message: text });
    }
  };
  port.addEventListener("message", ({ data }: MessageEvent<ToChat | undefined>) => {
    if (data?.chat === "hello") port.postMessage({ chat: "ready" });
    else if (data?.chat === "abort") asked.get(data.id)?.stop.abort();
    else if (data?.chat === "ask") {
      const stop = new AbortController();
      const ended = answer(data, stop.signal).finally(() => asked.delete(data.id));
      asked.set(data.id, { stop, ended });
    } else if (data?.chat !== undefined) void answer(data);
  });
  port.addEventListener("close", () => {
    for (const { stop } of asked.values()) stop.abort();
  });
  port.start?.();
  port.postMessage({ chat: "ready" });
}

type Call = Exclude<ToChat, { readonly chat: "hello" | "abort" }>;

/** Does what is asked for. */
async function called(
  chat: Chat,
  message: Call,
  onPiece: (piece: TextPiece) => void,
  signal: AbortSignal | undefined,
): Promise<readonly string[] | EngineStats | undefined> {
  switch (message.chat) {
    case "ask":
      for await (const piece of chat.ask({ ...message.request, signal })) onPiece(piece);
      return undefined;
    case "load":
      await chat.load(message.name, directoryOf(message.name, message.from));
      return undefined;
    case "unload":
      await chat.unload(message.name);
      return undefined;
    case "close":
      await chat.close();
      return undefined;
    case "adapters":
      return chat.adapters;
    case "stats":
      return chat.stats();
  }
}

const directoryOf = (name: string, from: AdapterSource): Directory =>
  typeof from === "string"
    ? httpDirectory(from)
    : {
        name,
        open: async (file) =>
          Object.hasOwn(from, file) ? blobSource(from[file] as Blob, `${name}/${file}`) : undefined,
      };
