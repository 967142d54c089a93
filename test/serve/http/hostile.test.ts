// What a stranger may send: each is answered with an error of the client's kind, the server goes on, and nothing outside of the adapters is touched.
import { cp, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { type Listening, listen } from "../../../src/cli/serve-node.ts";
import { directoriesIn } from "../../../src/io/files.ts";
import { readText } from "../../../src/io/json.ts";
import { TextState } from "../../../src/serve/grammar.ts";
import { bytesTokenizer } from "../tokenizers.ts";
import { ADMIN_KEY, API_KEY, type ErrorBody, FakeEngine, testApp } from "./harness.ts";

const CANARY = "nobody may read this";
const engine = new FakeEngine();
let home = "";
let server: Listening;
let tree: string[];
/** What the engine read of the directories that it was given. */
const read: (string | undefined)[] = [];

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-hostile-"));
  const at = (path: string): string => join(home, path);
  for (const directory of ["outside", "adapters/good", "adapters/linked", "adapters/.hidden"])
    await mkdir(at(directory), { recursive: true });
  await writeFile(at("outside/adapter_config.json"), CANARY);
  await writeFile(at("adapters/file"), CANARY);
  await writeFile(at("adapters/good/adapter_config.json"), "{}");
  await symlink(at("outside"), at("adapters/link"));
  await symlink(at("adapters/good"), at("adapters/alias"));
  await symlink(at("outside/adapter_config.json"), at("adapters/linked/adapter_config.json"));
  await cp(at("outside"), at("adapters/.hidden"), { recursive: true });
  tree = await readdir(home, { recursive: true });
  engine.onLoad = async (_, directory) => {
    read.push(await readText(directory, "adapter_config.json"));
  };
  const served = testApp({
    ...{ engine, apiKeys: [API_KEY], adminKey: ADMIN_KEY, adapterDirectory: directoriesIn(at("adapters")) },
    limits: { bodyMs: 300 },
  });
  const options = { host: "127.0.0.1", port: 0, maxConnections: 50, headersMs: 300, requestMs: 600 };
  server = await listen(served.app, options);
});
afterAll(async () => {
  server.cutOff();
  await server.close();
  expect(await readdir(home, { recursive: true }), "nothing was written").toEqual(tree);
  expect(JSON.stringify(read), "nothing outside was read").not.toContain(CANARY);
  await rm(home, { recursive: true, force: true });
});

/** JSON as it is written, for values that `JSON.stringify` has not. */
class Raw {
  readonly json: string;
  constructor(written: string) {
    this.json = written;
  }
}
const json = (fields: Readonly<Record<string, unknown>>): string => {
  const text = (value: unknown): string => (value instanceof Raw ? value.json : JSON.stringify(value));
  const given = Object.entries(fields).filter(([, value]) => value !== undefined);
  return `{${given.map(([key, value]) => `${JSON.stringify(key)}:${text(value)}`).join(",")}}`;
};

interface Case {
  readonly name: string;
  readonly path: string;
  readonly body: string | Uint8Array | undefined;
  readonly status: number;
  readonly param?: string | undefined;
  readonly headers?: Readonly<Record<string, string>>;
  readonly method?: string;
}

const COMPLETION = "/v1/completions";
const CHAT = "/v1/chat/completions";
const short = (text: string): string => (text.length > 50 ? `${text.slice(0, 50)}… (${text.length})` : text);

const field = (path: string, more: Readonly<Record<string, unknown>>, param?: string, status = 400): Case => {
  const usual =
    path === CHAT ? { model: "base", messages: [{ role: "user", content: "a" }] } : { model: "base", prompt: "a" };
  return {
    name: short(json(more)),
    path,
    body: json({ ...usual, ...more }),
    status,
    param: param ?? Object.keys(more)[0],
  };
};
const body = (name: string, content: string | Uint8Array, status = 400): Case => ({
  ...{ name, path: COMPLETION, body: content, status },
});
const admin = (path: string, fields: Readonly<Record<string, unknown>>, status = 400, param?: string): Case => ({
  ...{ name: short(json(fields)), path, body: json(fields), status, param },
  headers: { Authorization: `Bearer ${ADMIN_KEY}` },
});

