/** The server as a function from Request to Response, for Node, Deno and tests. */
import { type Context, Hono, type MiddlewareHandler } from "hono";
import { secureHeaders } from "hono/secure-headers";
import type { ChatTemplate } from "../../io/chat-template.ts";
import { endOfAnswer } from "../../io/special-tokens.ts";
import type { TokenBytes, Tokenizer } from "../../io/tokenizer.ts";
import { ShapeError } from "../../tensor/errors.ts";
import type { Engine, GenerationRequest } from "../engine-types.ts";
import { QueueFull } from "../errors.ts";
import type { SampledToken } from "../sampling.ts";
import { type TextPiece, textOf } from "../text.ts";
import { type FindAdapter, RuntimeAdapters } from "./adapters.ts";
import {
  type AnswerOptions,
  type AnswerStyle,
  answerChunks,
  chatStyle,
  completionStyle,
  type Indexed,
  TokenTexts,
  wholeAnswer,
} from "./answers.ts";
import { readFields } from "./body.ts";
import { ApiError } from "./errors.ts";
import { eventStream } from "./event-stream.ts";
import type { Fields } from "./fields.ts";
import { busy, demandHost, exactHosts, exactOrigins, Gate, Keys } from "./guards.ts";
import { merged } from "./merged.ts";
import { Metrics } from "./metrics.ts";
import { type Asked, askedChat, askedCompletion, noSuchModel, type Served } from "./requests.ts";

export interface ServeLimits {
  /** Of a request's body; 1 MiB. */
  readonly bodyBytes: number;
  /** How long a body may take to arrive; 30 seconds. */
  readonly bodyMs: number;
  /** Of a prompt; the context but for one token. */
  readonly promptTokens: number;
  /** Largest `max_tokens`; the context. */
  readonly maxTokens: number;
  /** Answers at a time for one key, each choice of a request one; 64. Without keys all count as one key. */
  readonly concurrentPerKey: number;
  /** A quiet stream gets a comment as often; 15 seconds. */
  readonly keepAliveMs: number;
  /** A reader who takes nothing for so long is given up; 60 seconds. */
  readonly stallMs: number;
}

export interface AppOptions {
  readonly engine: Engine;
  /** With `tokenBytes` a response_format may ask for JSON. */
  readonly tokenizer: Tokenizer & Partial<TokenBytes>;
  /** Writes messages as text; without it `/v1/chat/completions` says that there is none. */
  readonly renderChat?: ChatTemplate | undefined;
  /** What the base goes by. Adapters go by their own names. */
  readonly modelName: string;
  /** Hosts by which clients know this server, without ports: the Host header must be one of them. */
  readonly hosts: readonly string[];
  /** Origins of pages that may ask; none unless given. */
  readonly origins?: readonly string[] | undefined;
  /** One of these must come as `Authorization: Bearer`; without any, everybody may ask. */
  readonly apiKeys?: readonly string[] | undefined;
  /** The key to load and unload adapters, none of `apiKeys`. */
  readonly adminKey?: string | undefined;
  /** Adapters may be loaded and unloaded while the server runs, out of these directories; not unless given. */
  readonly adapterDirectory?: FindAdapter | undefined;
  readonly limits?: Partial<ServeLimits> | undefined;
  /** Milliseconds since 1970; Date.now unless given. */
  readonly clock?: (() => number) | undefined;
  /** Is told of each response in a line, which has nothing that a client wrote. */
  readonly log?: ((line: string) => void) | undefined;
  /** Is told of errors that are the server's own; the client is not. */
  readonly onError?: ((error: unknown) => void) | undefined;
  /** What says that answers were made by the same program. */
  readonly fingerprint?: string | undefined;
}

/** A server without a port. */
export interface App {
  fetch(request: Request): Promise<Response>;
  /** Refuses what comes from now on. Resolves when all answers have ended; those that have not within the time are cut off. */
  drain(deadlineMs: number): Promise<void>;
}

type Env = { readonly Variables: { key: number } };
type Handler = (c: Context<Env>) => Promise<Response> | Response;

/**
 * OpenAI's `/v1/models`, `/v1/chat/completions` and `/v1/completions`, where an adapter is a model by its name, vLLM's `/v1/load_lora_adapter` and
 * `/v1/unload_lora_adapter`, `/health` and `/metrics`.
 *
 *     const app = createApp({ engine, tokenizer, modelName: "base", hosts: ["localhost"] });
 *     serve({ fetch: app.fetch, port: 8000 }); // of @hono/node-server; or Deno.serve({ port: 8000 }, app.fetch)
 *
 * Limits of connections, headers and their time are the listener's: `lowrank serve` has them.
 *
 * Throws ShapeError for keys, hosts and origins that cannot be.
 */
