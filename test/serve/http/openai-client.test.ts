// What OpenAI's own client makes of the server, over a socket.
import OpenAI, { APIError, AuthenticationError, BadRequestError, NotFoundError, RateLimitError } from "openai";
import { afterAll, beforeAll, beforeEach, expect, test } from "vitest";
import { type Listening, listen } from "../../../src/cli/serve-node.ts";
import type { GenerationRequest } from "../../../src/serve/engine-types.ts";
import { API_KEY, FakeEngine, pause, type TestApp, testApp, until } from "./harness.ts";

let server: Listening;
let served: TestApp;
let client: OpenAI;
const engine = new FakeEngine();

beforeAll(async () => {
  served = testApp({ engine, apiKeys: [API_KEY] });
  server = await listen(served.app, { host: "127.0.0.1", port: 0, maxConnections: 20 });
  client = new OpenAI({ baseURL: `http://127.0.0.1:${server.port}/v1`, apiKey: API_KEY, maxRetries: 0 });
});
afterAll(async () => {
  server.cutOff();
  await server.close();
});
beforeEach(() => {
  engine.requests.length = 0;
  engine.isFull = false;
  engine.reply = () => ["Hello", ", ", "wörld"];
});

const messages = [{ role: "user", content: "Hi" }] as const;
const lastRequest = (): FakeEngine["requests"][number] => {
  const request = engine.requests.at(-1);
  if (!request) throw new Error("the engine was not asked");
  return request;
};

test("a chat is answered by the adapter that is the model", async () => {
  const answer = await client.chat.completions.create({ model: "pirate", messages: [...messages], seed: 7 });
  expect(answer).toMatchObject({
    object: "chat.completion",
    model: "pirate",
    system_fingerprint: "test",
    choices: [
      {
        index: 0,
        message: { role: "assistant", content: "Hello, wörld", refusal: null },
        logprobs: null,
        finish_reason: "stop",
      },
    ],
    usage: { prompt_tokens: 52, completion_tokens: 13, total_tokens: 65 },
  });
  expect(answer.id).toMatch(/^chatcmpl-[0-9a-f-]{36}$/);
  expect(Math.abs(answer.created - Date.now() / 1000)).toBeLessThan(60);
  const { adapter, promptIds, maxTokens, temperature, seed } = lastRequest();
  expect({ adapter, maxTokens, temperature, seed }).toEqual({
    adapter: "pirate",
    maxTokens: 200,
    temperature: 1,
    seed: 7,
  });
  expect(new TextDecoder().decode(Uint8Array.from(promptIds))).toBe(
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
  );
});

test("the base's name asks for no adapter, and its answers differ in their seeds", async () => {
  for (let i = 0; i < 2; i++) await client.chat.completions.create({ model: "base", messages: [...messages] });
  expect(engine.requests.map(({ adapter }) => adapter)).toEqual([undefined, undefined]);
  expect(engine.requests[0]?.seed).not.toBe(engine.requests[1]?.seed);
});

test("a streamed chat begins with the role, brings the text in pieces, ends with the reason and the counts", async () => {
  const stream = await client.chat.completions.create({
    ...{ model: "base", messages: [...messages], stream: true, stream_options: { include_usage: true } },
  });
  const chunks: OpenAI.ChatCompletionChunk[] = [];
  for await (const chunk of stream) chunks.push(chunk);
  expect(new Set(chunks.map(({ id }) => id)).size).toBe(1);
  expect(new Set(chunks.map(({ object }) => object))).toEqual(new Set(["chat.completion.chunk"]));
  expect(chunks[0]?.choices).toEqual([
    { index: 0, delta: { role: "assistant", content: "" }, logprobs: null, finish_reason: null },
  ]);
  expect(chunks.map(({ choices }) => choices[0]?.delta.content ?? "").join("")).toBe("Hello, wörld");
  expect(chunks.length).toBeGreaterThan(12);
  expect(chunks.at(-2)?.choices).toEqual([{ index: 0, delta: {}, logprobs: null, finish_reason: "stop" }]);
  expect(chunks.at(-1)).toMatchObject({
    choices: [],
    usage: { prompt_tokens: 52, completion_tokens: 13, total_tokens: 65 },
  });
  expect(chunks.slice(0, -1).every(({ usage }) => usage === null)).toBe(true);
});