const NO_NUMBERS: readonly unknown[] = [
  ...["1", "NaN", "Infinity", "-Infinity", "", true, [1], { a: 1 }],
  ...[new Raw("1e999"), new Raw("-1e999")],
];
const OUT_OF_RANGE: Readonly<Record<string, readonly number[]>> = {
  temperature: [-1, -1e-9, 2.0001, 1e308],
  top_p: [0, -0.1, 1.1],
  top_k: [-2, 1.5, 1e12],
  min_p: [-0.1, 1.1],
  presence_penalty: [-2.1, 2.1],
  frequency_penalty: [-2.1, 2.1],
  repetition_penalty: [0, -1, 1e9],
  max_tokens: [0, -1, 1.5, 201, 2 ** 31, 1e300],
  seed: [0.5, 2 ** 60],
  logprobs: [-1, 6, 0.5],
};
const message = (more: object): Record<string, unknown> => ({ messages: [{ role: "user", content: "a", ...more }] });
const part = (more: object): Record<string, unknown> => message({ content: [more] });
const traversals = [
  ...[
    "..",
    ".",
    "../outside",
    "../../etc",
    "good/../../outside",
    "good/",
    "/etc",
    "//etc",
    "./good",
    "good/.",
    "~",
    "~root",
  ],
  ...[
    "good\\..\\outside",
    "C:\\x",
    "file:///etc/passwd",
    "http://127.0.0.1/x",
    "a\u0000b",
    "good\u0000",
    "a..b",
    "...",
  ],
  ...[
    "",
    "x".repeat(65),
    "-a",
    "_a",
    ".hidden",
    "%2e%2e",
    "%2e%2e%2foutside",
    "\uff0e\uff0e",
    "a b",
    "a\n",
    "good\r\n",
    "$HOME",
    "`id`",
  ],
  ...["*", "good;ls", "CON:", "é"],
];

