// A chat here, and at the other end of a MessagePort: the answers are those of `generate` alone.
import { readFileSync } from "node:fs";
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import { loadModel } from "../../src/models/load.ts";
import { type Chat, openChat, serveChat } from "../../src/serve/chat.ts";
import { createChat, type RemoteChat } from "../../src/serve/chat-client.ts";
import type { ChatRequest } from "../../src/serve/chat-messages.ts";
import { generate } from "../../src/serve/generate.ts";
import type { TextPiece } from "../../src/serve/text.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { testGpu } from "../harness.ts";
import { type AdapterFiles, randomAdapter } from "./adapters.ts";
import { lettersTemplate, lettersTokenizer } from "./letters.ts";

type Model = Awaited<ReturnType<typeof loadModel>>;
let model: Model;
const adapters = new Map<string, AdapterFiles>();
const random = new Random(17);
const CONFIGS: Readonly<Record<string, LoraConfig>> = {
  plain: { r: 3, alpha: 6, targetModules: "all-linear" },
  dora: { r: 2, alpha: 8, targetModules: ["q_proj", "up_proj"], useDora: true },
};

beforeAll(async () => {
  model = await loadModel(await testGpu(), diskDirectory("test/golden/llama-default"));
  for (const [name, config] of Object.entries(CONFIGS)) adapters.set(name, await randomAdapter(model, config, random));
});
afterAll(() => model.destroy());

/** What the model alone says, by the ids. */
async function alone(promptIds: readonly number[], maxTokens: number, adapter?: string): Promise<string> {
  const files = adapters.get(adapter ?? "");
  const attached = files && (await loadPeft(model, memoryDirectory("adapter", files)));
  const ids: number[] = [];
  for await (const id of generate(model, { promptIds, maxTokens })) ids.push(id);
  attached?.detach();
  return lettersTokenizer.decode(ids);
}

const QUESTION = [{ role: "user", content: "who are you" }];
const QUESTION_IDS = lettersTokenizer.encode("user who are you. assistant ", { addSpecialTokens: false });
const PROMPT_IDS = lettersTokenizer.encode("Once upon a time");
/** An answer that goes on to the end of the context. */
const noEnd = new Map([[2, -1e9]]);

const textOf = async (pieces: AsyncIterable<TextPiece>): Promise<string> => {
  let text = "";
  for await (const piece of pieces) text += piece.text;
  return text;
};
const message = (error: unknown): string => `${(error as Error).name}: ${(error as Error).message}`;
const failure = async (pieces: AsyncIterable<TextPiece>): Promise<string> => textOf(pieces).then(String, message);

let before = 0;
let chat: Chat;
let remote: RemoteChat;
let ports: MessageChannel;
beforeEach(async () => {
  before = model.gpu.counters().bytesLive;
  const directories = [...adapters].map(([name, files]) => [name, memoryDirectory(name, files)] as const);
  const parts = { tokenizer: lettersTokenizer, renderChat: lettersTemplate, pool: { slots: 3 } };
  const opened = openChat(model, { ...parts, adapters: Object.fromEntries(directories) });
  ports = new MessageChannel();
  remote = createChat(ports.port1);
  serveChat(opened, ports.port2);
  chat = await opened;
});
afterEach(async () => {
  await chat.close();
  ports.port1.close();
  expect(model.gpu.counters().bytesLive).toBe(before);
});

const all = (asked: Pick<Chat, "ask">): Promise<string[]> =>
  Promise.all(
    [undefined, "plain", "dora"].flatMap((adapter) => [
      textOf(asked.ask({ messages: QUESTION, adapter, maxTokens: 9 })),
      textOf(asked.ask({ prompt: "Once upon a time", adapter, maxTokens: 12 })),
    ]),
  );

test("requests of two adapters and none at once are answered as each is alone, here and over a port", async () => {
  await chat.close();
  const expected: string[] = [];
  for (const adapter of [undefined, "plain", "dora"])
    expected.push(await alone(QUESTION_IDS, 9, adapter), await alone(PROMPT_IDS, 12, adapter));
  expect(new Set(expected).size, "adapters change the answer").toBe(6);
  const directories = [...adapters].map(([name, files]) => [name, memoryDirectory(name, files)] as const);
  const parts = { tokenizer: lettersTokenizer, renderChat: lettersTemplate };
  chat = await openChat(model, { ...parts, adapters: Object.fromEntries(directories) });
  const channel = new MessageChannel();
  serveChat(chat, channel.port2);
  const other = createChat(channel.port1);
  expect(await all(chat)).toEqual(expected);
  expect(await all(other)).toEqual(expected);
  await other.close();
});