test("a stream without counts has none", async () => {
  const stream = await client.chat.completions.create({ model: "base", messages: [...messages], stream: true });
  for await (const chunk of stream) {
    expect(chunk.usage).toBeUndefined();
    expect(chunk.choices.length).toBe(1);
  }
});

test("the client's own helper puts a stream together", async () => {
  const answer = await client.chat.completions.stream({ model: "base", messages: [...messages] }).finalChatCompletion();
  expect(answer.choices[0]?.message.content).toBe("Hello, wörld");
  expect(answer.choices[0]?.finish_reason).toBe("stop");
});

test.each([true, false])("a stop ends the text before it (streamed: %s)", async (isStreamed) => {
  engine.reply = () => ["one E", "ND two"];
  const asked = { model: "base", messages: [...messages], stop: ["zzz", "END"] };
  let text = "";
  let reason: string | null | undefined;
  if (isStreamed)
    for await (const { choices } of await client.chat.completions.create({ ...asked, stream: true })) {
      text += choices[0]?.delta.content ?? "";
      reason = choices[0]?.finish_reason;
    }
  else {
    const [choice] = (await client.chat.completions.create(asked)).choices;
    [text, reason] = [choice?.message.content ?? "", choice?.finish_reason];
  }
  expect([text, reason]).toEqual(["one ", "stop"]);
});

test.each([{ max_tokens: 4 }, { max_completion_tokens: 4 }])(
  "an answer that %o cuts off says length",
  async (limit) => {
    const answer = await client.chat.completions.create({ model: "base", messages: [...messages], ...limit });
    expect(answer.choices[0]).toMatchObject({ message: { content: "Hell" }, finish_reason: "length" });
    expect(answer.usage?.completion_tokens).toBe(4);
  },
);

test("an answer that the context cuts off says length", async () => {
  engine.reply = () => ["x".repeat(500)];
  const answer = await client.completions.create({ model: "base", prompt: "y".repeat(150), max_tokens: 200 });
  expect(answer.choices[0]).toMatchObject({ text: "x".repeat(49), finish_reason: "length" });
});

test("log-probabilities of a chat come with each token, its bytes and the likeliest ones", async () => {
  engine.reply = () => ["aé"];
  const answer = await client.chat.completions.create({
    ...{ model: "base", messages: [...messages], logprobs: true, top_logprobs: 3 },
  });
  const content = answer.choices[0]?.logprobs?.content ?? [];
  expect(content.map(({ token, logprob, bytes }) => ({ token, logprob, bytes }))).toEqual([
    { token: "a", logprob: -0.97, bytes: [97] },
    { token: "\ufffd", logprob: -1.95, bytes: null },
    { token: "\ufffd", logprob: -1.69, bytes: null },
  ]);
  expect(content[0]?.top_logprobs).toEqual([
    { token: "a", logprob: -0.97, bytes: [97] },
    { token: "b", logprob: -0.98, bytes: [98] },
    { token: "c", logprob: -9999, bytes: [99] },
  ]);
  expect(lastRequest().logprobs).toBe(3);
});

test("log-probabilities of a stream come with the text that they are of, and none with a stop", async () => {
  engine.reply = () => ["aéEND"];
  const stream = await client.chat.completions.create({
    ...{ model: "base", messages: [...messages], logprobs: true, stop: "END", stream: true },
  });
  const tokens: string[][] = [];
  for await (const { choices } of stream) tokens.push((choices[0]?.logprobs?.content ?? []).map(({ token }) => token));
  expect(tokens).toEqual([[], ["a"], ["\ufffd", "\ufffd"], []]);
});