const cases: Case[] = [
  ...Object.entries(OUT_OF_RANGE).flatMap(([name, values]) =>
    [...values, ...NO_NUMBERS].map((value) => field(COMPLETION, { [name]: value })),
  ),
  ...[0, -1, 17, 1.5, "1", "2", 1e6, 1e9, true, [2], {}].map((n) => field(COMPLETION, { n })),
  ...[0, 2, "1", 17].map((best) => field(COMPLETION, { best_of: best })),
  field(COMPLETION, { n: 2, best_of: 3 }, "best_of"),
  field(COMPLETION, { n: 9, prompt: ["a", "b"] }, "n"),
  ...[-1, 21, 1.5, "5"].map((top) => field(CHAT, { top_logprobs: top, logprobs: true }, "top_logprobs")),
  ...[field(CHAT, { top_logprobs: 2 }), field(CHAT, { logprobs: 3 }), field(CHAT, { logprobs: "true" })],
  ...[201, 0, -5, "7"].map((most) => field(CHAT, { max_completion_tokens: most })),
  field(CHAT, { max_tokens: 5, max_completion_tokens: 6 }),
  ...["", "x".repeat(65), 1, true, {}, [1], [[]], [""], [null], ["a", "b", "c", "d", "e"], ["x".repeat(65)]].map(
    (stop) => field(COMPLETION, { stop }),
  ),
  ...["-1", "abc", "258", "1e3", "0x10", " 1", "1.5", "999999999999", "", "NaN", "toString"].map((id) =>
    field(COMPLETION, { logit_bias: { [id]: 1 } }),
  ),
  ...[101, -101, "5", true, [], {}].map((bias) => field(COMPLETION, { logit_bias: { "1": bias } }, "logit_bias.1")),
  ...[[], "x", 1, Object.fromEntries(Array.from({ length: 1025 }, (_, i) => [i, 1]))].map((bias) =>
    field(COMPLETION, { logit_bias: bias }),
  ),
  ...["true", 1, [], {}].map((stream) => field(COMPLETION, { stream })),
  field(COMPLETION, { stream_options: { include_usage: true } }),
  field(COMPLETION, { stream: true, stream_options: "x" }, "stream_options"),
  field(COMPLETION, { stream: true, stream_options: { include_usage: 1 } }, "stream_options.include_usage"),
  ...[
    undefined,
    null,
    [],
    [[]],
    ["a", 1],
    [[1], "a", null],
    ["a", [258]],
    [[1], []],
    new Array(17).fill("a"),
    {},
    1,
    true,
    [null],
    [{ a: 1 }],
    [-1],
    [258],
    [1.5],
    [1, "a"],
  ].map((prompt) => ({ ...field(COMPLETION, { prompt }), name: `prompt ${JSON.stringify(prompt)}` })),
  field(COMPLETION, { prompt: "x".repeat(199) }),
  field(COMPLETION, { prompt: "x".repeat(5e5) }),
  field(COMPLETION, { prompt: new Array(200).fill(1) }),
  field(CHAT, message({ content: "x".repeat(199) })),
  ...[undefined, null, [], "hi", {}, 1].map((messages) => ({
    ...field(CHAT, { messages }),
    name: `messages ${JSON.stringify(messages)}`,
  })),
  ...[null, "a", [], 1].map((one) => field(CHAT, { messages: [one] }, "messages[0]")),
  field(CHAT, { messages: new Array(1025).fill({ role: "user", content: "" }) }),
  ...["tool", "function", "", "User", "__proto__", 1, null, {}].map((role) =>
    field(CHAT, message({ role }), "messages[0].role"),
  ),
  ...[null, 1, true, {}, []].map((content) => field(CHAT, message({ content }), "messages[0].content")),
  ...["image_url", "input_audio", "file", "refusal", 1, null].map((type) =>
    field(CHAT, part({ type, text: "a", image_url: { url: "file:///etc/passwd" } }), "messages[0].content[0].type"),
  ),
  ...[undefined, 1, null, {}].map((text) => field(CHAT, part({ type: "text", text }), "messages[0].content[0].text")),
  field(CHAT, message({ content: [null] }), "messages[0].content[0]"),
  field(CHAT, message({ name: 1 }), "messages[0].name"),
  ...["tool_calls", "function_call", "audio"].map((key) =>
    field(CHAT, message({ [key]: { id: "x" } }), `messages[0].${key}`),
  ),
  ...[
    { tools: [{ type: "function" }] },
    { tools: "x" },
    { functions: [{}] },
    { tool_choice: "required" },
    { tool_choice: { type: "function" } },
    { function_call: "auto" },
    { response_format: { type: "json_object" } },
    { response_format: { type: "json_schema" } },
    { response_format: "text" },
    { modalities: ["audio"] },
    { audio: {} },
    { prediction: {} },
    { web_search_options: {} },
  ].map((more) => field(CHAT, more)),
  ...[{ echo: true }, { suffix: "x" }, { echo: 1 }].map((more) => field(COMPLETION, more)),
  ...[undefined, null, 1, [], {}, true].map((model) => ({
    ...field(COMPLETION, { model }),
    name: `model ${JSON.stringify(model)}`,
  })),
  ...["", "Base", "base ", "../base", "../../etc/passwd", "pirate/../base", "base\u0000", "x".repeat(1e5)].map(
    (model) => field(COMPLETION, { model }, "model", 404),
  ),
  ...["__proto__", "constructor", "toString", "hasOwnProperty", "\ud800", "😀", "base:pirate", "<script>"].map(
    (model) => field(CHAT, { model }, "model", 404),
  ),
  ...["", " ", "{", "null", "[]", "1", '"x"', "{'a':1}", '{"a":1,}', "undefined", "{}}", '{"model":NaN}', "<xml/>"].map(
    (text) => body(`the body ${text}`, text),
  ),
  body("a key twice", '{"model":"base","prompt":"a","model":"pirate"}'),
  body("a key twice, once escaped", '{"model":"base","prompt":"a","\\u006dodel":"pirate"}'),
  body("a key twice, deep inside", '{"model":"base","prompt":"a","x":{"y":[{"z":1,"z":2}]}}'),
  body("33 lists in one another", `{"model":"base","prompt":"a","x":${"[".repeat(33)}${"]".repeat(33)}}`),
  body("500,000 lists in one another", "[".repeat(5e5)),
  body("200,000 objects in one another", '{"a":'.repeat(2e5)),
  body("lists behind a text with brackets and quotes", `{"x":"\\"]]","y":${"[".repeat(40)}${"]".repeat(40)}}`),
  body("__proto__ as a key", '{"__proto__":{"model":"base"},"prompt":"a"}'),
  body("__proto__ of a message", '{"model":"base","messages":[{"__proto__":{"role":"user"}}]}'),
  field(COMPLETION, { logit_bias: new Raw('{"__proto__":1}') }, "logit_bias.__proto__"),
  field(COMPLETION, { stream: true, stream_options: new Raw('{"__proto__":1}') }, "stream_options.__proto__"),
  field(CHAT, { messages: [new Raw('{"__proto__":{}}')].map(() => ({ content: "a" })) }, "messages[0].role"),
  body("bytes that are no UTF-8", Uint8Array.of(0x7b, 0x22, 0xff, 0xfe, 0x22, 0x3a, 0x31, 0x7d)),
  body("an overlong slash", Uint8Array.of(0x7b, 0x22, 0xc0, 0xaf, 0x22, 0x3a, 0x31, 0x7d)),
  body("a surrogate as UTF-8", Uint8Array.of(0x7b, 0x22, 0xed, 0xa0, 0x80, 0x22, 0x3a, 0x31, 0x7d)),
  body("UTF-16", new Uint8Array(Uint16Array.from([...'{"a":1}'].map((c) => c.charCodeAt(0))).buffer)),
  body("zeros", new Uint8Array(1000)),
  body("gzip", Uint8Array.of(0x1f, 0x8b, 8, 0, 0, 0, 0, 0)),
  body("a control character in a text", '{"model":"base","prompt":"a\u0001"}'),
  body("more than 1 MiB", `{"x":"${"x".repeat(2 ** 20)}"}`, 413),
  ...["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", "text/json"].map(
    (type) => ({
      ...body(`Content-Type ${type}`, '{"model":"base","prompt":"a"}', 415),
      headers: { "Content-Type": type },
    }),
  ),
  ...["gzip", "br", "deflate, gzip"].map((encoding) => ({
    ...body(`Content-Encoding ${encoding}`, '{"model":"base","prompt":"a"}', 415),
    headers: { "Content-Encoding": encoding },
  })),
  { ...body("another's origin", "{}", 403), headers: { Origin: "https://evil.example" } },
  { ...body("another's key", "{}", 401), headers: { Authorization: "Bearer x" } },
  { ...body("the admin's key", "{}", 401), headers: { Authorization: `Bearer ${ADMIN_KEY}` } },
  ...traversals.flatMap((name) => [
    admin("/v1/load_lora_adapter", { lora_name: name, lora_path: "good" }, 400, "lora_name"),
    admin("/v1/load_lora_adapter", { lora_name: "x", lora_path: name }, 400, "lora_path"),
    admin("/v1/unload_lora_adapter", { lora_name: name }, 400, "lora_name"),
  ]),
  ...[1, null, undefined, [], {}].flatMap((name) => [
    admin("/v1/load_lora_adapter", { lora_name: name, lora_path: "good" }, 400, "lora_name"),
    admin("/v1/load_lora_adapter", { lora_name: "x", lora_path: name }, 400, "lora_path"),
  ]),
  ...["link", "alias", "nothing", "file", "x".repeat(64), "constructor", "good.."].map((name) =>
    admin("/v1/load_lora_adapter", { lora_name: "x", lora_path: name }, name === "good.." ? 400 : 404, "lora_path"),
  ),
  ...["base", "pirate"].map((name) =>
    admin("/v1/load_lora_adapter", { lora_name: name, lora_path: "good" }, 400, "lora_name"),
  ),
  ...["base", "x", "constructor"].map((name) =>
    admin("/v1/unload_lora_adapter", { lora_name: name }, 404, "lora_name"),
  ),
  { ...admin("/v1/load_lora_adapter", { lora_name: "x", lora_path: "good" }, 401), headers: {} },
  ...["/.env", "/v1", "/v1/", "/v1/completions/", "/v1/completions%00", "/V1/completions", "//evil.example/health"].map(
    (path) => ({
      ...{ name: `GET ${path}`, path, body: undefined, status: 404 },
    }),
  ),
  ...["..%2f..%2fetc%2fpasswd", "%00", "%ff", "x".repeat(8000), "base%20", "__proto__"].map((id) => ({
    ...{ name: short(`GET /v1/models/${id}`), path: `/v1/models/${id}`, body: undefined, status: 404 },
  })),
  ...["PUT", "DELETE", "PATCH", "OPTIONS"].map((method) => ({
    ...{ name: `${method} ${COMPLETION}`, path: COMPLETION, body: undefined, status: 405, method },
  })),
  ...["GET", "PUT"].map((method) => ({
    ...admin("/v1/load_lora_adapter", {}, 405),
    ...{ name: `${method} /v1/load_lora_adapter`, body: undefined, method },
  })),
];