export function createApp(options: AppOptions): App {
  const server = new Server(options);
  return { fetch: async (request) => server.app.fetch(request), drain: (deadlineMs) => server.drain(deadlineMs) };
}

class Server {
  readonly app: Hono<Env> = new Hono<Env>();
  readonly #options: AppOptions;
  readonly #served: Served;
  readonly #limits: ServeLimits;
  readonly #clock: () => number;
  readonly #texts: TokenTexts;
  readonly #metrics = new Metrics();
  readonly #gate: Gate;
  readonly #hosts: ReadonlySet<string>;
  readonly #origins: ReadonlySet<string>;
  readonly #paths = new Set<string>();
  /** Seconds since 1970. */
  readonly #created: number;
  /** Ends each answer that is being made. */
  readonly #answers = new Set<AbortController>();
  #isDraining = false;
  #onIdle = (): void => {};

  constructor(options: AppOptions) {
    const { engine, tokenizer, renderChat, modelName, adminKey, apiKeys = [], adapterDirectory } = options;
    if (adapterDirectory && adminKey === undefined)
      throw new ShapeError("createApp: adapterDirectory must go with an adminKey, got none");
    if (adminKey !== undefined && apiKeys.includes(adminKey))
      throw new ShapeError("createApp: adminKey must be another than the apiKeys, got one of them");
    this.#options = options;
    this.#limits = {
      ...{ bodyBytes: 2 ** 20, bodyMs: 30e3, keepAliveMs: 15e3, stallMs: 60e3, concurrentPerKey: 64 },
      ...{ promptTokens: engine.contextLength - 1, maxTokens: engine.contextLength },
      ...options.limits,
    };
    const endIds = renderChat ? endOfAnswer(renderChat, tokenizer) : [];
    this.#served = { engine, tokenizer, renderChat, endIds, modelName, limits: this.#limits };
    this.#clock = options.clock ?? Date.now;
    this.#texts = new TokenTexts(tokenizer);
    this.#gate = new Gate(this.#limits.concurrentPerKey);
    this.#hosts = exactHosts(options.hosts);
    this.#origins = exactOrigins(options.origins ?? []);
    this.#created = Math.floor(this.#clock() / 1000);