test("log-probabilities are of the text, not of the stop that ended it", async () => {
  engine.reply = () => ["abEND"];
  const asked = { model: "base", prompt: "a", logprobs: 1, stop: ["bEN", "END"] };
  const answer = await client.completions.create(asked);
  expect(answer.choices[0]).toMatchObject({ text: "a", logprobs: { tokens: ["a"], text_offset: [0] } });
  expect(answer.usage?.completion_tokens).toBe(4);
});

test("a completion continues a text, or ids", async () => {
  const answer = await client.completions.create({ model: "pirate", prompt: "ab", logprobs: 1 });
  expect(answer).toMatchObject({
    object: "text_completion",
    choices: [{ index: 0, text: "Hello, wörld", finish_reason: "stop" }],
    usage: { prompt_tokens: 3, completion_tokens: 13, total_tokens: 16 },
  });
  expect(answer.id).toMatch(/^cmpl-/);
  const { logprobs } = answer.choices[0] ?? {};
  expect(logprobs?.tokens?.slice(0, 2)).toEqual(["H", "e"]);
  expect(logprobs?.token_logprobs?.slice(0, 2)).toEqual([-0.72, -1.01]);
  expect(logprobs?.top_logprobs?.[0]).toEqual({ H: -0.72 });
  expect(logprobs?.text_offset?.slice(7)).toEqual([7, 8, 8, 9, 10, 11]);
  expect(lastRequest()).toMatchObject({ promptIds: [257, 97, 98], maxTokens: 16 });
  await client.completions.create({ model: "pirate", prompt: [97, 98] });
  expect(lastRequest().promptIds).toEqual([97, 98]);
  await client.completions.create({ model: "pirate", prompt: [[99]] });
  expect(lastRequest().promptIds).toEqual([99]);
  await client.completions.create({ model: "pirate", prompt: ["c"] });
  expect(lastRequest().promptIds).toEqual([257, 99]);
});

test("a streamed completion brings the text in pieces", async () => {
  const stream = await client.completions.create({ model: "base", prompt: "ab", stream: true });
  let text = "";
  const reasons: unknown[] = [];
  for await (const chunk of stream) {
    text += chunk.choices[0]?.text ?? "";
    reasons.push(chunk.choices[0]?.finish_reason);
  }
  expect(text).toBe("Hello, wörld");
  expect(reasons.filter(Boolean)).toEqual(["stop"]);
});

test("settings of the draw come to the engine under its names", async () => {
  await client.chat.completions.create({
    ...{ model: "base", messages: [...messages], temperature: 0.5, top_p: 0.9, seed: -3 },
    ...{ presence_penalty: 0.1, frequency_penalty: -0.2, logit_bias: { "65": -100, "66": 5 } },
    ...({ top_k: 5, min_p: 0.05, repetition_penalty: 1.1 } as object),
  });
  const { promptIds: _, signal: __, onStart: ___, ...rest } = lastRequest();
  expect(rest).toEqual({
    ...{ adapter: undefined, endIds: [], maxTokens: 200, temperature: 0.5, topP: 0.9, topK: 5, minP: 0.05, seed: -3 },
    ...{ presencePenalty: 0.1, frequencyPenalty: -0.2, repetitionPenalty: 1.1 },
    logitBias: new Map([
      [65, -100],
      [66, 5],
    ]),
  });
});

test("parts of text make one content, and a developer is the system", async () => {
  const parts = ["a", "b"].map((text) => ({ type: "text" as const, text }));
  await client.chat.completions.create({
    model: "base",
    messages: [
      { role: "developer", content: "S" },
      { role: "user", content: parts },
    ],
  });
  expect(new TextDecoder().decode(Uint8Array.from(lastRequest().promptIds))).toBe(
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n",
  );
});

test("the models are the base and its adapters", async () => {
  const { data } = await client.models.list();
  const card = { object: "model", created: expect.any(Number), owned_by: "lowrank", root: "base", max_model_len: 200 };
  expect(data).toEqual([
    { ...card, id: "base", parent: null },
    { ...card, id: "pirate", parent: "base" },
  ]);
  expect(await client.models.retrieve("pirate")).toMatchObject({ id: "pirate", parent: "base" });
});

