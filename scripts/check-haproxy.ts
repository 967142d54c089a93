// Tries scripts/haproxy.cfg with the haproxy that is installed (or HAPROXY=path), over three servers whose answers say who they are.
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { request } from "node:https";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Listening, listen } from "../src/cli/serve-node.ts";
import { FakeEngine, pause, testApp } from "../test/serve/http/harness.ts";

const NAMES = ["one", "two", "three"];
const ADAPTERS = Array.from({ length: 24 }, (_, i) => `adapter-${i}`);

interface Answer {
  readonly status: number;
  readonly text: string;
  /** When each piece came, in milliseconds since the request. */
  readonly times: readonly number[];
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

function ask(port: number, path: string, body?: string, headers: Record<string, string> = {}): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const start = performance.now();
    const times: number[] = [];
    let text = "";
    const method = body === undefined ? "GET" : "POST";
    const options = { host: "127.0.0.1", port, path, method, rejectUnauthorized: false, agent: false };
    const asked = request(
      { ...options, headers: { Host: "llm.example", "Content-Type": "application/json", ...headers } },
      (response) => {
        response.setEncoding("utf8").on("data", (piece: string) => {
          times.push(performance.now() - start);
          text += piece;
        });
        response.on("end", () => resolve({ status: response.statusCode ?? 0, text, times }));
        response.on("error", reject);
      },
    );
    asked.on("error", reject);
    asked.end(body);
  });
}

function demand(holds: boolean, what: string): void {
  if (!holds) throw new Error(`haproxy.cfg: ${what}`);
  console.log(`ok: ${what}`);
}

const home = mkdtempSync(join(tmpdir(), "lowrank-haproxy-"));
const certificate = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=llm.example"];
execFileSync(
  process.env.OPENSSL ?? "openssl",
  [...certificate, "-keyout", join(home, "key"), "-out", join(home, "cert")],
  {
    stdio: "ignore",
  },
);
writeFileSync(
  join(home, "lowrank.pem"),
  readFileSync(join(home, "cert"), "utf8") + readFileSync(join(home, "key"), "utf8"),
);

const servers = await Promise.all(
  NAMES.map(async (name) => {
    const engine = new FakeEngine();
    for (const adapter of ADAPTERS) engine.loaded.set(adapter, undefined);
    const { app } = testApp({ engine, fingerprint: name, hosts: ["llm.example", "127.0.0.1"] });
    const listening = await listen(app, { host: "127.0.0.1", port: 0, maxConnections: 100 });
    return { name, engine, app, listening };
  }),
);
const front = await freePort();
const config = servers.reduce(
  (text, { listening }, i) => text.replace(`127.0.0.1:${8001 + i}`, `127.0.0.1:${listening.port}`),
  readFileSync("scripts/haproxy.cfg", "utf8")
    .replace("bind :443", `bind 127.0.0.1:${front}`)
    .replace("/etc/haproxy/lowrank.pem", join(home, "lowrank.pem")),
);
writeFileSync(join(home, "haproxy.cfg"), config);
const haproxy = spawn(process.env.HAPROXY ?? "haproxy", ["-db", "-f", join(home, "haproxy.cfg")], {
  stdio: ["ignore", "ignore", "inherit"],
});

const completion = (model: string, more: object = {}): string => JSON.stringify({ prompt: "a", ...more, model });
const serverOf = async (model: string, more: object = {}): Promise<string> => {
  const { status, text } = await ask(front, "/v1/completions", completion(model, more));
  if (status !== 200) throw new Error(`haproxy.cfg: ${model} must be answered, got ${status} ${text}`);
  return (JSON.parse(text) as { system_fingerprint: string }).system_fingerprint;
};
const close = async ({ cutOff, close: end }: Listening): Promise<void> => {
  const ended = end();
  cutOff();
  await ended;
};

try {
  await pause(1500);
  const homes = new Map<string, string>();
  for (const model of ADAPTERS) homes.set(model, await serverOf(model));
  demand(
    NAMES.every((name) => [...homes.values()].includes(name)),
    "adapters are spread over all servers",
  );
  let moved = 0;
  for (const model of ADAPTERS) if ((await serverOf(model)) !== homes.get(model)) moved++;
  demand(moved === 0, "an adapter stays with its server");
  const [model = ""] = ADAPTERS;
  const long = { user: "x".repeat(150_000) };
  demand((await serverOf(model, long)) === homes.get(model), "the model is seen behind 150,000 bytes of another field");
  const claimed = await ask(front, "/v1/completions", completion(model), { "X-Lowrank-Model": "another" });
  demand(claimed.text.includes(`"${homes.get(model)}"`), "what a client says in the proxy's header does not count");

  demand(
    (await ask(front, "/v1/completions", completion(model, { user: "x".repeat(2 ** 20) }))).status === 413,
    "a body of more than 1 MiB is refused",
  );
  for (const path of ["/metrics", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
    demand((await ask(front, path)).status === 403, `${path} is not for clients`);

  const first = servers.find(({ name }) => name === homes.get(model));
  if (!first) throw new Error("haproxy.cfg: a server must have answered");
  first.engine.reply = async function* () {
    for (const piece of ["a", "b", "c"]) {
      yield piece;
      await pause(300);
    }
  };
  const stream = ask(front, "/v1/completions", completion(model, { stream: true }));
  await pause(150);
  const drained = first.app.drain(10_000);
  const other = await serverOf(model);
  demand(other !== first.name, "a server that is about to stop gets no new requests, and the client does not notice");
  const { text, times } = await stream;
  demand(text.endsWith("data: [DONE]\n\n") && text.includes('"text":"c"'), "an answer that it had begun ends");
  demand((times[0] ?? 1e9) < 250 && (times.at(-1) ?? 0) > 600, "a stream comes as it is made");
  await drained;
  await close(first.listening);
  await pause(2500);
  const after = await Promise.all(ADAPTERS.map((one) => serverOf(one)));
  demand(!after.includes(first.name), "a server that has stopped is left out");
  const stayed = ADAPTERS.filter((one, i) => homes.get(one) !== first.name && after[i] === homes.get(one)).length;
  const others = ADAPTERS.filter((one) => homes.get(one) !== first.name).length;
  demand(stayed >= others * 0.7, `adapters of the others stay where they were (${stayed} of ${others})`);

  const statuses = await Promise.all(Array.from({ length: 120 }, async () => (await ask(front, "/health")).status));
  demand(statuses.includes(429), "an address that asks too often is told so");
  console.log("haproxy.cfg does what it says");
} finally {
  haproxy.kill();
  for (const { listening } of servers) await close(listening).catch(() => undefined);
  rmSync(home, { recursive: true, force: true });
}
