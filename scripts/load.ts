/**
 * A real `lowrank serve` under load: streams with random adapters, of which some are cut off in the middle, while adapters are loaded and unloaded.
 * Every greedy answer must be what was said to it alone, nothing but what was asked for may fail, and nothing may be left.
 *
 *     node --import tsx --import ./scripts/wgsl.mjs scripts/load.ts [--streams 64] [--seconds 60] [--json bench/results/serve-load.json]
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { Random } from "../src/index.ts";
import { BASE, randomAdapters, startServer } from "./serving/processes.ts";

const RESIDENT = ["one", "two", "three", "four", "five"];
/** Adapters that come and go, and whose weights they have by turns. */
const VISITS = { "guest-a": ["one", "two"], "guest-b": ["three", "four"] } as const;
type Visitor = keyof typeof VISITS;
const VISITORS = Object.keys(VISITS) as Visitor[];
/** Of more than a page of tokens. */
const LONG = "Once upon a time there was a little fox who lived by the sea. One day";
const PROMPTS = [
  LONG,
  ...["Once upon a time", "The sea", "A", "Dear friend, I write to you", "One day the captain saw"],
];
const MAX_TOKENS = 24;
const KEY = "load-test-key".padEnd(40, "k");
const ADMIN_KEY = "load-test-admin".padEnd(40, "a");

const { values } = parseArgs({
  options: {
    streams: { type: "string", default: "64" },
    seconds: { type: "string", default: "60" },
    json: { type: "string" },
  },
});
const [streams, seconds] = [Number(values.streams), Number(values.seconds)];
const folder = mkdtempSync(join(tmpdir(), "lowrank-load-"));
const counts = { answered: 0, cutOff: 0, unknownAdapter: 0, loads: 0, unloads: 0, tokens: 0 };
const wrong: string[] = [];

await randomAdapters(folder, RESIDENT);
const { base, child, stop } = await startServer([
  ...["--model", BASE, "--served-model-name", "base", "--quiet"],
  ...RESIDENT.flatMap((name) => ["--adapter", `${name}=${join(folder, name)}`]),
  ...["--max-queue", "1000", "--max-concurrent", "1000", "--max-loras", "4", "--max-rows", "32"],
  ...["--api-key", KEY, "--admin-key", ADMIN_KEY, "--allow-runtime-lora", "--adapter-dir", folder],
]);
child.stderr?.on("data", (piece) => {
  process.stderr.write(piece);
  if (/^error: /m.test(String(piece))) wrong.push(`the server said: ${piece}`);
});
let left: Readonly<Record<string, number>> = {};
let steps = 0;
try {
  const expected = new Map<string, string>();
  for (const model of ["base", ...RESIDENT])
    for (const prompt of PROMPTS) expected.set(`${model} ${prompt}`, (await ask(model, prompt)).text ?? "");
  if (new Set(expected.values()).size < expected.size / 2) throw new Error("load: the models must differ");
  const before = await metric("lowrank_gpu_bytes");
  const until = performance.now() + 1000 * seconds;
  const client = async (seed: number): Promise<void> => {
    const random = new Random(seed);
    while (performance.now() < until) {
      const model = ["base", ...RESIDENT, ...VISITORS][random.below(6 + VISITORS.length)] as string;
      const prompt = PROMPTS[random.below(PROMPTS.length)] as string;
      const { status, text } = await ask(model, prompt, random.uniform() < 0.3 ? 1 + random.below(10) : undefined);
      const isVisitor = model in VISITS;
      if (status === 404 && isVisitor) counts.unknownAdapter++;
      else if (status !== 200) wrong.push(`${model}: status ${status}`);
      else if (text === undefined) counts.cutOff++;
      else {
        counts.answered++;
        const models = isVisitor ? VISITS[model as Visitor] : [model];
        const right = models.map((one) => expected.get(`${one} ${prompt}`));
        if (!right.includes(text)) wrong.push(`${model}, "${prompt}": got "${text}", alone "${right.join('" or "')}"`);
      }
    }
  };
  const comeAndGo = async (): Promise<void> => {
    for (let i = 0; performance.now() < until; i++) {
      const name = VISITORS[i % VISITORS.length] as Visitor;
      const weights = VISITS[name][Math.floor(i / VISITORS.length) % 2] as string;
      await admin("load_lora_adapter", { lora_name: name, lora_path: weights });
      counts.loads++;
      // Nothing may be left of what it was before: pages of the same prompts, by the other weights.
      for (const prompt of [LONG, LONG]) {
        const { status, text } = await ask(name, prompt);
        if (status !== 200 || text !== expected.get(`${weights} ${prompt}`))
          wrong.push(
            `${name} as ${weights}: status ${status}, got "${text}", alone "${expected.get(`${weights} ${prompt}`)}"`,
          );
      }
      await admin("unload_lora_adapter", { lora_name: name });
      counts.unloads++;
    }
  };
  await Promise.all([comeAndGo(), ...Array.from({ length: streams }, (_, i) => client(i + 1))]);
  await new Promise((done) => setTimeout(done, 1000));
  left = {
    running: await metric("lowrank_sequences_running"),
    waiting: await metric("lowrank_sequences_waiting"),
    pages: await metric("lowrank_kv_pages_used"),
    gpuBytes: (await metric("lowrank_gpu_bytes")) - before,
  };
  for (const [name, value] of Object.entries(left)) if (value !== 0) wrong.push(`left over: ${name} ${value}`);
  steps = await metric("lowrank_steps_total");
} finally {
  const code = await stop();
  if (code !== 0) wrong.push(`the server ended with ${code}`);
  rmSync(folder, { recursive: true });
}
const result = {
  command: `node --import tsx --import ./scripts/wgsl.mjs scripts/load.ts --streams ${streams} --seconds ${seconds}`,
  ...{ streams, seconds, ...counts, steps, left, wrong: wrong.slice(0, 20) },
};
console.log(JSON.stringify(result, null, 2));
if (values.json) {
  mkdirSync(dirname(values.json), { recursive: true });
  writeFileSync(values.json, `${JSON.stringify(result, null, 2)}\n`);
}
process.exit(wrong.length === 0 ? 0 : 1);

