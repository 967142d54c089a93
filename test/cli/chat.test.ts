// `lowrank chat` over a pipe, as a user runs it.
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModel } from "../../src/models/load.ts";
import { savePeftTo } from "../../src/node.ts";
import { Random } from "../../src/tensor/random.ts";
import { testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { type Ended, lastJson, lowrank, start } from "./run.ts";

let home = "";
const at = (name: string): string => join(home, name);
const OFF = { LOWRANK_TUNE: "off" };

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-chat-"));
  await writeTinyModel(at("model"), { tokenizer: true, config: { max_position_embeddings: 1024 } });
  await writeFile(
    at("template.jinja"),
    "{{ bos_token }}{% for message in messages %}{{ message.role ~ ': ' ~ message.content ~ '\\n' }}{% endfor %}assistant:",
  );
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory(at("model")));
  await mkdir(at("adapters"));
  for (const [i, name] of ["pirate", "poet"].entries()) {
    const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" });
    const random = new Random(i);
    for (const parameter of adapter.parameters)
      gpu.write(
        parameter,
        Float32Array.from({ length: parameter.size }, () => random.normal(0, 0.4)),
      );
    await savePeftTo(adapter, at(`adapters/${name}`), "tiny");
    adapter.detach();
  }
  gpu.destroy();
});
afterAll(() => rm(home, { recursive: true, force: true }));

const ARGS = (): string[] => ["chat", "--model", at("model"), "--chat-template", at("template.jinja")];
const ADAPTERS = (): string[] =>
  ["pirate", "poet"].flatMap((name) => ["--adapter", `${name}=${at(`adapters/${name}`)}`]);

async function chat(input: readonly string[], ...args: string[]): Promise<Ended> {
  const { child, ended } = start([...ARGS(), ...args], OFF, { isAsked: true });
  child.stdin.end(input.join("\n"));
  return ended;
}

/** What `lowrank generate` says to the same text. */
async function alone(prompt: string, ...args: string[]): Promise<string> {
  const common = ["generate", "--model", at("model"), "--prompt", prompt, "--max-tokens", "6", "--json"];
  return String(lastJson(await lowrank([...common, ...args], OFF)).text);
}

test("each line is answered by the adapter that was chosen last, with what was said before", async () => {
  const lines = [
    "Once",
    "/adapter poet",
    "/clear",
    "Once",
    "/adapter",
    "/base",
    "/clear",
    "Once",
    "/adapter pirate",
    "a",
  ];
  const { code, stdout, stderr } = await chat(lines, ...ADAPTERS(), "--max-tokens", "6");
  expect(code, stderr).toBe(0);
  const base = await alone("user: Once\nassistant:");
  const poet = await alone("user: Once\nassistant:", "--adapter", at("adapters/poet"));
  const pirate = await alone(`user: Once\nassistant: ${base}\nuser: a\nassistant:`, "--adapter", at("adapters/pirate"));
  expect(new Set([base, poet]).size, "an adapter changes the answer").toBe(2);
  expect(stdout).toBe(`${[base, poet, base, pirate].join("\n")}\n`);
  expect(stderr).toContain("adapters: pirate, poet; answers are by poet\n");
  expect(stderr).toMatch(/^keys and values take .*, adapters .* for 2 of rank 16$/m);
  expect(stderr).toContain("the answer is cut off after 6 tokens: by --max-tokens, or the end of the context");
}, 240_000);

test("a system message goes before, commands and adapters that are unknown are refused, and the rest is answered", async () => {
  const lines = ["/system Sing", "/poem", "/adapter bard", "", "Once", "/help", "/quit", "not answered"];
  const { code, stdout, stderr } = await chat(lines, ...ADAPTERS(), "--max-tokens", "6", "--system", "Speak");
  expect(code, "as something was refused").toBe(1);
  expect(stdout).toBe(`${await alone("system: Sing\nuser: Once\nassistant:")}\n`);
  expect(stderr).toContain(
    "error: chat: the command must be one of /adapter, /base, /system, /clear, /help and /quit, got /poem\n",
  );
  expect(stderr).toContain('error: chat: the adapter must be one of pirate, poet, got "bard"\n');
  expect(stderr).toContain("/adapter NAME  answer by this adapter\n");
}, 240_000);

test("what does not fit the context is refused and taken back", async () => {
  const { code, stdout, stderr } = await chat(["Once ".repeat(40), "a", ""], "--context", "32", "--max-tokens", "6");
  expect(code).toBe(1);
  expect(stderr).toMatch(/^error: generate: the prompt must be shorter than the context of 32 tokens, got \d+$/m);
  expect(stdout).toBe(`${await alone("user: a\nassistant:")}\n`);
}, 240_000);

test("Ctrl-C stops an answer, and ends the chat where there is none", async () => {
  const { child, ended } = start([...ARGS(), "--max-tokens", "900"], OFF, { isAsked: true });
  let stdout = "";
  const saw = (what: RegExp): Promise<void> =>
    new Promise((resolve) => {
      const look = (): void => {
        if (what.test(stdout)) resolve();
      };
      child.stdout.on("data", look);
      look();
    });
  child.stdout.on("data", (text: string) => {
    stdout += text;
  });
  child.stdin.write("Once\n");
  await saw(/./);
  child.kill("SIGINT");
  await saw(/\n$/);
  const first = stdout.length;
  child.stdin.write("Once\n");
  await saw(new RegExp(`^[^]{${first + 1},}`));
  child.kill("SIGINT");
  await saw(new RegExp(`^[^]{${first + 1},}\n$`));
  child.kill("SIGINT");
  const { code, stderr } = await ended;
  expect([code, stderr.includes("cut off")]).toEqual([0, false]);
}, 240_000);

test("a model without a template, and options that cannot be, are refused before anything is loaded", async () => {
  const at1 = ["chat", "--model", at("model")];
  for (const [args, message] of [
    [
      at1,
      `chat: the model must have a chat template, got none in ${at("model")}. Give --chat-template, or use lowrank generate`,
    ],
    [
      [...at1, "--chat-template", "chatml", "--adapter", "pirate"],
      'chat: --adapter must be name=place with a name of letters, digits, ".", "-" and "_" that is not taken, got pirate',
    ],
    [[...at1, "--top-p", "2"], "chat: --top-p must be a number above 0 and at most 1, got 2"],
  ] as const)
    expect(await lowrank(args, OFF)).toMatchObject({ code: 1, stdout: "", stderr: `error: ${message}` });
}, 240_000);
