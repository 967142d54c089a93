// Who may ask, and what a stranger is told: the rules that keep a server on a desk or a network from being anyone's.
import { afterEach, describe, expect, test, vi } from "vitest";
import { CHATML, chatTemplate } from "../../../src/io/chat-template.ts";
import { Chat } from "../../../src/serve/chat.ts";
import { createApp } from "../../../src/serve/http/app.ts";
import { Keys } from "../../../src/serve/http/guards.ts";
import { ShapeError } from "../../../src/tensor/errors.ts";
import { bytesTokenizer, charactersTokenizer } from "../tokenizers.ts";
import { ADMIN_KEY, API_KEY, type ErrorBody, eventsOf, FakeEngine, pause, testApp, until } from "./harness.ts";

afterEach(() => {
  vi.restoreAllMocks();
});

const PAGE = "https://chat.example";
const completion = { model: "base", prompt: "a" };
const bearer = (key: string): { Authorization: string } => ({ Authorization: `Bearer ${key}` });
const errorOf = async (response: Response): Promise<ErrorBody["error"]> => ((await response.json()) as ErrorBody).error;

describe("the Host header", () => {
  test.each(["127.0.0.1", "127.0.0.1:8000", "LOCALHOST:1", "localhost.", "localhost.:80"])(
    "%s is known",
    async (host) => {
      expect((await testApp().get("/health", { Host: host })).status).toBe(200);
    },
  );

  test.each([
    ...["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "127.0.0.2", "[::1]", "localhost@evil.example"],
    ...["localhost/", "localhost:8000:1", "127.0.0.1:abc", "a b", "127.0.0.1,evil.example", ""],
  ])("%j is another's: a page whose name means this machine gets nothing", async (host) => {
    for (const path of ["/health", "/metrics", "/v1/models", "/nothing"]) {
      const response = await testApp().get(path, { Host: host });
      expect(response.status).toBe(403);
      expect((await errorOf(response)).message).toBe(
        "the Host header must name this server, got another. Its operator can allow it",
      );
    }
  });

  test("may be an IPv6 address that is allowed", async () => {
    const { get } = testApp({ hosts: ["::1"] });
    expect((await get("/health", { Host: "[::1]:8000" })).status).toBe(200);
    expect((await get("/health", { Host: "127.0.0.1" })).status).toBe(403);
  });
});

describe("the Origin header", () => {
  test.each(["https://evil.example", "null", "http://127.0.0.1:8000", `${PAGE}.evil.example`, "https://CHAT.example"])(
    "%s may not ask, nor ask whether it may, unless it is allowed",
    async (origin) => {
      const { app, post, engine } = testApp({ origins: [PAGE] });
      const response = await post("/v1/completions", completion, { Origin: origin });
      expect(response.status).toBe(403);
      expect(response.headers.get("access-control-allow-origin")).toBeNull();
      const preflight = new Request("http://127.0.0.1/v1/completions", {
        method: "OPTIONS",
        headers: { Origin: origin },
      });
      expect((await app.fetch(preflight)).status).toBe(403);
      expect(engine.requests).toEqual([]);
    },
  );

  test("of no page at all may ask unless one is allowed", async () => {
    expect((await testApp().get("/v1/models", { Origin: PAGE })).status).toBe(403);
  });

  test("that is allowed may ask, and reads the answer, its errors too", async () => {
    const { app, post } = testApp({ origins: [PAGE, "http://localhost:5173"], apiKeys: [API_KEY] });
    const preflight = await app.fetch(
      new Request("http://127.0.0.1/v1/completions", { method: "OPTIONS", headers: { Origin: PAGE } }),
    );
    expect(preflight.status).toBe(204);
    expect(Object.fromEntries(preflight.headers)).toMatchObject({
      "access-control-allow-origin": PAGE,
      "access-control-allow-methods": "GET, POST",
      "access-control-allow-headers": "Authorization, Content-Type, *",
      vary: "Origin",
    });
    for (const [key, status] of [
      [API_KEY, 200],
      ["another", 401],
    ] as const) {
      const response = await post("/v1/completions", completion, { Origin: PAGE, ...bearer(key) });
      expect(response.status).toBe(status);
      expect(response.headers.get("access-control-allow-origin")).toBe(PAGE);
      expect(response.headers.get("access-control-allow-credentials")).toBeNull();
    }
  });

  test.each(["*", "null", "https://chat.example/", "chat.example", "https://chat.example/path", ""])(
    "cannot be allowed as %j",
    (origin) => {
      expect(() => testApp({ origins: [origin] })).toThrow(
        new ShapeError(
          `createApp: an origin must be scheme, host and port such as https://chat.example, got ${origin}. It is compared as it is; there is no *`,
        ),
      );
    },
  );
});

describe("keys", () => {
  const keyed = [
    ["GET", "/metrics"],
    ["GET", "/v1/models"],
    ["GET", "/v1/models/base"],
    ["POST", "/v1/completions"],
    ["POST", "/v1/chat/completions"],
  ] as const;

  test.each(keyed)("%s %s needs one, and says nothing without", async (method, path) => {
    const { get, post, engine } = testApp({
      apiKeys: [API_KEY],
      adminKey: ADMIN_KEY,
      adapterDirectory: async () => undefined,
    });
    const ask = (headers: Record<string, string>): Promise<Response> =>
      method === "GET" ? get(path, headers) : post(path, completion, headers);
    const wrong = [
      "",
      "Bearer",
      "Bearer ",
      `Basic ${API_KEY}`,
      API_KEY,
      `Bearer ${API_KEY}x`,
      `Bearer ${API_KEY.slice(1)}`,
    ];
    for (const authorization of [...wrong, `Bearer ${ADMIN_KEY}`, `Bearer ${API_KEY} ${API_KEY}`]) {
      const response = await ask({ Authorization: authorization });
      expect(response.status, authorization).toBe(401);
      expect(response.headers.get("www-authenticate")).toBe("Bearer");
      expect(await errorOf(response)).toEqual({
        message: "the Authorization header must be Bearer and a key of this server, got none or another",
        ...{ type: "AuthenticationError", param: null, code: 401 },
      });
    }
    expect((await ask({})).status).toBe(401);
    expect(engine.requests).toEqual([]);
    expect((await ask(bearer(API_KEY))).status).not.toBe(401);
  });

  test("are all as good as each other, and the word Bearer is so in any case", async () => {
    const { get } = testApp({ apiKeys: [API_KEY, "another"] });
    expect((await get("/v1/models", { Authorization: "bearer another" })).status).toBe(200);
    expect((await get("/v1/models", bearer(API_KEY))).status).toBe(200);
  });

  test("are compared as hashes of one length, every byte of each, whatever was sent", async () => {
    const digest = vi.spyOn(crypto.subtle, "digest");
    const keys = new Keys([API_KEY, "another"]);
    const reads: number[] = [];
    const reduce = Uint8Array.prototype.reduce;
    vi.spyOn(Uint8Array.prototype, "reduce").mockImplementation(function (this: Uint8Array, ...args: unknown[]) {
      reads.push(this.length);
      return (reduce as (...all: unknown[]) => number).apply(this, args);
    });
    for (const key of ["x", API_KEY, API_KEY.slice(0, -1), "y".repeat(5000)])
      await keys.demand(`Bearer ${key}`).catch(() => undefined);
    expect(reads).toEqual(new Array(8).fill(32));
    expect(digest).toHaveBeenCalledTimes(2 + 4);
  });

  test("are not asked for /health", async () => {
    const response = await testApp({ apiKeys: [API_KEY] }).get("/health");
    expect([response.status, await response.json()]).toEqual([200, { status: "ok" }]);
  });

  test("that no header can hold are refused", () => {
    for (const key of ["", "a b", "schlüssel", "a\n"])
      expect(() => testApp({ apiKeys: [key] })).toThrow(
        new ShapeError("createApp: a key must be of visible ASCII characters, got one that is not"),
      );
  });
});

describe("loading adapters", () => {
  const paths = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"];

  test.each(paths)("%s is not there unless it is allowed", async (path) => {
    const { post } = testApp({ apiKeys: [API_KEY], adminKey: ADMIN_KEY });
    const response = await post(path, { lora_name: "pirate" }, bearer(ADMIN_KEY));
    expect([response.status, (await errorOf(response)).message]).toEqual([404, "no such endpoint"]);
  });

  test.each(paths)("%s wants the admin's key, not a client's", async (path) => {
    const { post, engine } = testApp({
      apiKeys: [API_KEY],
      adminKey: ADMIN_KEY,
      adapterDirectory: async () => undefined,
    });
    for (const headers of [{}, bearer(API_KEY)])
      expect((await post(path, { lora_name: "pirate", lora_path: "pirate" }, headers)).status).toBe(401);
    expect(engine.adapters).toEqual(["pirate"]);
  });

  test("needs a key of its own", () => {
    expect(() => testApp({ adapterDirectory: async () => undefined })).toThrow(
      new ShapeError("createApp: adapterDirectory must go with an adminKey, got none"),
    );
    expect(() => testApp({ apiKeys: [API_KEY], adminKey: API_KEY })).toThrow(
      new ShapeError("createApp: adminKey must be another than the apiKeys, got one of them"),
    );
  });
});

describe("limits", () => {
  test("a key has so many answers at a time, and is told when to come again", async () => {
    const engine = new FakeEngine();
    let end = (): void => {};
    const wait = new Promise<void>((resolve) => {
      end = resolve;
    });
    engine.reply = async function* () {
      await wait;
      yield "x";
    };
    const { post } = testApp({ engine, apiKeys: [API_KEY, "another"], limits: { concurrentPerKey: 2 } });
    const ask = (key: string, stream = false): Promise<Response> =>
      post("/v1/completions", { ...completion, stream }, bearer(key));
    const first = [ask(API_KEY), ask(API_KEY)];
    await until(() => engine.running === 2, "two are running");
    const third = await ask(API_KEY);
    expect([third.status, third.headers.get("retry-after")]).toEqual([429, "1"]);
    expect((await errorOf(third)).message).toBe("a key must have at most 2 answers at a time, got 2 and 1 more");
    const other = ask("another");
    await until(() => engine.running === 3, "another key has its own");
    end();
    for (const response of await Promise.all([...first, other])) expect(response.status).toBe(200);
    for (let i = 0; i < 5; i++) {
      expect((await ask(API_KEY)).status, "a place is given back").toBe(200);
      expect((await (await ask(API_KEY, true)).text()).endsWith("data: [DONE]\n\n")).toBe(true);
      expect((await post("/v1/completions", { model: "x" }, bearer(API_KEY))).status).toBe(404);
    }
  });

  test("each choice counts, and all are given back", async () => {
    const { post } = testApp({ limits: { concurrentPerKey: 4 } });
    for (let i = 0; i < 5; i++) {
      const many = await post("/v1/completions", { ...completion, prompt: ["a", "b"], n: 3 });
      expect(many.status).toBe(429);
      expect((await errorOf(many)).message).toBe("a key must have at most 4 answers at a time, got 1 and 5 more");
      for (const stream of [false, true]) {
        const response = await post("/v1/completions", { ...completion, n: 4, stream });
        expect(response.status, await response.text()).toBe(200);
      }
    }
  });

  test("choices that do not all fit into the queue are refused together, before a stream begins", async () => {
    const { post, engine } = testApp();
    engine.reply = async function* ({ signal }) {
      engine.isFull = engine.running === 2;
      while (!signal?.aborted) {
        yield "more";
        await pause(1);
      }
    };
    for (const stream of [false, true]) {
      const response = await post("/v1/completions", { ...completion, n: 3, stream });
      expect([response.status, response.headers.get("retry-after")]).toEqual([429, "1"]);
      await until(() => engine.running === 0, "none is left");
      engine.isFull = false;
    }
  });

  test("a full queue is 429 with Retry-After", async () => {
    const { post, engine } = testApp();
    engine.isFull = true;
    for (const stream of [false, true]) {
      const response = await post("/v1/completions", { ...completion, stream });
      expect([response.status, response.headers.get("retry-after")]).toEqual([429, "1"]);
      expect(await errorOf(response)).toEqual({
        message: "the server has too many requests waiting. Try again later",
        ...{ type: "RateLimitError", param: null, code: 429 },
      });
    }
  });

  test("a body of 1 MiB is read and a byte more is not, however its length is said", async () => {
    const { app } = testApp();
    const bodyOf = (bytes: number): string => {
      const empty = JSON.stringify({ ...completion, user: "" });
      return JSON.stringify({ ...completion, user: "x".repeat(bytes - empty.length) });
    };
    const send = (body: string, headers: Record<string, string>): Promise<Response> => {
      let at = 0;
      const stream = new ReadableStream<Uint8Array>({
        pull(controller) {
          if (at >= body.length) return controller.close();
          controller.enqueue(new TextEncoder().encode(body.slice(at, at + 5000)));
          at += 5000;
        },
      });
      const init = { method: "POST", body: stream, headers: { "Content-Type": "application/json", ...headers } };
      return app.fetch(new Request("http://127.0.0.1/v1/completions", { ...init, duplex: "half" } as RequestInit));
    };
    expect(bodyOf(2 ** 20).length).toBe(2 ** 20);
    for (const headers of [{}, { "Transfer-Encoding": "chunked" }, { "Content-Length": "10" }]) {
      expect((await send(bodyOf(2 ** 20), headers)).status).toBe(200);
      const response = await send(bodyOf(2 ** 20 + 1), headers);
      expect([response.status, response.headers.get("connection")]).toEqual([413, "close"]);
      expect((await errorOf(response)).message).toBe("the body must be at most 1048576 bytes, got more");
    }
    expect((await send("{}", { "Content-Length": String(2 ** 20 + 1) })).status).toBe(413);
  });

  test("a body that does not come is not waited for", async () => {
    const { app } = testApp({ limits: { bodyMs: 30 } });
    const init = {
      method: "POST",
      body: new ReadableStream({ start: (controller) => controller.enqueue(new TextEncoder().encode("{")) }),
      headers: { "Content-Type": "application/json" },
    };
    const response = await app.fetch(
      new Request("http://127.0.0.1/v1/completions", { ...init, duplex: "half" } as RequestInit),
    );
    expect(response.status).toBe(408);
    expect((await errorOf(response)).message).toBe("the body must be there within 0.03 seconds, got a part");
  });

  test("prompts have a most, in tokens, and in characters before they are counted", async () => {
    const encode = vi.fn(bytesTokenizer().encode);
    const { post } = testApp({ tokenizer: { ...bytesTokenizer(), encode }, limits: { promptTokens: 10 } });
    const messageOf = async (prompt: unknown): Promise<string> =>
      (await errorOf(await post("/v1/completions", { model: "base", prompt }))).message;
    expect((await post("/v1/completions", { model: "base", prompt: "x".repeat(9) })).status).toBe(200);
    expect(await messageOf("x".repeat(10))).toBe("the prompt must be of 1 to 10 tokens, got 11");
    expect(await messageOf(new Array(11).fill(1))).toBe("the prompt must be of 1 to 10 tokens, got 11");
    encode.mockClear();
    expect(await messageOf("x".repeat(161))).toBe("the prompt must be of at most 160 characters, got 161");
    expect(encode).not.toHaveBeenCalled();
  });
});

describe("streams", () => {
  test("a quiet one gets comments, which no client minds", async () => {
    const { post, engine } = testApp({ limits: { keepAliveMs: 20 } });
    engine.reply = async function* () {
      await pause(70);
      yield "a";
      await pause(70);
      yield "b";
    };
    const text = await (await post("/v1/completions", { ...completion, stream: true })).text();
    expect(text).toMatch(/^(: keep-alive\n\n)+data: .*"a"[\s\S]*\n\n(: keep-alive\n\n)+data: .*"b"/);
    const { objects, isDone } = eventsOf(text);
    expect([objects.length, isDone]).toEqual([3, true]);
  });

  test("one that lasts longer than a reader may wait goes on as long as it is read", async () => {
    const { post, engine } = testApp({ limits: { stallMs: 60 } });
    engine.reply = async function* () {
      for (const piece of "abcdef") {
        yield piece;
        await pause(25);
      }
      await pause(100);
      yield "g";
    };
    const { objects, isDone } = eventsOf(await (await post("/v1/completions", { ...completion, stream: true })).text());
    expect([objects.length, isDone]).toEqual([8, true]);
  });

  test("a reader who takes nothing is given up, and the engine with it", async () => {
    const { post, engine } = testApp({ limits: { stallMs: 50 } });
    engine.reply = async function* (request) {
      for (let i = 0; i < 150 && !request.signal?.aborted; i++) yield "x";
    };
    const response = await post("/v1/completions", { ...completion, max_tokens: 150, stream: true });
    await until(() => engine.running === 0, "the answer has ended");
    expect(engine.requests[0]?.signal?.aborted).toBe(true);
    await expect(response.text()).rejects.toThrow(
      "event stream: what was sent must be read, got a reader that does not",
    );
  });

  test("an answer to messages ends where the template ends one, one to a prompt at the model's own end", async () => {
    const tokenizer = charactersTokenizer();
    const { post, engine } = testApp({ tokenizer });
    await post("/v1/chat/completions", { model: "base", messages: [{ role: "user", content: "a" }] });
    await post("/v1/completions", completion);
    const chat = new Chat(engine, { tokenizer, renderChat: chatTemplate(CHATML, "chatml") });
    await chat.ask({ messages: [{ role: "user", content: "a" }] }).next();
    await chat.ask({ prompt: "a" }).next();
    const end = tokenizer.encode("<|im_end|>");
    expect(engine.requests.map(({ endIds }) => endIds)).toEqual([end, undefined, end, undefined]);
  });

  test("who has left before the answer begins gets none made", async () => {
    const { app, engine } = testApp();
    const body = JSON.stringify({ ...completion, max_tokens: 190 });
    const headers = { Host: "127.0.0.1:8000", "Content-Type": "application/json" };
    const url = "http://127.0.0.1:8000/v1/completions";
    const request = new Request(url, { method: "POST", body, headers, signal: AbortSignal.abort() });
    expect((await app.fetch(request)).status).toBe(503);
    expect(engine.requests.map(({ signal }) => signal?.aborted)).toEqual([true]);
  });

  test("a reader who leaves ends the answer at once", async () => {
    const { post, get, engine } = testApp({ limits: { concurrentPerKey: 1 } });
    engine.reply = async function* (request) {
      while (!request.signal?.aborted) {
        yield "x";
        await pause(1);
      }
    };
    const { body } = await post("/v1/completions", { ...completion, max_tokens: 190, stream: true });
    const reader = body?.getReader();
    await reader?.read();
    await reader?.cancel();
    await until(() => engine.running === 0, "the answer has ended");
    expect(await (await get("/metrics")).text()).toContain("\nlowrank_answers_abandoned_total 1\n");
    engine.reply = () => ["y"];
    expect((await post("/v1/completions", completion)).status, "the place is given back").toBe(200);
  });
});

describe("stopping", () => {
  test("lets answers end, refuses new ones and says so to who balances the load", async () => {
    const { app, post, get, engine } = testApp();
    let end = (): void => {};
    const wait = new Promise<void>((resolve) => {
      end = resolve;
    });
    engine.reply = async function* () {
      yield "be";
      await wait;
      yield "gun";
    };
    const running = await post("/v1/completions", { ...completion, stream: true });
    let isDrained = false;
    const drained = app.drain(60_000).then(() => {
      isDrained = true;
    });
    const refused = await post("/v1/completions", completion);
    expect([refused.status, refused.headers.get("retry-after"), refused.headers.get("connection")]).toEqual([
      503,
      "5",
      "close",
    ]);
    expect((await errorOf(refused)).message).toBe("the server is about to stop. Try again later");
    const health = await get("/health");
    expect([health.status, await health.json()]).toEqual([503, { status: "draining" }]);
    expect(isDrained).toBe(false);
    end();
    const text = eventsOf(await running.text());
    expect(text.objects.map(({ choices }) => (choices as { text: string }[])[0]?.text).join("")).toBe("begun");
    expect(text.isDone).toBe(true);
    await drained;
  });

  test("cuts off what takes too long, and says that it did", async () => {
    const { app, post, engine } = testApp();
    engine.reply = async function* (request) {
      while (!request.signal?.aborted) {
        yield "x";
        await pause(5);
      }
    };
    const asked = { ...completion, max_tokens: 190 };
    const streamed = await post("/v1/completions", { ...asked, stream: true });
    const whole = post("/v1/completions", asked);
    const text = streamed.text();
    await until(() => engine.running === 2, "both are running");
    await app.drain(20);
    expect(engine.running).toBe(0);
    expect((await whole).status).toBe(503);
    const { objects, isDone } = eventsOf(await text);
    expect(isDone).toBe(false);
    expect(objects.at(-1)).toMatchObject({ error: { type: "ServiceUnavailableError", code: 503 } });
  });

  test("is done at once where nothing runs", async () => {
    await testApp().app.drain(60_000);
  });
});

describe("what goes out", () => {
  test("an error of the server's own tells the operator all and the client nothing", async () => {
    const { post, engine, seen } = testApp();
    const error = new Error("ENOENT: /home/me/models/base: at Object.<anonymous> (/srv/x.js:1:2)");
    engine.reply = () => {
      throw error;
    };
    const response = await post("/v1/completions", completion);
    expect(response.status).toBe(500);
    expect(await errorOf(response)).toEqual({
      ...{ message: "the server failed at this request", type: "InternalServerError", param: null, code: 500 },
    });
    expect(seen.errors).toEqual([error]);
  });

  test("an error that the engine finds in a request is the client's", async () => {
    const { post, engine } = testApp();
    engine.reply = () => {
      throw new ShapeError("generate: the adapter must be loaded, got one that has just gone");
    };
    const response = await post("/v1/completions", completion);
    expect([response.status, (await errorOf(response)).message]).toEqual([
      400,
      "generate: the adapter must be loaded, got one that has just gone",
    ]);
  });

  test.each(["/health", "/v1/models", "/nothing", "/metrics"])(
    "%s comes with headers that keep pages from it",
    async (path) => {
      const { headers } = await testApp().get(path);
      expect(Object.fromEntries(headers)).toMatchObject({
        "x-content-type-options": "nosniff",
        "x-frame-options": "SAMEORIGIN",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "x-request-id": expect.stringMatching(/^[0-9a-f-]{36}$/),
      });
      expect(headers.get("server")).toBeNull();
      expect(headers.get("x-powered-by")).toBeNull();
    },
  );

  test("a streamed answer is not to be kept or held back by proxies", async () => {
    const { headers } = await testApp().post("/v1/completions", { ...completion, stream: true });
    expect(Object.fromEntries(headers)).toMatchObject({
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-store",
      "x-accel-buffering": "no",
    });
  });

  test("the log has a line per response and nothing that a client wrote", async () => {
    let now = 0;
    const { get, post, seen, engine } = testApp({ clock: () => now });
    engine.reply = () => {
      now += 1500;
      return ["secret answer"];
    };
    await post("/v1/completions", { ...completion, prompt: "secret prompt" });
    await get("/v1/models/secret?query=secret");
    await get("/secret%0Aline", { Authorization: "Bearer secret", "User-Agent": "secret" });
    await post("/v1/completions", { model: "secret" });
    expect(seen.lines).toEqual([
      "POST /v1/completions 200 1500 ms",
      "GET /v1/models/{id} 404 0 ms",
      "GET other 404 0 ms",
      "POST /v1/completions 404 0 ms",
    ]);
  });

  test("fields that nobody knows are named in a header, as far as a header can", async () => {
    const { post } = testApp();
    const warningsOf = async (more: object): Promise<string | null> =>
      (await post("/v1/completions", { ...completion, ...more })).headers.get("warnings");
    expect(await warningsOf({})).toBeNull();
    expect(await warningsOf({ user: "me", metadata: {}, store: false, tools: [], n: 1, suffix: null })).toBeNull();
    expect(await warningsOf({ guided_json: {}, "evil\r\nX-Injected: 1": 1, ignore_eos: true })).toBe(
      "unknown fields were ignored: guided_json, ignore_eos, 1 more",
    );
    expect(await warningsOf({ stream: true, stream_options: { include_obfuscation: false, x: 1 } })).toBe(
      "unknown fields were ignored: stream_options.x",
    );
    const chat = await post("/v1/chat/completions", {
      model: "base",
      messages: [{ role: "user", content: [{ type: "text", text: "a", cache_control: {} }], weight: 1 }],
    });
    expect(chat.headers.get("warnings")).toBe(
      "unknown fields were ignored: messages[0].content[0].cache_control, messages[0].weight",
    );
  });

  test("a method that a path has not is 405 and says which it has", async () => {
    const { app } = testApp();
    for (const [path, method] of [
      ["/health", "GET"],
      ["/v1/models", "GET"],
      ["/v1/models/base", "GET"],
      ["/v1/completions", "POST"],
    ] as const) {
      const response = await app.fetch(new Request(`http://127.0.0.1${path}`, { method: "DELETE" }));
      expect([response.status, response.headers.get("allow")]).toEqual([405, method]);
    }
  });
});

describe("a model", () => {
  test("without a chat template answers completions, and of chats says what to do", async () => {
    const { post } = testApp({ renderChat: undefined });
    expect((await post("/v1/completions", completion)).status).toBe(200);
    const response = await post("/v1/chat/completions", { model: "base", messages: [{ role: "user", content: "a" }] });
    expect(response.status).toBe(400);
    expect(await errorOf(response)).toEqual({
      message:
        "the model must have a chat template to take messages, got none. Use /v1/completions with a prompt, or start the server with --chat-template",
      ...{ type: "BadRequestError", param: "messages", code: 400 },
    });
  });

  test("whose name has slashes is found by it", async () => {
    const { get } = testApp({ modelName: "org/name@main" });
    expect((await get("/v1/models/org/name@main")).status).toBe(200);
    expect((await get("/v1/models/org%2Fname%40main")).status).toBe(200);
  });
});

test("no request makes the server ask another host", async () => {
  const fetched = vi.spyOn(globalThis, "fetch").mockRejectedValue(new Error("the server fetched"));
  const find = vi.fn(async () => undefined);
  const { get, post, app } = testApp({ adminKey: ADMIN_KEY, adapterDirectory: find });
  const url = "http://169.254.169.254/latest/meta-data";
  const image = { type: "image_url", image_url: { url } };
  for (const response of [
    await post("/v1/chat/completions", { model: "base", messages: [{ role: "user", content: [image] }] }),
    await post("/v1/chat/completions", { model: url, messages: [{ role: "user", content: url }] }),
    await post("/v1/load_lora_adapter", { lora_name: "x", lora_path: url }, bearer(ADMIN_KEY)),
    await get(`/v1/models/${url}`),
    await app.fetch(new Request(url, { headers: { Host: "127.0.0.1" } })),
  ])
    expect([400, 404]).toContain(response.status);
  expect((await post("/v1/completions", { model: "base", prompt: url })).status).toBe(200);
  expect(fetched).not.toHaveBeenCalled();
  expect(find).not.toHaveBeenCalled();
});

test("an app needs the options that keep it safe", () => {
  const options = { engine: new FakeEngine(), tokenizer: bytesTokenizer(), modelName: "base" };
  expect(() => createApp({ ...options, hosts: ["a b"] })).toThrow(
    new ShapeError("createApp: a host must be a name or an address, got a b"),
  );
});

test("an engine that has failed is not healthy, so that a proxy leaves it out", async () => {
  const { engine, get } = testApp();
  expect((await get("/health")).status).toBe(200);
  Object.assign(engine, { failure: new Error("the device is lost") });
  const health = await get("/health");
  expect([health.status, await health.json()]).toEqual([503, { status: "failed" }]);
});

test("an adapter that is unloaded while its request is read is a 404, as one that never was", async () => {
  let asked = 0;
  class Leaving extends FakeEngine {
    override get adapters(): string[] {
      return ++asked === 1 ? ["pirate"] : [];
    }
  }
  const { post } = testApp({ engine: new Leaving() });
  const answer = await post("/v1/completions", { model: "pirate", prompt: "a" });
  expect([answer.status, await answer.json()]).toEqual([
    404,
    { error: { message: "The model `pirate` does not exist.", type: "NotFoundError", param: "model", code: 404 } },
  ]);
});
