// `lowrank generate` under a schema and as a beam search, as a user runs it.
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { writeTinyModel } from "../tiny-model.ts";
import { lastJson, lowrank } from "./run.ts";

let home = "";
const at = (name: string): string => join(home, name);
const generate = (...more: string[]): ReturnType<typeof lowrank> =>
  lowrank(["generate", "--model", at("model"), "--prompt", "Once an owl", ...more]);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-generate-"));
  await writeTinyModel(at("model"), { tokenizer: true, config: { max_position_embeddings: 256 } });
  const name = { type: "string", minLength: 3, maxLength: 9 };
  await writeFile(at("schema.json"), JSON.stringify({ type: "object", properties: { name }, required: ["name"] }));
  await writeFile(at("bad.json"), JSON.stringify({ type: "array", uniqueItems: true }));
});
afterAll(() => rm(home, { recursive: true }));

test("--json-schema gives JSON that fits, and says where it is cut off", async () => {
  const whole = await generate("--json-schema", at("schema.json"), "--temperature", "2", "--seed", "3");
  expect(whole.code, whole.stderr).toBe(0);
  expect(Object.keys(JSON.parse(whole.stdout))).toEqual(["name"]);
  expect(whole.stderr).not.toContain("warning");
  const cut = await generate("--json-schema", at("schema.json"), "--max-tokens", "4", "--json");
  expect(cut.code).toBe(0);
  expect(lastJson(cut).text).toMatch(/^ ?\{/);
  expect(cut.stderr).toContain("warning: the JSON is cut off after 4 tokens. Raise --max-tokens, or leave out --stop");
}, 120_000);

test("--beams gives the likeliest of what it finds, with --json all", async () => {
  const found = lastJson(await generate("--beams", "3", "--max-tokens", "6", "--json"));
  const answers = found.answers as { text: string; ids: number[]; score: number }[];
  expect(Object.keys(found)).toEqual(["prompt", "text", "prompt_ids", "ids", "answers"]);
  expect(answers).toHaveLength(3);
  expect({ text: found.text, ids: found.ids }).toEqual({ text: answers[0]?.text, ids: answers[0]?.ids });
  const scores = answers.map(({ score }) => score);
  expect(scores).toEqual(scores.toSorted((a, b) => b - a));
  const one = await generate("--beams", "1", "--max-tokens", "6");
  expect(one.stdout).toBe((await generate("--max-tokens", "6")).stdout);
  const whole = lastJson(await generate("--beams", "3", "--json-schema", at("schema.json"), "--json"));
  const texts = (whole.answers as typeof answers).map(({ text }) => text);
  expect(texts).toHaveLength(3);
  expect(new Set(texts).size).toBe(3);
  for (const text of texts) expect(Object.keys(JSON.parse(text))).toEqual(["name"]);
}, 120_000);

test("what cannot be is refused", async () => {
  for (const [args, message] of [
    [["--beams", "2", "--top-k", "3"], "generate: --beams must be without --top-k, got both"],
    [["--beams", "2", "--seed", "0"], "generate: --beams must be without --seed, got both"],
    [
      ["--json-schema", at("bad.json")],
      'json schema: at #: must have keywords that can be kept to, got "uniqueItems". Leave it out, and check the text afterwards',
    ],
  ] as const)
    expect(await generate(...args)).toMatchObject({ code: 1, stdout: "", stderr: `error: ${message}` });
}, 120_000);