test("the table has at least 200 cases", () => {
  expect(cases.length).toBeGreaterThanOrEqual(200);
});

test.each(cases)("$path: $name is refused", async ({ path, body: content, status, param, headers = {}, method }) => {
  const asked = engine.requests.length;
  const response = await fetch(`http://127.0.0.1:${server.port}${path}`, {
    method: method ?? (content === undefined ? "GET" : "POST"),
    headers: { Authorization: `Bearer ${API_KEY}`, "Content-Type": "application/json", ...headers },
    ...(content !== undefined && { body: content as BodyInit }),
  });
  const text = await response.text();
  expect(response.status, text).toBe(status);
  demandTyped(text, status);
  if (param !== undefined) expect((JSON.parse(text) as ErrorBody).error.param).toBe(param);
  expect(engine.requests.length, "the engine was not asked").toBe(asked);
  await demandAlive();
});

function demandTyped(text: string, status: number): void {
  const { error } = JSON.parse(text) as ErrorBody;
  expect(Object.keys(error)).toEqual(["message", "type", "param", "code"]);
  expect(error.code).toBe(status);
  expect(error.type).toMatch(/^[A-Z][A-Za-z]+Error$/);
  expect(error.message.length).toBeLessThan(500);
  expect(text).not.toContain(home);
  expect(text).not.toContain(CANARY);
  expect(text).not.toMatch(/\bat .*\.[tj]s:|node:internal|\/src\//);
}

async function demandAlive(): Promise<void> {
  const response = await fetch(`http://127.0.0.1:${server.port}/health`);
  expect(await response.json()).toEqual({ status: "ok" });
  expect(({} as Record<string, unknown>).model, "no prototype was changed").toBeUndefined();
}

/** Sends bytes as they are and gives what comes back until the connection ends. */
function raw(...pieces: readonly (string | Uint8Array | number)[]): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect(server.port, "127.0.0.1");
    let text = "";
    socket.setEncoding("latin1").on("data", (data: string) => {
      text += data;
    });
    socket.on("close", () => resolve(text));
    socket.on("error", (error: NodeJS.ErrnoException) => {
      if (error.code !== "ECONNRESET" && error.code !== "EPIPE") reject(error);
    });
    socket.on("connect", async () => {
      for (const piece of pieces) {
        if (typeof piece === "number") await new Promise((next) => setTimeout(next, piece));
        else if (!socket.destroyed) socket.write(piece);
      }
    });
  });
}

