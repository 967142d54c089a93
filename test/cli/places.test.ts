// A model or adapter named by its directory or by its id on the Hub: a Hub on this machine.
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, expect, test, vi } from "vitest";
import { located } from "../../src/cli/places.ts";
import { DownloadProgress } from "../../src/cli/progress.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory, writeFileAtomic } from "../../src/io/files.ts";
import { encodeMlx } from "../../src/lora/adapter-file.ts";
import { encodeGgufAdapter } from "../../src/lora/gguf-adapter.ts";
import { type Matrix, targetsOf } from "../../src/lora/plain-adapter.ts";
import { readConfig } from "../../src/models/config.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { type FakeHub, type FakeModel, startHub } from "../io/hub-server.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { lastJson, lowrank } from "./run.ts";

const COMMIT = "0123456789abcdef0123456789abcdef01234567";
let home = "";
let hub: FakeHub;
let env: Record<string, string> = {};
const at = (name: string): string => join(home, name);
const snapshot = (id: string, commit = COMMIT): string =>
  at(`cache/models--${id.replace("/", "--")}/snapshots/${commit}`);

async function serve(id: string, directory: string, refs = {}): Promise<void> {
  const files: Record<string, Uint8Array> = {};
  for (const name of await readdir(directory)) files[name] = await readFile(join(directory, name));
  hub.models.set(id, { commit: COMMIT, refs: { main: COMMIT, ...refs }, files } satisfies FakeModel);
}

/** One small adapter in the formats that are not PEFT's. */
async function writeAdapters(): Promise<void> {
  const matrix = (rows: number, columns: number): Matrix => ({
    ...{ rows, columns, values: Float32Array.from({ length: rows * columns }, Math.random) },
  });
  const modules = new Map([["model.layers.0.self_attn.q_proj", { A: matrix(2, 32), B: matrix(32, 2) }]]);
  const config = { r: 2, alpha: 4, ...targetsOf(modules) };
  const adapter = {
    format: "peft",
    config,
    baseModel: "org/tiny",
    modules,
    dtypes: new Set(["F32"] as const),
    sizeBytes: 512,
  } as const;
  const base = await readConfig(diskDirectory(at("model")));
  const written = { mlx: encodeMlx(adapter, base).files, gguf: encodeGgufAdapter(adapter, base).files };
  for (const [directory, files] of Object.entries(written)) {
    await mkdir(at(directory));
    for (const [file, content] of Object.entries(files))
      await writeFileAtomic(join(at(directory), file || "a.gguf"), content);
  }
}

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-places-"));
  hub = await startHub();
  env = { HF_ENDPOINT: hub.url, HF_HUB_CACHE: at("cache"), HF_HOME: at("home"), HF_HUB_OFFLINE: "", HF_TOKEN: "" };
  await writeTinyModel(at("model"));
  await writeFile(at("ids.jsonl"), '{"input_ids":[1,2,3]}\n');
  await serve("org/tiny", at("model"), { v1: "1".repeat(40) });
  await writeAdapters();
});
afterAll(async () => {
  await hub.close();
  await rm(home, { recursive: true, force: true });
});
beforeEach(() => {
  for (const [name, value] of Object.entries(env)) vi.stubEnv(name, value);
  vi.spyOn(process.stderr, "write").mockReturnValue(true);
});
afterEach(() => {
  vi.unstubAllEnvs();
  vi.restoreAllMocks();
  hub.asked.length = 0;
});
const said = (): string =>
  vi
    .mocked(process.stderr.write)
    .mock.calls.map(([text]) => String(text))
    .join("");

test("a model of the Hub is planned for without its weights, trained, and named in the adapter, which can be of the Hub too", async () => {
  const place = ["--model", "org/tiny"];
  const planned = await lowrank(["plan", ...place, "--json"], env);
  expect(planned.code, planned.stderr).toBe(0);
  expect(planned.stderr).toContain("downloading org/tiny from the Hugging Face Hub");
  expect(await readdir(snapshot("org/tiny"))).toEqual(["config.json"]);

  const trained = await lowrank(
    ["train", ...place, "--data", at("ids.jsonl"), "--out", at("adapter"), "--steps", "1"],
    env,
  );
  expect(trained.code, trained.stderr).toBe(0);
  const config = JSON.parse(await readFile(at("adapter/adapter_config.json"), "utf8"));
  expect(config.base_model_name_or_path).toBe("org/tiny");

  await serve("org/adapter", at("adapter"));
  const evaluate = (model: string, adapter: string, more = {}): ReturnType<typeof lowrank> =>
    lowrank(["eval", "--model", model, "--adapter", adapter, "--data", at("ids.jsonl"), "--json"], { ...env, ...more });
  const fromHub = await evaluate("org/tiny", "org/adapter");
  expect(fromHub.code, fromHub.stderr).toBe(0);
  expect(lastJson(fromHub)).toEqual(lastJson(await evaluate(at("model"), at("adapter"))));
  hub.asked.length = 0;
  expect(lastJson(await evaluate("org/tiny", "org/adapter", { HF_HUB_OFFLINE: "1" }))).toEqual(lastJson(fromHub));
  expect(hub.asked).toEqual([]);
});