    const keyed = door(new Keys(apiKeys));
    this.app.use(this.#recorded, secureHeaders(SECURE_HEADERS), this.#guarded);
    this.app.onError((error, c) => this.#failure(error, c));
    this.#route("GET", "/health", [], (c) => this.#health(c));
    this.#route("GET", "/metrics", [keyed], (c) => c.body(this.#metrics.text(engine.stats()), 200, PROMETHEUS));
    this.#route("GET", "/v1/models", [keyed], (c) => c.json({ object: "list", data: this.#names().map(this.#card) }));
    this.#route("GET", "/v1/models/:id{.+}", [keyed], (c) => {
      const id = c.req.param("id") ?? "";
      if (!this.#names().includes(id)) throw noSuchModel(id);
      return c.json(this.#card(id));
    });
    this.#route("POST", "/v1/chat/completions", [keyed], (c) => this.#answer(c, chatStyle, askedChat));
    this.#route("POST", "/v1/completions", [keyed], (c) => this.#answer(c, completionStyle, askedCompletion));
    if (adapterDirectory) {
      const adapters = new RuntimeAdapters(engine, modelName, adapterDirectory);
      const admin = door(new Keys([adminKey ?? ""]));
      const said = (action: (fields: Fields) => Promise<string>): Handler => {
        return async (c) => c.text(await action(await readFields(c.req.raw, this.#limits)));
      };
      this.#route("POST", "/v1/load_lora_adapter", [admin], said(adapters.load.bind(adapters)));
      this.#route("POST", "/v1/unload_lora_adapter", [admin], said(adapters.unload.bind(adapters)));
    }
    this.app.notFound(() => {
      throw new ApiError(404, "no such endpoint");
    });
  }

  #route(method: "GET" | "POST", path: string, guards: readonly MiddlewareHandler<Env>[], handler: Handler): void {
    this.app.on(method, [path], ...guards, handler);
    this.app.all(path, () => {
      throw new ApiError(405, `the method must be ${method}, got another`, { headers: { Allow: method } });
    });
    this.#paths.add(path);
  }

  /** Counts and logs each response under its route, and names it. */
  readonly #recorded: MiddlewareHandler<Env> = async (c, next) => {
    const start = this.#clock();
    await next();
    const { path } = c.req;
    const route = this.#paths.has(path) ? path : path.startsWith("/v1/models/") ? "/v1/models/{id}" : "other";
    const method = ["GET", "POST", "OPTIONS", "HEAD"].includes(c.req.method) ? c.req.method : "other";
    this.#metrics.countResponse(route, method, c.res.status);
    c.res.headers.set("X-Request-Id", crypto.randomUUID());
    c.res.headers.set("Cache-Control", "no-store");
    this.#options.log?.(`${method} ${route} ${c.res.status} ${Math.round(this.#clock() - start)} ms`);
  };

  /** Lets through who knows the server's name and comes from no page, or from one of the `origins`. */
  readonly #guarded: MiddlewareHandler<Env> = async (c, next) => {
    demandHost(c.req.header("host") ?? new URL(c.req.url).host, this.#hosts);
    const origin = c.req.header("origin");
    if (origin === undefined) return next();
    if (!this.#origins.has(origin))
      throw new ApiError(
        403,
        "pages of this origin may not ask. The server's operator can allow it with --cors-origin",
      );
    if (c.req.method === "OPTIONS") c.res = c.body(null, 204, PREFLIGHT);
    else await next();
    c.res.headers.set("Access-Control-Allow-Origin", origin);
    c.res.headers.set("Access-Control-Expose-Headers", "Retry-After, Warnings, X-Request-Id");
    c.res.headers.append("Vary", "Origin");
  };

  /** Says in OpenAI's words what is the client's fault, and of all else no more than that. */
  #failure(error: unknown, c: Context<Env>): Response {
    const { body, status, headers } = this.#apiError(error);
    return c.json(body, status, { ...headers });
  }

  #apiError(error: unknown): ApiError {
    if (error instanceof ApiError) return error;
    if (error instanceof QueueFull) return busy("the server has too many requests waiting. Try again later");
    // What the checks of a request let through and the engine does not.
    if (error instanceof ShapeError) return new ApiError(400, error.message);
    this.#options.onError?.(error);
    return new ApiError(500, "the server failed at this request");
  }

  #health(c: Context<Env>): Response {
    if (this.#isDraining) return c.json({ status: "draining" }, 503);
    return this.#served.engine.failure === undefined ? c.json({ status: "ok" }) : c.json({ status: "failed" }, 503);
  }

  #names(): string[] {
    return [this.#served.modelName, ...this.#served.engine.adapters];
  }

  readonly #card = (id: string): object => {
    const { modelName, engine } = this.#served;
    return {
      ...{ id, object: "model", created: this.#created, owned_by: "lowrank" },
      ...{ root: modelName, parent: id === modelName ? null : modelName, max_model_len: engine.contextLength },
    };
  };

  async #answer(
    c: Context<Env>,
    style: AnswerStyle,
    read: (fields: Fields, served: Served) => Asked,
  ): Promise<Response> {
    if (this.#isDraining) throw unavailable();
    const answer = this.#begin(c.get("key"), c.req.raw.signal);
    try {
      const asked = read(await readFields(c.req.raw, this.#limits), this.#served);
      answer.widen(asked.generations.length);
      const warnings = warningsOf(asked.unknown);
      if (warnings !== undefined) c.header("Warnings", warnings);
      const options: AnswerOptions = {
        style,
        head: {
          id: `${style.idPrefix}${crypto.randomUUID()}`,
          created: Math.floor(this.#clock() / 1000),
          model: asked.model,
          system_fingerprint: this.#options.fingerprint ?? "lowrank",
        },
        promptTokens: asked.promptTokens,
        texts: asked.hasLogprobs ? this.#texts : undefined,
      };
      const pieces = this.#pieces(asked, answer);
      if (!asked.stream) return c.json(await wholeAnswer(pieces, options));
      const { keepAliveMs, stallMs } = this.#limits;
      const stream = await eventStream(answerChunks(pieces, { ...options, includeUsage: asked.includeUsage }), {
        ...{ keepAliveMs, stallMs },
        onAbandoned: () => answer.stop(),
        onError: (error) => this.#apiError(error).body,
      });
      answer.isStreamed = true;
      return c.body(stream, 200, { "Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no" });
    } finally {
      if (!answer.isStreamed) answer.end();
    }
  }

  /** The text of an answer as it comes. Ends the answer with it. */
  async *#pieces({ generations, stop }: Asked, answer: Answer): AsyncGenerator<Indexed, void, undefined> {
    const start = this.#clock();
    let isFirst = true;
    const { controller } = answer;
    try {
      const choices = generations.map((one) => this.#choice(one, stop, controller.signal));
      for await (const piece of merged(choices, () => controller.abort())) {
        if (isFirst) this.#metrics.firstText.observe((this.#clock() - start) / 1000);
        isFirst = false;
        yield piece;
      }
      this.#metrics.whole.observe((this.#clock() - start) / 1000);
    } finally {
      answer.end();
    }
  }

  async *#choice(
    generation: GenerationRequest,
    stop: readonly string[],
    signal: AbortSignal,
  ): AsyncGenerator<TextPiece, void, undefined> {
    const { engine, tokenizer } = this.#options;
    const { adapter, promptIds, maxTokens } = generation;
    const room = Math.min(maxTokens, engine.contextLength - promptIds.length);
    // It may have been unloaded since the request was read.
    if (adapter !== undefined && !engine.adapters.includes(adapter)) throw noSuchModel(adapter);
    const start = this.#clock();
    const onStart = (): void => this.#metrics.queue.observe((this.#clock() - start) / 1000);
    const tokens = this.#paced(engine.generate({ ...generation, signal, onStart }));
    const isDone = (): boolean => generation.constraint?.isDone ?? false;
    for await (const piece of textOf(tokens, { tokenizer, promptIds, stop, room, isDone })) {
      if (signal.aborted) break;
      yield piece;
    }
    if (signal.aborted) throw unavailable();
  }

  async *#paced(tokens: AsyncIterable<SampledToken>): AsyncGenerator<SampledToken, void, undefined> {
    let last: number | undefined;
    for await (const token of tokens) {
      const now = this.#clock();
      if (last !== undefined) this.#metrics.betweenTokens.observe((now - last) / 1000);
      last = now;
      yield token;
    }
  }

  /** An answer for this key, which ends early where its client goes away. Throws a 429. */
  #begin(key: number, gone: AbortSignal): Answer {
    const leaving = [this.#gate.enter(key)];
    const controller = new AbortController();
    const stop = (): void => {
      if (controller.signal.aborted || !this.#answers.has(controller)) return;
      this.#metrics.abandoned++;
      controller.abort();
    };
    gone.addEventListener("abort", stop, { once: true });
    this.#answers.add(controller);
    if (gone.aborted) stop();
    const end = (): void => {
      gone.removeEventListener("abort", stop);
      for (const leave of leaving) leave();
      this.#answers.delete(controller);
      if (this.#answers.size === 0) this.#onIdle();
    };
    const widen = (count: number): void => void leaving.push(this.#gate.enter(key, count - 1));
    return { controller, widen, stop, end, isStreamed: false };
  }

  async drain(deadlineMs: number): Promise<void> {
    this.#isDraining = true;
    if (this.#answers.size === 0) return;
    const cutOff = setTimeout(() => {
      for (const controller of this.#answers) controller.abort();
    }, deadlineMs);
    await new Promise<void>((resolve) => {
      this.#onIdle = resolve;
    });
    clearTimeout(cutOff);
  }
}

interface Answer {
  readonly controller: AbortController;
  /** It is of so many, each of which counts. Throws a 429. */
  widen(count: number): void;
  /** Ends it early: nobody waits. */
  stop(): void;
  /** It has ended. */
  end(): void;
  /** Whether it goes on after the response has begun. */
  isStreamed: boolean;
}

const SECURE_HEADERS = {
  contentSecurityPolicy: { defaultSrc: ["'none'"], frameAncestors: ["'none'"] },
  strictTransportSecurity: false, // TLS, and what it promises, is a proxy's
};
const PROMETHEUS = { "Content-Type": "text/plain; version=0.0.4; charset=utf-8" };
const PREFLIGHT = {
  "Access-Control-Allow-Methods": "GET, POST",
  "Access-Control-Allow-Headers": "Authorization, Content-Type, *", // the openai client sends some of its own; * is without Authorization
  "Access-Control-Max-Age": "600",
};

/** Lets through who has one of the keys, and remembers which. */
const door =
  (keys: Keys): MiddlewareHandler<Env> =>
  async (c, next) => {
    c.set("key", keys.isOpen ? -1 : await keys.demand(c.req.header("authorization")));
    await next();
  };

const unavailable = (): ApiError =>
  new ApiError(503, "the server is about to stop. Try again later", {
    headers: { "Retry-After": "5", Connection: "close" },
  });

/** Names of unknown fields, of the characters that a header may have. */
function warningsOf(unknown: readonly string[]): string | undefined {
  if (unknown.length === 0) return undefined;
  const named = unknown.filter((name) => /^[\w.[\]-]{1,64}$/.test(name)).slice(0, 10);
  const others = unknown.length - named.length;
  const list = [...named, ...(others > 0 ? [`${others} more`] : [])].join(", ");
  return `unknown fields were ignored: ${list}`;
}