const lines = (...all: string[]): string => `${all.join("\r\n")}\r\n\r\n`;
const AUTH = `Authorization: Bearer ${API_KEY}`;
const POST = [
  `POST ${COMPLETION} HTTP/1.1`,
  "Host: 127.0.0.1",
  AUTH,
  "Content-Type: application/json",
  "Connection: close",
];
const flood = `10000\r\n${"x".repeat(65536)}\r\n`.repeat(40);

test.each([
  ["no Host", 400, [lines("GET /health HTTP/1.1")]],
  ["no Host in HTTP/1.0", 400, [lines("GET /health HTTP/1.0")]],
  ["another's Host", 403, [lines("GET /health HTTP/1.1", "Host: evil.example", "Connection: close")]],
  ["a Host that is none", 400, [lines("GET /health HTTP/1.1", "Host: a b", "Connection: close")]],
  [
    "another's Host in the target",
    403,
    [lines("GET http://evil.example/health HTTP/1.1", "Host: evil.example", "Connection: close")],
  ],
  ["no HTTP", 400, ["\u0016\u0003\u0001\u0002hello\r\n\r\n"]],
  ["a method that there is not", 400, [lines("NOPE /health HTTP/1.1", "Host: 127.0.0.1")]],
  ["HTTP of another version", 400, [lines("GET /health HTTP/9.9", "Host: 127.0.0.1")]],
  ["headers of 20 KiB", 431, [lines("GET /health HTTP/1.1", "Host: 127.0.0.1", `X: ${"x".repeat(20000)}`)]],
  [
    "4,000 headers",
    431,
    [lines("GET /health HTTP/1.1", "Host: 127.0.0.1", ...Array.from({ length: 4000 }, (_, i) => `X-${i}: 1`))],
  ],
  ["a header with a zero", 400, [lines("GET /health HTTP/1.1", "Host: 127.0.0.1", "X: a\u0000b")]],
  ["a header without a name", 400, [lines("GET /health HTTP/1.1", "Host: 127.0.0.1", ": x")]],
  ["a length below 0", 400, [lines(...POST, "Content-Length: -1")]],
  ["a length that is no number", 400, [lines(...POST, "Content-Length: 0x10")]],
  ["two lengths", 400, [lines(...POST, "Content-Length: 1", "Content-Length: 2")]],
  ["a length and chunks", 400, [lines(...POST, "Content-Length: 1", "Transfer-Encoding: chunked"), "0\r\n\r\n"]],
  ["chunks whose length is no number", 400, [lines(...POST, "Transfer-Encoding: chunked"), "zz\r\n{}\r\n0\r\n\r\n"]],
  ["chunks of more than 1 MiB", 413, [lines(...POST, "Transfer-Encoding: chunked"), flood, "0\r\n\r\n"]],
  ["chunks without an end", 413, [lines(...POST, "Transfer-Encoding: chunked"), flood, 200, flood]],
  ["a length beyond 1 MiB, and no body", 413, [lines(...POST, "Content-Length: 99999999")]],
  ["a head that does not end", 408, ["GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", 100, "X: 1\r\n", 100, "Y: 1\r\n"]],
  ["a body that does not come", 408, [lines(...POST, "Content-Length: 20")]],
  [
    "a body byte by byte",
    408,
    [
      lines(...POST, "Content-Length: 2000"),
      ..."{"
        .repeat(10)
        .split("")
        .flatMap((c) => [c, 50]),
    ],
  ],
  [
    "a body that is shorter than it is said",
    408,
    [lines(...POST, "Content-Length: 40"), '{"model":"base","prompt":"a"}'],
  ],
] as const)("on the wire: %s is %i", async (_, status, pieces) => {
  const answer = await raw(...(pieces as readonly (string | number)[]));
  expect(answer).toMatch(new RegExp(`^HTTP/1\\.[01] ${status} `));
  const content = answer.slice(answer.indexOf("\r\n\r\n") + 4);
  if (content !== "") demandTyped(/\{.*\}/s.exec(content)?.[0] ?? content, status);
  await demandAlive();
});