test("an adapter of mlx-lm and one in a GGUF file are converted and inspected by id", async () => {
  await serve("org/mlx", at("mlx"));
  await serve("org/gguf", at("gguf"));
  const inspected = await lowrank(["inspect", "org/mlx", "--json"], env);
  expect(lastJson(inspected)).toMatchObject({ format: "mlx", base_model: "org/tiny" });
  const converted = await lowrank(
    ["convert", "--adapter", "org/gguf", "--to", "peft", "--out", at("peft"), "--model", "org/tiny"],
    env,
  );
  expect(converted.code, converted.stderr).toBe(0);
  expect(await readdir(at("peft"))).toEqual(["adapter_config.json", "adapter_model.safetensors"]);
});

test("a directory that exists is taken, whatever the Hub has", async () => {
  expect(await located({ model: "demo/base", adapter: home })).toEqual({
    model: "demo/base",
    baseModel: "demo/base",
    adapter: home,
  });
  expect(hub.asked).toEqual([]);
});

test("a revision comes after an @ or from --revision", async () => {
  const options = { baseModel: "org/tiny", model: snapshot("org/tiny", "1".repeat(40)) };
  expect(await located({ model: "org/tiny@v1" })).toEqual(options);
  expect(await located({ model: "org/tiny", revision: "v1" })).toEqual({ ...options, revision: "v1" });
  expect(await located({ model: "org/tiny", initAdapter: `org/tiny@${COMMIT}` })).toEqual({
    baseModel: "org/tiny",
    model: snapshot("org/tiny"),
    initAdapter: snapshot("org/tiny"),
  });
  for (const model of ["org/tiny@main", home])
    await expect(located({ model, revision: "v1" })).rejects.toThrow(
      new ShapeError(
        `--revision: must go with a --model that is org/name on the Hugging Face Hub, got ${model}. Leave it out`,
      ),
    );
});

test("a place that is neither is refused, with both that it could be", async () => {
  for (const place of ["./nowhere", "nowhere", "/nowhere/at/all", "a b/c@v1"])
    await expect(located({ model: "demo/base", adapter: place })).rejects.toThrow(
      new FormatError(
        `--adapter: must be a directory, or org/name of a model on the Hugging Face Hub, got ${place}, which is neither. Check the path; relative paths start at ${process.cwd()}`,
      ),
    );
  await expect(located({ model: "models/base" })).rejects.toThrow(
    new FormatError(
      `--model: models/base is not a directory here, nor to be had from the Hugging Face Hub. models/base: must be a model on ${hub.url}, got 404. Check the name: there is no such model, or it is private. Set HF_TOKEN to a token that may read it`,
    ),
  );
});

test("a model that cannot be read is refused before its weights are fetched", async () => {
  const files = { "config.json": '{"model_type":"mamba"}', "model.safetensors": "weights" };
  hub.models.set("org/other", { commit: COMMIT, refs: { main: COMMIT }, files });
  await expect(located({ model: "org/other" })).rejects.toThrow(
    new FormatError(
      `${snapshot("org/other")}/config.json: "model_type" must be one of llama, mistral, qwen2, qwen3, smollm3, gemma2, gemma3_text, phi3, olmo2, granite, gpt2, got "mamba"`,
    ),
  );
  expect(hub.asked.some(({ path }) => path.includes("safetensors"))).toBe(false);
});

test("Ctrl-C while downloading ends it, and the process stays in charge of the next one", async () => {
  hub.fault = ({ path }) => {
    if (path.startsWith("/api")) process.emit("SIGINT");
    return undefined;
  };
  await expect(located({ model: "org/tiny" })).rejects.toThrow(
    "interrupted; the same command goes on with the download",
  );
  hub.fault = () => undefined;
  expect(process.listenerCount("SIGINT")).toBe(0);
});

test("a download is one line on a pipe and a bar on a terminal", () => {
  const isTTY = process.stderr.isTTY;
  const now = vi.spyOn(performance, "now").mockReturnValue(0);
  const show = (terminal: boolean): string => {
    process.stderr.isTTY = terminal;
    vi.mocked(process.stderr.write).mockClear();
    now.mockReturnValue(0);
    const progress = new DownloadProgress("org/tiny");
    const step = (ms: number, done: number): void => {
      now.mockReturnValue(ms);
      progress.show({ file: "f", fileDone: done, fileSize: 4096, done, size: 4096 });
    };
    step(1000, 1024);
    step(1050, 1500); // too soon after the last
    step(2000, 2048);
    step(2010, 4096);
    progress.end();
    return said();
  };
  const line = "downloading org/tiny from the Hugging Face Hub\n";
  expect(show(false)).toBe(line);
  expect(show(true)).toBe(
    `${line}\r\x1b[K[=====               ] 1.0 KiB of 4.0 KiB, 0 B/s` +
      "\r\x1b[K[==========          ] 2.0 KiB of 4.0 KiB, 512 B/s, 4s left" +
      "\r\x1b[K[====================] 4.0 KiB of 4.0 KiB, 1.5 KiB/s, 0s left\n",
  );
  process.stderr.isTTY = isTTY;
});
