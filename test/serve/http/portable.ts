/** The server in Deno, over a real port: run by scripts/run-in-deno.ts (`npm run serve:deno`). */
import { listen } from "../../../src/cli/serve-node.ts";
import { eventsOf, pause, testApp, until } from "./harness.ts";

const failures: string[] = [];
const check = (holds: boolean, what: string): void => {
  if (!holds) failures.push(what);
};

const { app, engine } = testApp({ limits: { bodyMs: 500 } });
const server = await listen(app, { host: "127.0.0.1", port: 0, maxConnections: 10 });
const ask = (path: string, body?: unknown, init: RequestInit = {}): Promise<Response> =>
  fetch(`http://127.0.0.1:${server.port}${path}`, {
    ...(body !== undefined && { method: "POST", body: typeof body === "string" ? body : JSON.stringify(body) }),
    headers: { "Content-Type": "application/json" },
    ...init,
  });
const asked = { model: "base", messages: [{ role: "user", content: "a" }] };

check((await (await ask("/health")).json()).status === "ok", "/health is ok");
const whole = await (await ask("/v1/chat/completions", asked)).json();
check(whole.choices[0].message.content === "Hello, wörld", "an answer comes whole");
const stream = eventsOf(await (await ask("/v1/chat/completions", { ...asked, stream: true })).text());
check(stream.isDone && stream.objects.length > 10, "an answer comes in pieces");
const large = await ask("/v1/completions", `{"x":"${"x".repeat(2 ** 20)}"}`);
check(large.status === 413 && (await large.json()).error.code === 413, "a body is too large");

engine.reply = async function* (request) {
  while (!request.signal?.aborted) {
    yield "x";
    await pause(2);
  }
};
const leave = new AbortController();
const left = await ask("/v1/chat/completions", { ...asked, stream: true }, { signal: leave.signal });
await left.body?.getReader().read();
leave.abort();
await until(() => engine.running === 0, "the answer of a client that has left ends").catch((e) =>
  failures.push(String(e)),
);

engine.reply = async function* () {
  yield "be";
  await pause(300);
  yield "gun";
};
const last = ask("/v1/chat/completions", { ...asked, stream: true }).then((response) => response.text());
await until(() => engine.running === 1, "the last answer is being made");
const closed = server.close();
await app.drain(5000);
check(eventsOf(await last).isDone, "the last answer ends");
await closed;
globalThis.finish(JSON.stringify({ ok: failures.length === 0, failures }));