test("on the wire: 60 connections that say nothing are ended, and others are served meanwhile", async () => {
  const silent = Array.from({ length: 60 }, () => raw());
  await new Promise((resolve) => setTimeout(resolve, 50));
  const answers = await Promise.all(silent);
  expect(answers.length).toBe(60);
  await demandAlive();
});

test("on the wire: a client that resets its connection in a body or an answer harms nobody", async () => {
  for (const rest of ['{"mod', '{"model":"base","prompt":"a","stream":true}      ']) {
    const socket = connect(server.port, "127.0.0.1");
    socket.on("error", () => undefined);
    await new Promise((resolve) => socket.write(`${lines(...POST, `Content-Length: 49`)}${rest}`, resolve));
    socket.resetAndDestroy();
    await demandAlive();
  }
});

test("a directory with a link inside has no file of that name, and the engine's words come without the path", async () => {
  const load = (path: string): Promise<Response> =>
    fetch(`http://127.0.0.1:${server.port}/v1/load_lora_adapter`, {
      method: "POST",
      headers: { Authorization: `Bearer ${ADMIN_KEY}`, "Content-Type": "application/json" },
      body: JSON.stringify({ lora_name: "fine", lora_path: path }),
    });
  read.length = 0;
  expect(await (await load("good")).text()).toBe("Success: LoRA adapter 'fine' added successfully.");
  expect(engine.adapters).toEqual(["pirate", "fine"]);
  await engine.unload("fine");
  expect((await load("linked")).status).toBe(200);
  expect(read).toEqual(["{}", undefined]);
  expect(await readFile(join(home, "outside/adapter_config.json"), "utf8")).toBe(CANARY);
});

