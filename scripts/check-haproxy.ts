// Tries scripts/haproxy.cfg with the haproxy that is installed (or HAPROXY=path): over three servers whose answers say who they are, and over three
// `lowrank serve` in processes of their own, of which one is killed.
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { request } from "node:https";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type Listening, listen } from "../src/cli/serve-node.ts";
import { FakeEngine, pause, testApp } from "../test/serve/http/harness.ts";
import { BASE, randomAdapters, startServer } from "./serving/processes.ts";

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
/** HAProxy by our configuration, before servers at these ports. */
async function startHaproxy(ports: readonly number[]): Promise<{ port: number; stop: () => void }> {
  const port = await freePort();
  const file = join(home, `haproxy-${port}.cfg`);
  const shipped = readFileSync("scripts/haproxy.cfg", "utf8")
    .replace("bind :443", `bind 127.0.0.1:${port}`)
    .replace("/etc/haproxy/lowrank.pem", join(home, "lowrank.pem"));
  const config = ports.reduce((text, own, i) => text.replace(`127.0.0.1:${8001 + i}`, `127.0.0.1:${own}`), shipped);
  writeFileSync(file, config);
  const child = spawn(process.env.HAPROXY ?? "haproxy", ["-db", "-f", file], {
    stdio: ["ignore", "ignore", "inherit"],
  });
  await pause(1500);
  return { port, stop: () => void child.kill() };
}

const haproxy = await startHaproxy(servers.map(({ listening }) => listening.port));
const front = haproxy.port;

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
  await processes();
  console.log("haproxy.cfg does what it says");
} finally {
  haproxy.stop();
  for (const { listening } of servers) await close(listening).catch(() => undefined);
  rmSync(home, { recursive: true, force: true });
}

/** Three real servers on one model with the same adapters: what each is asked shows in its own counts. */
async function processes(): Promise<void> {
  const names = Array.from({ length: 9 }, (_, i) => `tuned-${i}`);
  await randomAdapters(home, names);
  const flags = [
    ...["--model", BASE, "--served-model-name", "base", "--allowed-host", "llm.example", "--quiet"],
    ...names.flatMap((name) => ["--adapter", `${name}=${join(home, name)}`]),
  ];
  const real = await Promise.all([0, 1, 2].map(() => startServer(flags)));
  const before = await startHaproxy(real.map(({ port }) => port));
  try {
    const said = async (name: string): Promise<string> => {
      const { status, text } = await ask(
        before.port,
        "/v1/completions",
        completion(name, { max_tokens: 8, temperature: 0 }),
      );
      if (status !== 200) throw new Error(`haproxy.cfg: ${name} must be answered, got ${status} ${text}`);
      return (JSON.parse(text) as { choices: { text: string }[] }).choices[0]?.text ?? "";
    };
    const steps = async (i: number): Promise<number> => {
      const response = await fetch(`${real[i]?.base}/metrics`);
      return Number(/^lowrank_steps_total (\d+)$/m.exec(await response.text())?.[1]);
    };
    const answers = new Map<string, string>();
    const homes = new Map<string, number>();
    for (const name of names) {
      const counts = await Promise.all([0, 1, 2].map(steps));
      answers.set(name, await said(name));
      const after = await Promise.all([0, 1, 2].map(steps));
      homes.set(
        name,
        after.findIndex((count, i) => count !== counts[i]),
      );
    }
    demand(new Set(homes.values()).size === 3, "adapters are spread over three processes");
    const victim = homes.get(names[0] as string) as number;
    real[victim]?.child.kill("SIGKILL");
    await pause(2500);
    for (const name of names)
      demand(
        (await said(name)) === answers.get(name),
        `${name} is answered as before process ${victim + 1} was killed`,
      );
  } finally {
    before.stop();
    await Promise.all(real.map(({ stop }) => stop()));
  }
}
