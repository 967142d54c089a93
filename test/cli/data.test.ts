// `lowrank data`: what it shows of good data, and what it says to bad.
import { chmod, mkdir, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { dataCommand } from "../../src/cli/data.ts";
import { exitCode } from "../../src/cli/session.ts";
import { trainCommand } from "../../src/cli/train.ts";
import { FormatError } from "../../src/io/errors.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { MALFORMED } from "./malformed.ts";
import { lastJson, lowrank } from "./run.ts";

const TEMPLATE = ["--chat-template", "test/golden/chat/chatml.jinja"];
let home = "";
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-data-"));
  await writeTinyModel(at("model"), { tokenizer: true, config: { max_position_embeddings: 128 } });
});
afterAll(() => rm(home, { recursive: true, force: true }));

async function file(name: string, content: string | Uint8Array): Promise<string> {
  await writeFile(at(name), content);
  return at(name);
}

/** Runs the command in this process: what it prints, or what it throws. */
async function show(place: string, ...more: string[]): Promise<string> {
  const out = vi.spyOn(process.stdout, "write").mockReturnValue(true);
  try {
    await dataCommand()
      .exitOverride()
      .parseAsync([place, "--model", at("model"), ...more], { from: "user" });
    return out.mock.calls.map(([text]) => text).join("");
  } finally {
    out.mockRestore();
  }
}

const failure = (run: Promise<unknown>): Promise<unknown> =>
  run.then(
    () => undefined,
    (error: unknown) => error,
  );

describe("a file that cannot be used is refused with its line, status 2, and nothing is written", () => {
  test.each(MALFORMED)("$what", async ({ file: name, content, args = [], message }) => {
    const path = await file(name, content);
    const before = await readdir(home, { recursive: true });
    const error = await failure(show(path, ...(args.length > 0 ? args : TEMPLATE)));
    expect(error).toEqual(new FormatError(path + message));
    expect(exitCode(error)).toBe(2);
    expect(await readdir(home, { recursive: true })).toEqual(before);
  });

  test("a place where no file is", async () => {
    await expect(show(at("none.jsonl"))).rejects.toThrow(
      new FormatError(
        `${at("none.jsonl")}: must be a file that can be read, got ENOENT (nothing there). Check the path`,
      ),
    );
  });

  test("a path through a file, and a file that may not be read", async () => {
    const path = await file("secret.jsonl", "{}");
    const refused = (place: string, why: string): Promise<void> =>
      expect(show(place)).rejects.toThrow(new FormatError(`${place}: must be a file that can be read, got ${why}`));
    await refused(`${path}/inside.jsonl`, "ENOTDIR (a part of the path is a file). Choose another path");
    if (process.getuid?.() === 0) return; // who may read everything
    await chmod(path, 0);
    await refused(path, "EACCES (permission denied). Choose another path, or change its permissions");
  });

  test("directories without data, with data twice, or without what is asked for", async () => {
    await mkdir(at("empty"));
    await expect(show(at("empty"))).rejects.toThrow(
      new FormatError(
        `${at("empty")}: a directory of data must have train, valid or test with one of the endings .jsonl .ndjson .json .csv .tsv .parquet .txt, got none`,
      ),
    );
    await mkdir(at("twice"));
    await file("twice/valid.jsonl", "");
    await file("twice/validation.csv", "");
    await expect(show(at("twice"))).rejects.toThrow(
      new FormatError(`${at("twice")}: must have one file for valid, got valid.jsonl, validation.csv`),
    );
    await rm(at("twice/validation.csv"));
    await expect(show(at("twice"))).rejects.toThrow(
      new FormatError(`${at("twice")}: must have a file of train, got none`),
    );
  });

  test("in training, too, before anything is there", async () => {
    const path = await file("bad.jsonl", '{"text":"a"}\n{"text":');
    const train = trainCommand().exitOverride();
    const error = await failure(
      train.parseAsync(["--model", at("model"), "--data", path, "--out", at("out")], { from: "user" }),
    );
    expect(exitCode(error)).toBe(2);
    expect(await readdir(at("out"))).toEqual([]);
  });

  test("through the process itself", async () => {
    const path = await file("bad.jsonl", "{'text':'a'}");
    const ended = await lowrank(["data", path, "--model", at("model")]);
    expect(ended).toMatchObject({ code: 2, stdout: "" });
    expect(ended.stderr).toMatch(/^error: .*bad\.jsonl:1: must be JSON, got /);
  });
});

