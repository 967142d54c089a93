import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Command, Option } from "commander";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { configOption, editDistance, resolvedConfig, withConfig } from "../../src/cli/run-config.ts";
import { FormatError } from "../../src/io/errors.ts";

let home = "";
beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-config-"));
});
afterAll(() => rm(home, { recursive: true, force: true }));

const command = (): Command =>
  new Command("train")
    .addOption(configOption())
    .addOption(new Option("--model <place>").makeOptionMandatory())
    .addOption(new Option("--rank <n>").default(16))
    .addOption(new Option("--batch-size <n>").default(4))
    .addOption(new Option("--steps <n>").conflicts("epochs"))
    .addOption(new Option("--epochs <n>"))
    .addOption(new Option("--target-modules <which>"))
    .addOption(new Option("--sample-prompt <text...>"))
    .option("--use-dora", "")
    .option("--no-shuffle", "")
    .option("--json", "");

async function file(text: string): Promise<string> {
  const path = join(home, `${Math.random()}.yaml`);
  await writeFile(path, text);
  return path;
}

async function parsed(text: string, ...args: string[]): Promise<Record<string, unknown>> {
  const made = command().action(() => {});
  await made.parseAsync(await withConfig(made, ["--config", await file(text), ...args]), { from: "user" });
  const { config, ...options } = made.opts<Record<string, unknown>>();
  return options;
}

describe("--config", () => {
  test("gives options by their names, in any of three spellings, and the command line counts more", async () => {
    const text =
      "model: base\nrank: 8\nbatch_size: 2\ntargetModules: [q_proj, v_proj]\nshuffle: false\nuse-dora: true\n";
    expect(await parsed(text, "--rank", "4")).toEqual({
      model: "base",
      rank: "4",
      batchSize: "2",
      targetModules: "q_proj,v_proj",
      shuffle: false,
      useDora: true,
    });
    expect(
      await parsed("model: base\nshuffle: true\nuse-dora: false\nsteps: null\nsample-prompt: [One, Two]\n"),
    ).toEqual({
      model: "base",
      rank: 16,
      batchSize: 4,
      shuffle: true,
      samplePrompt: ["One", "Two"],
    });
  });

  test("gives way to an option of the command line that contradicts it", async () => {
    expect(await parsed("model: base\nepochs: 3\n", "--steps=5")).toMatchObject({ steps: "5" });
    expect(await parsed("model: base\nsteps: 3\n", "--epochs", "2")).not.toHaveProperty("steps");
  });

  test("is not needed", async () => {
    expect(await withConfig(command(), ["--model", "base"])).toEqual(["--model", "base"]);
  });

  test.each([
    ["rnk: 8", ':1: a key must be an option of train, got "rnk". Did you mean "rank"?'],
    ["model: base\nlearning_speed: 8", ':2: a key must be an option of train, got "learning_speed"'],
    ["config: other.yaml", ':1: a key must be an option of train, got "config"'],
    ["use-dora: 1", ':1: "use-dora" must be true or false, got 1'],
    ["rank: {a: 1}", ':1: "rank" must be a text, a number or a list of such, got {"a":1}'],
    ["rank: []", ':1: "rank" must be a text, a number or a list of such, got []'],
    ["- rank", ': must have one option per line, such as "rank: 8", got ["rank"]'],
    ["", ': must have one option per line, such as "rank: 8", got null'],
    ["rank: 8\nrank: 9", ":2: must be YAML, got: Map keys must be unique at line 2, column 1:"],
    [
      "rank: [8",
      ":1: must be YAML, got: Flow sequence in block collection must be sufficiently indented and end with a ] at line 1, column 9:",
    ],
  ])("refuses %j", async (text, message) => {
    const path = await file(text);
    await expect(withConfig(command(), ["--config", path])).rejects.toThrow(new FormatError(`${path}${message}`));
  });

  test("of a run, as it is saved, makes the same run", async () => {
    const args = [
      "--model",
      "base",
      "--steps=9",
      "--no-shuffle",
      "--target-modules",
      "/a|b/",
      "--sample-prompt",
      "x",
      "--json",
    ];
    const text = resolvedConfig(command(), args);
    expect(text).toBe(
      "model: base\nrank: 16\nbatch-size: 4\nsteps: 9\ntarget-modules: /a|b/\nsample-prompt:\n  - x\nshuffle: false\n",
    );
    const made = command().action(() => {});
    await made.parseAsync(args, { from: "user" });
    const { json, ...wanted } = made.opts();
    expect(await parsed(text)).toEqual({ ...wanted, rank: "16", batchSize: "4" });
  });

  test("of an option that takes several all are there, and no default that contradicts what was said", async () => {
    const args = ["--model", "base", "--sample-prompt", "a", "b", "--no-shuffle", "--sample-prompt=c"];
    const made = command().addOption(new Option("--init-adapter <place>").conflicts(["rank"]));
    expect(resolvedConfig(made, [...args, "--init-adapter", "x"])).toBe(
      "model: base\nbatch-size: 4\nsample-prompt:\n  - a\n  - b\n  - c\nshuffle: false\ninit-adapter: x\n",
    );
  });

  test("measures how far a word is from another", () => {
    expect(
      [
        ["kitten", "sitting"],
        ["", "abc"],
        ["rank", "rank"],
      ].map(([a = "", b = ""]) => editDistance(a, b)),
    ).toEqual([3, 3, 0]);
  });
});
