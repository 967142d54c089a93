/** The page's side of a chat in a worker: no part of the engine. */
import type { AdapterSource, ChatRequest, FromChat, ToChat } from "./chat-messages.ts";
import type { EngineStats } from "./engine-types.ts";
import type { TextPiece } from "./text.ts";

/** A chat that is in a worker. Calls throw what they throw there, as an Error of the same name and message. */
export interface RemoteChat {
  /** The answer as it comes; the last piece, and it alone, has a `finishReason`. Leaving the loop early ends the answer, as its signal does. */
  ask(request: ChatRequest): AsyncGenerator<TextPiece, void, undefined>;
  /** Names of the adapters that may be asked for. */
  adapters(): Promise<readonly string[]>;
  /** What the engine does, and has done so far. */
  stats(): Promise<EngineStats>;
  load(name: string, from: AdapterSource): Promise<void>;
  /** Waits for those who use it. */
  unload(name: string): Promise<void>;
  /** Takes no more, lets the answers that have begun end, and ends the worker or closes the port. */
  close(): Promise<void>;
}

interface Call {
  piece(piece: TextPiece): void;
  done(value: unknown): void;
  failed(error: Error): void;
}

type Without<T, K extends PropertyKey> = T extends unknown ? Omit<T, K> : never;

/**
 * The chat that a worker, or who has the other end of the port, gives to `serveChat` of `lowrank/serve`. Calls wait until it is there.
 *
 *     const chat = createChat(new Worker(new URL("./chat-worker.js", import.meta.url), { type: "module" }));
 *     const messages = [{ role: "user", content: "Who are you?" }];
 *     for await (const { text } of chat.ask({ messages, adapter: "pirate" })) output.append(text);
 *
 * An error that nobody caught in the worker rejects all calls, those that come later too.
 */
export function createChat(port: Worker | MessagePort): RemoteChat {
  const calls = new Map<number, Call>();
  let lastId = 0;
  let failure: Error | undefined;
  let onReady = (): void => {};
  const ready = new Promise<void>((resolve) => {
    onReady = resolve;
  });
  const post = (message: ToChat): void => void ready.then(() => port.postMessage(message));

  const fail = (error: Error): void => {
    failure ??= error;
    for (const call of calls.values()) call.failed(failure);
    calls.clear();
  };
  const start = (message: Without<Extract<ToChat, { id: number }>, "id">, call: Call): number => {
    if (failure) throw failure;
    const id = ++lastId;
    calls.set(id, call);
    ready
      .then(() => port.postMessage({ ...message, id }))
      .catch((error: Error) => {
        calls.delete(id); // what cannot be sent, such as a function
        call.failed(error);
      });
    return id;
  };
  const result = (message: Without<Extract<ToChat, { id: number }>, "id">): Promise<unknown> =>
    new Promise((done, failed) => void start(message, { piece: () => {}, done, failed }));

  const listen = (type: string, listener: (event: MessageEvent<FromChat> & ErrorEvent) => void): void =>
    port.addEventListener(type, listener as (event: Event) => void);
  listen("message", ({ data }) => {
    if (data?.chat === "ready") onReady();
    if (!(data && "id" in data && data.chat)) return;
    const call = calls.get(data.id);
    if (data.chat === "piece") {
      call?.piece(data.piece);
      return;
    }
    calls.delete(data.id);
    if (data.chat === "value") call?.done(data.value);
    else call?.failed(Object.assign(new Error(data.message), { name: data.name }));
  });
  listen("error", ({ message }) => fail(new Error(`createChat: the worker must run, got ${message || "no script"}`)));
  listen("close", () => fail(new Error("createChat: the other end of the port must be open, got it closed")));
  if ("start" in port) port.start();
  port.postMessage({ chat: "hello" } satisfies ToChat);

  return {
    async *ask({ signal, ...request }) {
      const pieces: TextPiece[] = [];
      let isDone = false;
      let error: Error | undefined;
      let wake = (): void => {};
      const id = start(
        { chat: "ask", request },
        {
          piece(piece) {
            pieces.push(piece);
            wake();
          },
          done() {
            isDone = true;
            wake();
          },
          failed(reason) {
            error = reason;
            wake();
          },
        },
      );
      const abort = (): void => post({ chat: "abort", id });
      if (signal?.aborted) abort();
      signal?.addEventListener("abort", abort);
      try {
        for (;;) {
          while (pieces.length > 0) yield pieces.shift() as TextPiece;
          if (error) throw error;
          if (isDone) return;
          await new Promise<void>((resolve) => {
            wake = resolve;
          });
        }
      } finally {
        signal?.removeEventListener("abort", abort);
        if (calls.delete(id)) abort();
      }
    },
    adapters: () => result({ chat: "adapters" }) as Promise<readonly string[]>,
    stats: () => result({ chat: "stats" }) as Promise<EngineStats>,
    async load(name, from) {
      await result({ chat: "load", name, from });
    },
    async unload(name) {
      await result({ chat: "unload", name });
    },
    async close() {
      try {
        await result({ chat: "close" });
      } finally {
        fail(new Error("createChat: the chat must be open, got one that was closed"));
        if ("terminate" in port) port.terminate();
        else port.close();
      }
    },
  };
}