const chat = (...turns: string[]): string =>
  JSON.stringify({
    messages: turns.map((content, i) => ({ role: i % 2 === 0 ? "user" : "assistant", content })),
    id: 7,
  });

test("rows are shown as the model sees them, what is learned between marks, with lengths and padding", async () => {
  const path = await file("chat.jsonl", `${chat("a", "b")}\n${chat("ccc", "d\u001be", "f", "g")}\n${chat("h")}\n`);
  const text = await show(path, ...TEMPLATE, "--max-length", "50", "--batch-size", "2");
  expect(text).toMatchInlineSnapshot(`
    "row 1: 50 tokens, 7 to learn
    <|im_start|>user
    a<|im_end|>
    <|im_start|>assistant
    ⟦b<|im_e⟧

    row 2: 50 tokens, 5 to learn
    <|im_start|>user
    ccc<|im_end|>
    <|im_start|>assistant
    ⟦d\\x1be<|⟧

    data: 2 rows (2 truncated to 50 tokens, 1 dropped with nothing to learn), 100 tokens, 12 of them to learn
    keys that are not used: "id"
    forms: messages 3
    lengths: 50 to 50 tokens, mean 50.0, median 50, 95 % up to 50
            50 to 50         2 ########################################
    packing: 2 rows in 2; of the positions of a batch 0.0 % were padding, 0.0 % are
    "
  `);
});

test("a model is trained on packed chats of which some are held out", async () => {
  const rows = Array.from({ length: 12 }, (_, i) => chat("a".repeat(i + 1), "b"));
  const args = [
    ...["train", "--model", at("model"), "--data", await file("chats.jsonl", rows.join("\n")), "--out", at("packed")],
    ...["--rank", "2", "--steps", "2", "--packing", "--valid-split", "0.25", "--json", ...TEMPLATE],
  ];
  const ended = await lowrank(args);
  expect(ended.code, ended.stderr).toBe(0);
  expect(ended.stderr).toMatch(
    /^packing: 9 rows in 5; of the positions of a batch [\d.]+ % were padding, [\d.]+ % are$/m,
  );
  const { loss_valid, peak_bytes, planned_bytes, ...outcome } = lastJson(ended);
  expect(outcome).toMatchObject({ steps: 2, rows: 12, skipped_steps: 0 });
  expect(loss_valid).toBeGreaterThan(0);
  expect(Number(peak_bytes) / Number(planned_bytes)).toBeLessThanOrEqual(1.01); // inputs of other shapes than the largest
});

test("on a terminal what is not learned is dim, unless colours are unwanted", async () => {
  const path = await file("dim.jsonl", '{"prompt":"a","completion":"b"}');
  const isTTY = process.stdout.isTTY;
  process.stdout.isTTY = true;
  vi.stubEnv("NO_COLOR", "");
  expect(await show(path)).toContain("\n\u001b[2m<s>a\u001b[22mb</s>\n");
  vi.stubEnv("NO_COLOR", "1");
  expect(await show(path)).toContain("\n<s>a⟦b</s>⟧\n");
  vi.unstubAllEnvs();
  process.stdout.isTTY = isTTY;
});

test("the same as JSON", async () => {
  const path = await file("pairs.txt", "a||b\nccc||d\n");
  const args = ["data", path, "--model", at("model"), "--prompt-separator", "||", "--rows", "1", "--json"];
  const ended = await lowrank(args);
  expect(ended, ended.stderr).toMatchObject({ code: 0 });
  expect(lastJson(ended)).toMatchInlineSnapshot(`
    {
      "dropped": 0,
      "examples": [
        {
          "ids": [
            0,
            99,
            126,
            126,
            100,
            1,
          ],
          "parts": [
            {
              "learned": false,
              "text": "<s>a||",
            },
            {
              "learned": true,
              "text": "b</s>",
            },
          ],
        },
      ],
      "forms": {
        "completion": 2,
      },
      "histogram": [
        {
          "from": 6,
          "rows": 1,
          "to": 6,
        },
        {
          "from": 7,
          "rows": 0,
          "to": 7,
        },
        {
          "from": 8,
          "rows": 1,
          "to": 8,
        },
      ],
      "ignored_keys": [],
      "learned_tokens": 4,
      "lengths": {
        "max": 8,
        "mean": 7,
        "median": 8,
        "min": 6,
        "p95": 8,
      },
      "max_length": 128,
      "packed": {
        "rows": 1,
        "share": 0,
      },
      "padding": {
        "batch_size": 4,
        "share": 0.125,
      },
      "rows": 2,
      "tokens": 14,
      "truncated": 0,
      "unclear": 0,
    }
  `);
});