test("an answer streams over a port: pieces of one token, of which the last says why it ended", async () => {
  const pieces: TextPiece[] = [];
  for await (const piece of remote.ask({ prompt: "Once", maxTokens: 5, logitBias: noEnd, logprobs: 2 }))
    pieces.push(piece);
  expect(pieces.length).toBeGreaterThan(3);
  expect(pieces.map(({ finishReason }) => finishReason).filter(Boolean)).toEqual(["length"]);
  expect(pieces.at(-1)?.finishReason).toBe("length");
  expect(pieces[0]?.tokens[0]?.top.length).toBe(2);
});

test("without maxTokens an answer goes to the end of the context, and a stop ends it before", async () => {
  const whole: TextPiece[] = [];
  let text = "";
  for await (const piece of remote.ask({ prompt: "Once", logitBias: noEnd })) {
    whole.push(piece);
    text += piece.text;
  }
  expect(whole.flatMap(({ tokens }) => tokens).length).toBe(64 - 5);
  expect(whole.at(-1)?.finishReason).toBe("length");
  const stop = text.slice(3, 6);
  expect(await textOf(remote.ask({ prompt: "Once", logitBias: noEnd, stop: [stop] }))).toBe(
    text.slice(0, text.indexOf(stop)),
  );
});

test("a conversation that goes on computes only what is new", async () => {
  const answer = await textOf(remote.ask({ messages: QUESTION, maxTokens: 6, adapter: "plain" }));
  expect(QUESTION_IDS.length + answer.length).toBe(34);
  const known = (await remote.stats()).cachedPromptTokens;
  const messages = [...QUESTION, { role: "assistant", content: answer }, { role: "user", content: "why" }];
  await textOf(remote.ask({ messages, maxTokens: 2, adapter: "plain" }));
  expect((await remote.stats()).cachedPromptTokens - known).toBe(32); // two pages of question and answer
});

test("calls wait for a worker that hears nothing until its model is loaded", async () => {
  const posted: unknown[] = [];
  const worker = Object.assign(new EventTarget(), { postMessage: (sent: unknown) => posted.push(sent) });
  const late = createChat(worker as unknown as Worker);
  const asked = late.adapters();
  await new Promise((done) => setTimeout(done));
  expect(posted).toEqual([{ chat: "hello" }]);
  worker.dispatchEvent(new MessageEvent("message", { data: { chat: "ready" } }));
  await new Promise((done) => setTimeout(done));
  expect(posted.slice(1)).toEqual([{ chat: "adapters", id: 1 }]);
  worker.dispatchEvent(new MessageEvent("message", { data: { chat: "value", id: 1, value: ["a"] } }));
  expect(await asked).toEqual(["a"]);
});

test("an abort ends the answer with what there is, and leaving the loop frees what it had", async () => {
  const stop = new AbortController();
  const pieces: TextPiece[] = [];
  for await (const piece of remote.ask({ prompt: "Once", logitBias: noEnd, signal: stop.signal })) {
    pieces.push(piece);
    stop.abort();
  }
  expect(pieces.length).toBeLessThan(59);
  expect(pieces.at(-1)?.finishReason).toBe("stop");
  for await (const { text } of remote.ask({ prompt: "Once", logitBias: noEnd })) if (text !== "") break;
  expect(await textOf(remote.ask({ prompt: "Once", signal: AbortSignal.abort() }))).toBe("");
  const stats = await remote.stats();
  expect([stats.running, stats.waiting]).toEqual([0, 0]);
  expect(stats.generatedTokens).toBeLessThan(2 * 59);
});

test.each<[ChatRequest, string]>([
  [{}, "ShapeError: ask: messages or a prompt must be given, got neither"],
  [{ prompt: "a", messages: QUESTION }, "ShapeError: ask: messages or a prompt must be given, got both"],
  [{ prompt: "a", adapter: "poet" }, 'ShapeError: generate: the adapter must be one of plain, dora, got "poet"'],
  [{ prompt: "a", temperature: -1 }, "ShapeError: generate: temperature must be a number of at least 0, got -1"],
  [
    { prompt: "a".repeat(70) },
    "ShapeError: generate: the prompt must be shorter than the context of 64 tokens, got 71",
  ],
  [
    { prompt: "a", responseFormat: { type: "xml" } },
    'ShapeError: response_format: type must be "text", "json_object" or "json_schema", got "xml"',
  ],
])("%j is refused in the same words here and over a port", async (request, words) => {
  expect(await failure(chat.ask(request))).toBe(words);
  expect(await failure(remote.ask(request))).toBe(words);
});

test("a model has one chat at a time, and what cannot be sent says so", async () => {
  const second = await openChat(model, { tokenizer: lettersTokenizer }).catch(message);
  expect(second).toBe(
    "ShapeError: enable: adapters share a layer where each only adds B·A to it, got two on model.layers.0.self_attn.q_proj of which one does more: DoRA, a start from the base, a trained copy or bias, a pool. Disable or unmerge the other first",
  );
  const unsendable = { prompt: "a", responseFormat: () => {} };
  expect(await failure(remote.ask(unsendable))).toContain("DataCloneError");
  expect(await textOf(remote.ask({ prompt: "Once upon a time", maxTokens: 3 }))).not.toBe("");
});