test("errors are of the client's own classes", async () => {
  const rejected = async (promise: Promise<unknown>): Promise<APIError> => {
    const error = await promise.then(
      () => undefined,
      (reason: unknown) => reason,
    );
    if (!(error instanceof APIError)) throw new Error(`must be an APIError, got ${String(error)}`);
    return error;
  };
  const ask = (more: object): Promise<unknown> =>
    client.chat.completions.create({ model: "base", messages: [...messages], ...more });
  const missing = await rejected(ask({ model: "x" }));
  expect(missing).toBeInstanceOf(NotFoundError);
  expect(missing.error).toEqual({
    ...{ message: "The model `x` does not exist.", type: "NotFoundError", param: "model", code: 404 },
  });
  expect(await rejected(client.models.retrieve("x"))).toBeInstanceOf(NotFoundError);
  const bad = await rejected(ask({ temperature: -1 }));
  expect(bad).toBeInstanceOf(BadRequestError);
  expect(bad.error).toEqual({
    ...{ message: "`temperature` must be a number from 0 to 2, got -1", type: "BadRequestError" },
    ...{ param: "temperature", code: 400 },
  });
  const stranger = new OpenAI({ baseURL: client.baseURL, apiKey: "another", maxRetries: 0 });
  expect(await rejected(stranger.models.list())).toBeInstanceOf(AuthenticationError);
  engine.isFull = true;
  const full = await rejected(ask({}));
  expect(full).toBeInstanceOf(RateLimitError);
  expect(full.headers?.get("retry-after")).toBe("1");
  expect(await rejected(ask({ stream: true }))).toBeInstanceOf(RateLimitError);
});

test("a failure in the middle of a stream reaches the client as an error", async () => {
  engine.reply = async function* () {
    yield "so far";
    throw new Error("/secret/path: the device is lost");
  };
  const stream = await client.chat.completions.create({ model: "base", messages: [...messages], stream: true });
  let text = "";
  const reading = (async () => {
    for await (const { choices } of stream) text += choices[0]?.delta.content ?? "";
  })();
  await expect(reading).rejects.toThrow("the server failed at this request");
  expect(text).toBe("so far");
});

