// lowrank serve: what it refuses to start with, what it starts, and how it stops.
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import type { ServerOptions } from "node:http";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI from "openai";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { serveCommand } from "../../src/cli/serve.ts";
import { listen } from "../../src/cli/serve-node.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModel } from "../../src/models/load.ts";
import { savePeftTo } from "../../src/node.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { testGpu } from "../harness.ts";
import { testApp } from "../serve/http/harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { lowrank, type Run, start } from "./run.ts";

const made = vi.hoisted(() => [] as ServerOptions[]);
vi.mock("node:http", async (original) => {
  const real = await original<typeof import("node:http")>();
  const createServer = (options: ServerOptions, ...rest: []): unknown => {
    made.push(options);
    return real.createServer(options, ...rest);
  };
  return { ...real, createServer };
});

const KEY = "k".repeat(32);
const ADMIN = "a".repeat(32);
let home = "";
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-serve-"));
  await writeTinyModel(at("model"), { tokenizer: true });
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory(at("model")));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" });
  await mkdir(at("adapters"));
  await savePeftTo(adapter, at("adapters/pirate"), "tiny");
  gpu.destroy();
  await mkdir(at("adapters/broken"));
  await writeFile(at("adapters/broken/adapter_config.json"), "{}");
});
afterAll(() => rm(home, { recursive: true, force: true }));

const run = (...args: string[]): Promise<unknown> =>
  serveCommand().parseAsync(["--model", at("model"), ...args], { from: "user" });

test.each([
  [
    ["--host", "0.0.0.0"],
    /^serve: --host 0\.0\.0\.0 must go with an --api-key, got none\. Here is a fresh one: LOWRANK_API_KEY=[\w-]{43}$/,
  ],
  [["--host", "192.168.1.2"], /^serve: --host 192\.168\.1\.2 must go with an --api-key, got none\./],
  [["--host", "::"], /^serve: --host :: must go with an --api-key, got none\./],
  [
    ["--host", "0.0.0.0", "--api-key", "short"],
    /^serve: with --host 0\.0\.0\.0 a key must have at least 32 characters, got one with fewer\. Here is a fresh one: [\w-]{43}$/,
  ],
  [
    ["--host", "0.0.0.0", "--api-key", KEY, "--admin-key", "short"],
    /^serve: with --host 0\.0\.0\.0 a key must have at least 32/,
  ],
  [["--allow-runtime-lora"], /^serve: --allow-runtime-lora must go with an --adapter-dir, got none$/],
  [
    ["--allow-runtime-lora", "--adapter-dir", "."],
    /^serve: --allow-runtime-lora must go with an --admin-key, got none\. Here is a fresh one: LOWRANK_ADMIN_KEY=[\w-]{43}$/,
  ],
  [["--adapter", "pirate"], /^serve: --adapter must be name=place with a name of letters, .* got pirate$/],
  [["--adapter", "../x=adapters"], /^serve: --adapter must be name=place .* got \.\.\/x=adapters$/],
  [["--adapter", "model=adapters"], /^serve: --adapter must be name=place .* that is not taken, got model=adapters$/],
  [["--port", "-1"], /^serve: --port must be a whole number of at least 0, got -1$/],
])("%j is refused before anything is loaded", async (args, message) => {
  const error: unknown = await run(...args).catch((reason: unknown) => reason);
  expect(error).toBeInstanceOf(ShapeError);
  expect((error as Error).message).toMatch(message);
});

test("an --adapter-dir that is none is refused", async () => {
  await expect(run("--allow-runtime-lora", "--adapter-dir", at("nothing"), "--admin-key", ADMIN)).rejects.toThrow(
    FormatError,
  );
});

test("keys of the environment count", async () => {
  vi.stubEnv("LOWRANK_API_KEY", "short");
  await expect(run("--host", "0.0.0.0")).rejects.toThrow("a key must have at least 32 characters");
  vi.unstubAllEnvs();
});

test("a server waits 10 seconds for a head and 30 for a request, and has so many connections", async () => {
  const server = await listen(testApp().app, { host: "127.0.0.1", port: 0, maxConnections: 2 });
  expect(made.at(-1)).toMatchObject({ headersTimeout: 10_000, requestTimeout: 30_000, maxHeaderSize: 16384 });
  expect(made.at(-1)?.connectionsCheckingInterval).toBeLessThanOrEqual(1000);
  const sockets = [0, 1, 2].map(() => connect(server.port, "127.0.0.1"));
  const ended = sockets.map((socket) => new Promise<"ended">((resolve) => socket.on("close", () => resolve("ended"))));
  expect(await Promise.race(ended)).toBe("ended");
  const states = await Promise.all(
    ended.map((end) => Promise.race([end, new Promise((next) => setTimeout(next, 100, "open"))])),
  );
  expect(states.toSorted()).toEqual(["ended", "open", "open"]);
  for (const socket of sockets) socket.destroy();
  await server.close();
});

