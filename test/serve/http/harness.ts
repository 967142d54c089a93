/** An app over an engine that does what a test says. */
import type { Directory } from "../../../src/io/bytes.ts";
import { CHATML, chatTemplate } from "../../../src/io/chat-template.ts";
import type { Tokenizer } from "../../../src/io/tokenizer.ts";
import type { Engine, EngineStats, GenerationRequest } from "../../../src/serve/engine-types.ts";
import { QueueFull } from "../../../src/serve/errors.ts";
import { type App, type AppOptions, createApp } from "../../../src/serve/http/app.ts";
import type { SampledToken } from "../../../src/serve/sampling.ts";
import { bytesTokenizer } from "../tokenizers.ts";

const END = 256;

export class FakeEngine implements Engine {
  readonly contextLength: number = 200;
  readonly loaded: Map<string, Directory | undefined> = new Map([["pirate", undefined]]);
  readonly requests: GenerationRequest[] = [];
  running = 0;
  isFull = false;
  /** How many ids before its own a token's list of the likeliest begins. */
  rank = 0;
  /** What each answer is; ends with the end of text unless told not to. */
  reply: (request: GenerationRequest) => AsyncIterable<string> | Iterable<string> = () => ["Hello", ", ", "wörld"];
  onLoad: (name: string, directory: Directory) => Promise<void> = async () => {};

  get adapters(): string[] {
    return [...this.loaded.keys()];
  }

  async *generate(request: GenerationRequest): AsyncGenerator<SampledToken, void, undefined> {
    if (this.isFull) throw new QueueFull("generate: at most 0 requests may wait, got one more");
    this.requests.push(request);
    const room = Math.min(request.maxTokens, this.contextLength - request.promptIds.length);
    let count = 0;
    this.running++;
    try {
      for await (const text of this.reply(request))
        for (const id of text === "</s>" ? [END] : new TextEncoder().encode(text)) {
          if (request.signal?.aborted || count === room || id === END) return;
          count++;
          yield { id, logprob: -id / 100, top: top(id + this.rank, request.logprobs ?? 0) };
        }
    } finally {
      this.running--;
    }
  }

  async load(name: string, directory: Directory): Promise<void> {
    await this.onLoad(name, directory);
    this.loaded.set(name, directory);
  }

  async unload(name: string): Promise<void> {
    this.loaded.delete(name);
  }

  stats(): EngineStats {
    return {
      ...{ running: this.running, waiting: 0, kvPagesUsed: 2, kvPages: 8, adaptersResident: this.loaded.size },
      ...{
        adapterLoads: 3,
        adapterEvictions: 1,
        promptTokens: 40,
        cachedPromptTokens: 8,
        generatedTokens: 99,
        steps: 50,
        preemptions: 2,
        gpuBytes: 4096,
      },
    };
  }

  async close(): Promise<void> {}
}

const top = (id: number, n: number): { id: number; logprob: number }[] =>
  Array.from({ length: n }, (_, i) => ({ id: id + i, logprob: i === 2 ? Number.NEGATIVE_INFINITY : -(id + i) / 100 }));

/** Resolves after so many milliseconds. */
export const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** Resolves once it holds, and throws where it never does. */
export async function until(holds: () => boolean, what: string): Promise<void> {
  for (let i = 0; i < 500 && !holds(); i++) await pause(10);
  if (!holds()) throw new Error(`never: ${what}`);
}

const HOST = "127.0.0.1:8000";
export const API_KEY: string = "api-key-".padEnd(40, "a");
export const ADMIN_KEY: string = "admin-key-".padEnd(40, "b");

export interface TestApp {
  readonly app: App;
  readonly engine: FakeEngine;
  /** Lines and errors that the operator sees. */
  readonly seen: { readonly lines: string[]; readonly errors: unknown[] };
  get(path: string, headers?: Record<string, string>): Promise<Response>;
  /** Sends an object as JSON, a text as it is. */
  post(path: string, body: unknown, headers?: Record<string, string>): Promise<Response>;
}

export function testApp(options: Partial<AppOptions> & { readonly tokenizer?: Tokenizer } = {}): TestApp {
  const engine = new FakeEngine();
  const seen = { lines: [] as string[], errors: [] as unknown[] };
  const app = createApp({
    ...{ engine, tokenizer: bytesTokenizer(), renderChat: chatTemplate(CHATML, "chatml"), modelName: "base" },
    ...{ hosts: ["127.0.0.1", "localhost"], clock: Date.now, fingerprint: "test" },
    log: (line) => seen.lines.push(line),
    onError: (error) => seen.errors.push(error),
    ...options,
  });
  const fetch = (path: string, init: RequestInit, headers: Record<string, string>): Promise<Response> =>
    app.fetch(new Request(`http://${HOST}${path}`, { ...init, headers: { Host: HOST, ...headers } }));
  return {
    ...{ app, engine, seen },
    get: (path, headers = {}) => fetch(path, {}, headers),
    post: (path, body, headers = {}) => {
      const text = typeof body === "string" || body instanceof Uint8Array ? (body as string) : JSON.stringify(body);
      return fetch(path, { method: "POST", body: text }, { "Content-Type": "application/json", ...headers });
    },
  };
}

export interface ErrorBody {
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: number;
  };
}

/** The objects of a stream, without its `[DONE]`, and whether that was there. */
export function eventsOf(text: string): { readonly objects: Record<string, unknown>[]; readonly isDone: boolean } {
  const data = [...text.matchAll(/^data: (.*)$/gm)].map(([, json = ""]) => json);
  const objects = data.filter((json) => json !== "[DONE]").map((json) => JSON.parse(json) as Record<string, unknown>);
  return { objects, isDone: data.at(-1) === "[DONE]" };
}