/** A greedy answer, streamed; without text where it was cut off after so many events. */
async function ask(model: string, prompt: string, events?: number): Promise<{ status: number; text?: string }> {
  const controller = new AbortController();
  const response = await fetch(`${base}/v1/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${KEY}` },
    body: JSON.stringify({ model, prompt, max_tokens: MAX_TOKENS, temperature: 0, stream: true }),
    signal: controller.signal,
  });
  if (response.status !== 200 || !response.body) {
    await response.body?.cancel();
    return { status: response.status };
  }
  let [seen, buffer, text, isWhole] = [0, "", "", false];
  try {
    for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
      buffer += piece;
      const lines = buffer.split("\n\n");
      buffer = lines.pop() ?? "";
      for (const line of lines) {
        isWhole ||= line === "data: [DONE]";
        if (!line.startsWith("data: {")) continue;
        const event = JSON.parse(line.slice(6)) as { choices?: { text?: string }[]; error?: { message: string } };
        if (event.error) throw new Error(event.error.message);
        text += event.choices?.[0]?.text ?? "";
        counts.tokens++;
        if (++seen === events) {
          controller.abort();
          return { status: 200 };
        }
      }
    }
  } catch (error) {
    if (controller.signal.aborted) return { status: 200 };
    wrong.push(`${model}: ${String(error)}`);
  }
  if (!isWhole) wrong.push(`${model}: a stream ended without [DONE]`);
  return { status: 200, text };
}

async function admin(action: string, body: object): Promise<void> {
  const response = await fetch(`${base}/v1/${action}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${ADMIN_KEY}` },
    body: JSON.stringify(body),
  });
  const text = await response.text();
  if (response.status !== 200) wrong.push(`${action}: ${response.status} ${text}`);
}

async function metric(name: string): Promise<number> {
  const response = await fetch(`${base}/metrics`, { headers: { Authorization: `Bearer ${KEY}` } });
  const [, value] = new RegExp(`^${name} (\\S+)$`, "m").exec(await response.text()) ?? [];
  if (value === undefined) throw new Error(`load: /metrics must have ${name}, got none`);
  return Number(value);
}