async function serving(
  ...args: string[]
): Promise<{ readonly run: Run; readonly client: OpenAI; readonly url: string }> {
  const process_ = start(["serve", "--model", at("model"), "--port", "0", ...args], { LOWRANK_TUNE: "off" });
  let stderr = "";
  process_.child.stderr?.on("data", (text: string) => {
    stderr += text;
  });
  await process_.saw("/v1\n");
  const url = /serving .* at (http:\/\/127\.0\.0\.1:\d+)\/v1\n/.exec(stderr)?.[1] ?? "";
  return { run: process_, client: new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY, maxRetries: 0 }), url };
}

test("the base and its adapters answer, adapters come and go, and SIGTERM lets the last answer end", async () => {
  const {
    run: served,
    client,
    url,
  } = await serving(
    ...["--adapter", `pirate=${at("adapters/pirate")}`, "--adapter-dir", at("adapters"), "--allow-runtime-lora"],
    ...["--admin-key", ADMIN, "--served-model-name", "tiny", "--chat-template", "chatml"],
  );
  expect((await client.models.list()).data.map(({ id }) => id)).toEqual(["tiny", "pirate"]);
  const post = (path: string, body: object): Promise<Response> =>
    fetch(`${url}${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${ADMIN}` },
      body: JSON.stringify(body),
    });
  const texts = new Set<string | undefined>();
  for (const model of ["tiny", "pirate"]) {
    const answer = await client.completions.create({ model, prompt: "Once", max_tokens: 8, temperature: 0 });
    expect(answer.usage?.completion_tokens).toBe(8);
    texts.add(answer.choices[0]?.text);
  }
  expect(texts.size, "a fresh adapter changes nothing").toBe(1);
  const chat = await client.chat.completions.create({
    ...{ model: "pirate", messages: [{ role: "user", content: "a" }], max_tokens: 3, logprobs: true, top_logprobs: 2 },
  });
  expect(chat.choices[0]?.logprobs?.content?.[0]?.top_logprobs.length).toBe(2);

  expect(await (await post("/v1/load_lora_adapter", { lora_name: "again", lora_path: "pirate" })).text()).toMatch(
    /^Success/,
  );
  const broken = await post("/v1/load_lora_adapter", { lora_name: "broken", lora_path: "broken" });
  expect(broken.status).toBe(400);
  expect(await broken.text()).not.toContain(home);
  expect((await post("/v1/unload_lora_adapter", { lora_name: "pirate" })).status).toBe(200);
  expect((await client.models.list()).data.map(({ id }) => id)).toEqual(["tiny", "again"]);

  const stream = await client.completions.create({
    model: "again",
    prompt: "Once",
    max_tokens: 40,
    temperature: 0,
    stream: true,
  });
  let count = 0;
  let reason: string | undefined;
  for await (const { choices } of stream) {
    if (count++ === 0) served.child.kill("SIGTERM");
    reason = choices[0]?.finish_reason ?? reason;
  }
  expect(reason).toMatch(/stop|length/);
  const { code, stdout, stderr } = await served.ended;
  expect([code, stdout]).toEqual([0, ""]);
  expect(stderr).toMatch(/^SIGTERM: no more requests are taken; answers may go on for 30 s$/m);
  expect(stderr).toMatch(/^POST \/v1\/completions 200 \d+ ms$/m);
  expect(stderr).not.toContain("Once");
});

test("options may be in a file, and SIGINT ends an idle server at once, though a client keeps its connection", async () => {
  await writeFile(
    at("serve.yaml"),
    `api-key: [${KEY}]\nadapter:\n  - a=${at("adapters/pirate")}\n  - b=${at("adapters/pirate")}\n`,
  );
  const { run: served, client } = await serving("--quiet", "--config", at("serve.yaml"));
  expect((await client.models.list()).data.map(({ id }) => id)).toEqual(["model", "a", "b"]);
  await expect(client.withOptions({ apiKey: "another" }).models.list()).rejects.toThrow("401");
  served.child.kill("SIGINT");
  expect((await served.ended).code).toBe(0);
});

test("a port that is taken is said so", async () => {
  const server = await listen(testApp().app, { host: "127.0.0.1", port: 0, maxConnections: 2 });
  const { code, stderr } = await lowrank(["serve", "--model", at("model"), "--port", String(server.port)]);
  await server.close();
  expect(code).toBe(2);
  expect(stderr).toContain(`127.0.0.1:${server.port}: must be an address and a port that are free, got EADDRINUSE`);
});