describe("a schema that is made to take long", () => {
  const tokenizer = { ...bytesTokenizer(), tokenBytes: (id: number) => (id < 256 ? Uint8Array.of(id) : undefined) };
  const around = (schema: unknown, depth: number): unknown =>
    depth === 0
      ? schema
      : { type: "object", required: ["a", "b", "c"], additionalProperties: around(schema, depth - 1) };
  const asked = (schema: unknown, n = 1): object => ({
    ...{ model: "base", messages: [{ role: "user", content: "a" }], n },
    response_format: { type: "json_schema", json_schema: { name: "x", schema } },
  });

  test("is compiled once for all choices, however deep it is, and each has a constraint of its own", async () => {
    const app = testApp({ tokenizer });
    const compiled = vi.spyOn(TextState, "of");
    const response = await app.post(CHAT, asked(around({}, 6), 16));
    const times = compiled.mock.calls.length;
    compiled.mockRestore();
    expect([response.status, times]).toEqual([200, 1]);
    expect(new Set(app.engine.requests.map(({ constraint }) => constraint)).size).toBe(16);
    const [first, second] = app.engine.requests.map(({ constraint }) => constraint);
    first?.accept("{".charCodeAt(0));
    expect([first, second].map((one) => one?.allows('"'.charCodeAt(0)))).toEqual([true, false]);
    expect((await app.post(CHAT, asked(around({}, 26)))).status).toBe(200);
  });

  test.each([
    [
      "60,000 schemas",
      { anyOf: new Array(60_000).fill({}) },
      "json schema: must have at most 20000 schemas in it, got more. Leave out properties or alternatives",
    ],
    ["too many deep inside", around({ anyOf: new Array(60_000).fill({}) }, 20), "json schema: must have at most 20000"],
  ])("is refused: %s", async (_, schema, rule) => {
    const app = testApp({ tokenizer });
    const response = await app.post(CHAT, asked(schema, 16));
    const { error } = (await response.json()) as ErrorBody;
    expect([response.status, error.param]).toEqual([400, "response_format"]);
    expect(error.message).toContain(rule);
    expect(app.engine.requests).toEqual([]);
  });
});