test("a client that goes away ends its answer, streamed or whole", async () => {
  for (const stream of [true, false]) {
    const leave = new AbortController();
    engine.reply = async function* (request) {
      while (!request.signal?.aborted) {
        yield "x";
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    };
    const { signal } = leave;
    const asked = client.chat.completions
      .create({ model: "base", messages: [...messages], stream, max_tokens: 140 }, { signal })
      .catch((error: unknown) => error);
    await until(() => engine.running === 1, "the answer is being made");
    leave.abort();
    await until(() => engine.running === 0, "the answer has ended");
    expect(lastRequest().signal?.aborted).toBe(true);
    await asked;
  }
});

/** An answer for each seed. */
const bySeed = ({ seed }: GenerationRequest): string[] => ["seed", ` ${seed}`];

test("log-probabilities of a completion have the token itself, and places count characters", async () => {
  engine.reply = () => ["😀b"];
  const answer = await client.completions.create({ model: "base", prompt: "a", logprobs: 0 });
  const { top_logprobs: top, text_offset: places } = answer.choices[0]?.logprobs ?? {};
  expect(places).toEqual([0, 0, 0, 0, 1]);
  expect(top?.at(-1)).toEqual({ b: -0.98 });
  engine.reply = () => ["a"];
  engine.rank = 1;
  const second = await client.completions.create({ model: "base", prompt: "a", logprobs: 1 });
  engine.rank = 0;
  expect(second.choices[0]?.logprobs?.top_logprobs).toEqual([{ b: -0.98, a: -0.97 }]);
});

test("several choices are drawn with seeds beside each other, and the prompt is counted once", async () => {
  engine.reply = bySeed;
  const answer = await client.completions.create({
    model: "base",
    prompt: "Hi",
    n: 3,
    best_of: 3,
    seed: 7,
    logprobs: 0,
  });
  expect(answer.choices.map(({ index, text, finish_reason }) => [index, text, finish_reason])).toEqual([
    [0, "seed 7", "stop"],
    [1, "seed 6", "stop"],
    [2, "seed 5", "stop"],
  ]);
  expect(answer.choices.map(({ logprobs }) => logprobs?.tokens?.length)).toEqual([6, 6, 6]);
  expect(answer.usage).toEqual({ prompt_tokens: 3, completion_tokens: 18, total_tokens: 21 });
  const negative = await client.completions.create({ model: "base", prompt: "Hi", n: 2, seed: -7 });
  expect(negative.choices.map(({ text }) => text)).toEqual(["seed -7", "seed -6"]);
});

test("several prompts have their choices one after the other, and are all counted", async () => {
  engine.reply = ({ promptIds, seed }) => [`${promptIds.length} `, `${seed}`];
  const prompt = ["Hi", "Hello"];
  const answer = await client.completions.create({ model: "base", prompt, n: 2, seed: 7 });
  const texts = ["3 7", "3 6", "6 7", "6 6"];
  expect(answer.choices.map(({ index, text }) => [index, text])).toEqual(texts.map((text, i) => [i, text]));
  expect(answer.usage).toEqual({ prompt_tokens: 9, completion_tokens: 12, total_tokens: 21 });
  const streamed = ["", "", "", ""];
  for await (const { choices } of await client.completions.create({
    ...{
      model: "base",
      prompt: [
        [1, 2, 3],
        [1, 2, 3, 4, 5, 6],
      ],
      n: 2,
      seed: 7,
      stream: true,
    },
  }))
    for (const { index, text } of choices) streamed[index] += text;
  expect(streamed).toEqual(texts);
});

test("chunks of a stream say which choice they are of, each of which begins and ends once", async () => {
  engine.reply = bySeed;
  const stream = await client.chat.completions.create({
    ...{ model: "base", messages: [...messages], n: 3, seed: 7, stream: true, stream_options: { include_usage: true } },
  });
  const [texts, roles, ends] = [
    ["", "", ""],
    [0, 0, 0],
    [0, 0, 0],
  ];
  let usage: OpenAI.CompletionUsage | null | undefined;
  for await (const chunk of stream) {
    usage = chunk.usage;
    for (const { index, delta, finish_reason } of chunk.choices) {
      texts[index] += delta.content ?? "";
      roles[index] = (roles[index] ?? 0) + (delta.role ? 1 : 0);
      ends[index] = (ends[index] ?? 0) + (finish_reason ? 1 : 0);
    }
  }
  expect({ texts, roles, ends }).toEqual({ texts: ["seed 7", "seed 6", "seed 5"], roles: [1, 1, 1], ends: [1, 1, 1] });
  expect(usage?.completion_tokens).toBe(18);
});

test("whoever goes away from several choices ends all of them", async () => {
  engine.reply = async function* ({ signal }) {
    while (!signal?.aborted) {
      yield "more ";
      await pause(5);
    }
  };
  const leave = new AbortController();
  const body = { model: "base", prompt: "Hi", n: 3, stream: true } as const;
  const stream = await client.completions.create(body, { signal: leave.signal });
  const reading = (async () => {
    for await (const _ of stream);
  })();
  await until(() => engine.running === 3, "three choices are being made");
  leave.abort();
  await reading.catch(() => undefined);
  await until(() => engine.running === 0, "all have ended");
});

test("a choice that fails ends the others", async () => {
  engine.reply = async function* ({ seed, signal }) {
    if (seed === 5) throw new Error("broken");
    while (!signal?.aborted) {
      yield "more ";
      await pause(5);
    }
  };
  const asked = client.completions.create({ model: "base", prompt: "Hi", n: 3, seed: 7, max_tokens: 190 });
  await expect(asked).rejects.toThrow("500 the server failed at this request");
  await until(() => engine.running === 0, "all have ended");
});