test("adapters come and go over a port, as files", async () => {
  const expected = await textOf(chat.ask({ prompt: "Once", adapter: "plain", maxTokens: 8 }));
  const files = Object.fromEntries(
    Object.entries(adapters.get("plain") ?? {}).map(([name, content]) => [
      name,
      new Blob([content as Uint8Array<ArrayBuffer> | string]),
    ]),
  );
  await remote.load("again", files);
  expect(await remote.adapters()).toEqual(["plain", "dora", "again"]);
  expect(await textOf(remote.ask({ prompt: "Once", adapter: "again", maxTokens: 8 }))).toBe(expected);
  await expect(remote.load("again", files)).rejects.toThrow(
    'register: names must differ, got "again" again. Unregister the other first',
  );
  const bad = await remote.load("bad", { "adapter_config.json": new Blob(["{"]) }).then(String, message);
  expect(bad).toMatch(/^FormatError: bad/);
  await remote.unload("again");
  expect(await remote.adapters()).toEqual(["plain", "dora"]);
  await expect(remote.unload("again")).rejects.toThrow('unload: the adapter must be loaded, got "again"');
});

test("closing lets an answer that has begun end, and later calls are refused", async () => {
  const asked = remote.ask({ prompt: "Once", maxTokens: 20, logitBias: noEnd });
  await asked.next();
  const rest = textOf(asked);
  const closed = remote.close();
  expect((await rest).length).toBeGreaterThan(5);
  await closed;
  const words = "Error: createChat: the chat must be open, got one that was closed";
  expect(await failure(remote.ask({ prompt: "a" }))).toBe(words);
  expect(await remote.stats().then(String, message)).toBe(words);
  expect(await failure(chat.ask({ prompt: "a" }))).toBe(
    "ShapeError: generate: the engine must be open, got one that was closed",
  );
});

test("a model that does not load rejects every call, and messages of others on the port are left alone", async () => {
  const { port1, port2 } = new MessageChannel();
  const heard: unknown[] = [];
  port2.addEventListener("message", ({ data }) => heard.push(data));
  const broken = createChat(port1);
  const early = broken.adapters().then(String, message);
  serveChat(Promise.reject(new FormatError("config.json: must be there, got none")), port2);
  port1.postMessage("mine");
  port1.postMessage({ kind: "mine" });
  expect(await early).toBe("FormatError: config.json: must be there, got none");
  expect(await failure(broken.ask({ prompt: "a" }))).toBe("FormatError: config.json: must be there, got none");
  expect(heard).toContain("mine");
  const atOtherEnd = new Promise((closed) => port2.addEventListener("close", closed));
  expect(await broken.close().then(String, message)).toBe("FormatError: config.json: must be there, got none");
  await atOtherEnd;
});

test("a port that is closed at the other end, and a worker that crashes, reject all calls", async () => {
  const running = remote.ask({ prompt: "Once", logitBias: noEnd });
  await running.next();
  const rest = textOf(running).then(String, message);
  ports.port2.close();
  expect(await rest).toBe("Error: createChat: the other end of the port must be open, got it closed");
  let isTerminated = false;
  const terminate = (): void => {
    isTerminated = true;
  };
  const worker = Object.assign(new EventTarget(), { postMessage: () => {}, terminate });
  const crashing = createChat(worker as unknown as Worker);
  const asked = failure(crashing.ask({ prompt: "a" }));
  worker.dispatchEvent(Object.assign(new Event("error"), { message: "Uncaught out of memory" }));
  const words = "Error: createChat: the worker must run, got Uncaught out of memory";
  expect(await asked).toBe(words);
  expect(await crashing.load("a", "https://example.invalid/a").then(String, message)).toBe(words);
  expect(await crashing.close().then(String, message)).toBe(words);
  expect(isTerminated).toBe(true);
});

test("what cannot be opened leaves nothing behind, and messages without a template are refused", async () => {
  await chat.close();
  const live = model.gpu.counters().bytesLive;
  const files = { "adapter_config.json": readFileSync("test/golden/llama-default/adapter/adapter_config.json") };
  await expect(
    openChat(model, { tokenizer: lettersTokenizer, adapters: { half: memoryDirectory("half", files) } }),
  ).rejects.toThrow(FormatError);
  await expect(openChat(model, { tokenizer: lettersTokenizer, engine: { maxRows: 0 } })).rejects.toThrow(
    new ShapeError("BatchEngine: maxRows must be a whole number of at least 1, got 0"),
  );
  expect(model.gpu.counters().bytesLive).toBe(live);
  const plain = await openChat(model, { tokenizer: lettersTokenizer });
  expect(await failure(plain.ask({ messages: QUESTION }))).toBe(
    "ShapeError: ask: messages must go with a chat template, got none. Give renderChat, or ask with a prompt",
  );
  await plain.close();
});
