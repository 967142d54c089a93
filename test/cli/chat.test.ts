// lowrank chat, by lines that come through a pipe.
import { mkdtemp, rm } from "node:fs/promises";
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
import { type Ended, start } from "./run.ts";

let home = "";
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-chat-"));
  await writeTinyModel(at("model"), { tokenizer: true, config: { max_position_embeddings: 160 } });
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory(at("model")));
  for (const [i, name] of ["pirate", "letter"].entries()) {
    const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" });
    const random = new Random(i + 1);
    for (const { B } of adapter.pairs.values())
      gpu.write(
        B,
        Float32Array.from({ length: B.size }, () => random.normal(0, 0.5)),
      );
    await savePeftTo(adapter, at(name), "tiny");
    adapter.detach();
  }
  model.destroy();
});
afterAll(() => rm(home, { recursive: true, force: true }));

const chat = (input: string, ...flags: string[]): Promise<Ended> =>
  start(["chat", "--model", at("model"), "--temperature", "0", "--max-tokens", "8", ...flags], {}, input).ended;

test("each line is answered by the adapter that was chosen, and the same line by another differs", async () => {
  const adapters = ["--adapter", `pirate=${at("pirate")}`, `letter=${at("letter")}`, "--chat-template", "chatml"];
  const lines = [
    "Hello",
    "/clear",
    "/adapter pirate",
    "Hello",
    "/clear",
    "/adapter letter",
    "Hello",
    "/clear",
    "/base",
    "Hello",
  ];
  const { code, stdout, stderr } = await chat(`${lines.join("\n")}\n`, ...adapters);
  expect(code).toBe(0);
  expect(stderr).toContain("pirate answers\n");
  expect(stderr).toContain("letter answers\n");
  const answers = stdout.split("\n").slice(0, -1);
  expect(answers.length).toBe(4);
  expect(answers[3]).toBe(answers[0]);
  expect(new Set(answers).size).toBe(3);
});

test("what a line cannot be is said, and the talk goes on", async () => {
  const lines = ["/adapter", "/adapter nobody", "/fly", "/system Be kind.", "x".repeat(400), "/quit", "never read"];
  const { code, stdout, stderr } = await chat(lines.join("\n"), "--chat-template", "chatml");
  expect(code).toBe(0);
  expect(stdout).toBe("");
  expect(stderr).toContain("adapters: none; the base answers\n");
  expect(stderr).toContain('the adapter must be one of none, got "nobody"\n');
  expect(stderr).toContain("there is no /fly. /adapter NAME");
  expect(stderr).toContain("noted\n");
  expect(stderr).toMatch(
    /generate: the prompt must be shorter than the context of 160 tokens, got \d+\. \/clear forgets/,
  );
});

test("a model without a template is refused with the way out", async () => {
  const { code, stderr } = await chat("Hello\n");
  expect(code).toBe(1);
  expect(stderr).toContain(
    `error: chat: the model must have a chat template, got none in ${at("model")}. Give --chat-template FILE or chatml, or use lowrank generate`,
  );
});
