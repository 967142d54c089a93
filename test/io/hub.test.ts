// Downloads from a Hub on this machine: what arrives, what is asked for, and what is said when it goes wrong.
import { spawn } from "node:child_process";
import { existsSync, statSync } from "node:fs";
import { mkdir, mkdtemp, readdir, readFile, readlink, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { downloadModel, type HubOptions, type HubProgress, isModelId } from "../../src/hub.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { blobName, type FakeHub, type FakeModel, type Fault, gitHash, isLfs, sha256, startHub } from "./hub-server.ts";

const ID = "org/tiny";
const COMMIT = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS = new Uint8Array(100_000).map((_, i) => (i * 7919) >> 4);
const CONFIG = '{"model_type":"llama"}';
const WANTED: FakeModel["files"] = {
  "config.json": CONFIG,
  "generation_config.json": "{}",
  "model.safetensors": WEIGHTS,
  "tokenizer.json": '{"version":"1.0"}',
  "tokenizer_config.json": "{ }",
  "tokenizer.model": "pieces",
  "chat_template.jinja": "{{ messages }}",
  "adapter_config.json": '{"r":1}',
  "adapter_model.safetensors": "adapter",
};
const UNWANTED: FakeModel["files"] = {
  "README.md": "# Tiny",
  "pytorch_model.bin": "pickle",
  "model.gguf": "gguf",
  "consolidated.safetensors": "the same again",
  "original/model.safetensors": "original",
  "original/params.json": "{}",
  "onnx/model.onnx": "onnx",
};
const SMALLEST = { "config.json": CONFIG, "tokenizer.json": "{}", "model.safetensors": WEIGHTS };

let hub: FakeHub;
let home = "";
let cacheDir = "";
beforeEach(async () => {
  for (const name of [
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
    "HTTPS_PROXY",
    "https_proxy",
  ])
    vi.stubEnv(name, undefined);
  home = await mkdtemp(join(tmpdir(), "lowrank-hub-"));
  vi.stubEnv("HOME", home);
  cacheDir = join(home, "cache");
  hub = await startHub();
  hub.arrived = () =>
    statSync(`${blob("model.safetensors", WEIGHTS)}.incomplete`, { throwIfNoEntry: false })?.size ?? 0;
  serve(SMALLEST);
});
afterEach(async () => {
  vi.unstubAllEnvs();
  await hub.close();
  await rm(home, { recursive: true, force: true });
});

function serve(files: FakeModel["files"], id = ID): void {
  hub.models.set(id, { commit: COMMIT, refs: { main: COMMIT, "refs/pr/1": COMMIT }, files });
}
const download = (options: HubOptions = {}): Promise<string> =>
  downloadModel(ID, { cacheDir, endpoint: hub.url, ...options });
const storage = (...names: string[]): string => join(cacheDir, "models--org--tiny", ...names);
const blob = (path: string, content: string | Uint8Array): string => storage("blobs", blobName(path, content));
const hashAt = async (path: string): Promise<string> => sha256(await readFile(path));
/** Paths that files were asked for by; those of the store stand behind them. */
const fetched = (): string[] =>
  hub.asked
    .filter(({ path }) => path.includes("/resolve/"))
    .map(({ path }) => path.replace(/^.*\/resolve\/[^/]+\//, ""));
/** Fails the first requests that match, one fault each. */
function failing(pattern: RegExp, ...faults: Fault[]): void {
  hub.fault = ({ host, path }) => (pattern.test(`${host}${path}`) ? faults.shift() : undefined);
}
const unreachable = (reason: string): FormatError =>
  new FormatError(
    `org/tiny: ${hub.url} must be reachable, got ${reason} after 3 retries. Check the network and go on with the same command, or set HF_HUB_OFFLINE=1 to use the cache alone`,
  );

/** Lays a model out as Python does. */
async function asPython(files: FakeModel["files"], ref = "main"): Promise<void> {
  for (const directory of ["blobs", "refs", `snapshots/${COMMIT}`])
    await mkdir(storage(directory), { recursive: true });
  await writeFile(storage("refs", ref), COMMIT);
  for (const [path, content] of Object.entries(files)) {
    await writeFile(blob(path, content), content);
    await symlink(`../../blobs/${blobName(path, content)}`, storage("snapshots", COMMIT, path));
  }
}

describe("what arrives", () => {
  test("is a model and an adapter in Python's layout, in no other format than safetensors", async () => {
    serve({ ...UNWANTED, ...WANTED });
    const snapshot = await download();
    expect(snapshot).toBe(storage("snapshots", COMMIT));
    expect((await readdir(snapshot)).sort()).toEqual(Object.keys(WANTED).sort());
    for (const [path, content] of Object.entries(WANTED)) {
      expect(await readlink(join(snapshot, path))).toBe(
        `../../blobs/${isLfs(path) ? sha256(content) : gitHash(content)}`,
      );
      expect(await hashAt(join(snapshot, path))).toBe(sha256(content));
    }
    expect((await readdir(storage())).sort()).toEqual(["blobs", "refs", "snapshots"]);
    expect((await readdir(storage("blobs"))).length).toBe(Object.keys(WANTED).length);
    expect(await readdir(storage("refs"))).toEqual(["main"]);
    expect(await readFile(storage("refs/main"), "utf8")).toBe(COMMIT);
    expect(await readdir(join(cacheDir, ".locks/models--org--tiny"))).toEqual([]);
    expect(fetched().sort()).toEqual(Object.keys(WANTED).sort());
    const config = await diskDirectory(snapshot).open("config.json");
    expect(await config?.read(0, CONFIG.length)).toEqual(new Uint8Array(Buffer.from(CONFIG)));
  });

  test("is every shard of the index, whatever it is called, once", async () => {
    const weight_map = { a: "model-1.safetensors", b: "model-1.safetensors", c: "sub/other.safetensors" };
    const index = JSON.stringify({ weight_map });
    const shards = { "model-1.safetensors": "one", "sub/other.safetensors": "two", "left-out.safetensors": "three" };
    serve({ "config.json": CONFIG, "model.safetensors.index.json": index, ...shards });
    const snapshot = await download();
    expect((await readdir(snapshot)).sort()).toEqual([
      "config.json",
      "model-1.safetensors",
      "model.safetensors.index.json",
      "sub",
    ]);
    expect(await readlink(join(snapshot, "sub/other.safetensors"))).toBe(`../../../blobs/${sha256("two")}`);
    expect(await readFile(join(snapshot, "sub/other.safetensors"), "utf8")).toBe("two");
  });

  test("is no weight where weights are not wanted", async () => {
    serve(WANTED);
    const snapshot = await download({ weights: false });
    const names = Object.keys(WANTED).filter((name) => !name.endsWith(".safetensors"));
    expect((await readdir(snapshot)).sort()).toEqual(names.sort());
    hub.asked.length = 0;
    expect(await download({ weights: false, revision: COMMIT })).toBe(snapshot);
    expect(hub.asked).toEqual([]);
    await download({ revision: COMMIT });
    expect(fetched().sort()).toEqual(["adapter_model.safetensors", "model.safetensors"]);
  });

  test.each([
    ["PEFT", { "adapter_config.json": "{}", "adapter_model.safetensors": "weights" }],
    ["mlx-lm", { "adapter_config.json": "{}", "adapters.safetensors": "weights" }],
    ["llama.cpp", { "pirate.gguf": "weights" }],
  ])("is an adapter of %s where one is wanted, and nothing is asked again for its commit", async (_, files) => {
    serve({ "README.md": "# Pirate", "model.safetensors": "merged", ...files });
    const snapshot = await download({ adapter: true });
    expect((await readdir(snapshot)).sort()).toEqual(Object.keys(files).sort());
    hub.asked.length = 0;
    expect(await download({ adapter: true, revision: COMMIT })).toBe(snapshot);
    expect(await download({ adapter: true, offline: true })).toBe(snapshot);
    expect(hub.asked).toEqual([]);
  });

  test("is no GGUF adapter where there are several, or where a model is wanted", async () => {
    serve({ "a-f16.gguf": "a", "a-f32.gguf": "b" });
    await expect(download({ adapter: true })).rejects.toThrow(
      new FormatError(
        "org/tiny: an adapter must be one GGUF file, got a-f16.gguf, a-f32.gguf. Download the one that you want and give its path",
      ),
    );
    await expect(download()).rejects.toThrow("org/tiny: model.safetensors must be among its files, got a-f16.gguf, a-");
  });

  test("is one blob where two files are the same, and an empty file", async () => {
    serve({ ...SMALLEST, "tokenizer_config.json": "{}", "vocab.txt": "" });
    const snapshot = await download();
    expect(await readFile(join(snapshot, "tokenizer_config.json"), "utf8")).toBe("{}");
    expect(await readFile(join(snapshot, "vocab.txt"), "utf8")).toBe("");
    expect((await readdir(storage("blobs"))).length).toBe(4);
  });

  test("is only what another revision did not bring", async () => {
    await download();
    const commit = "f".repeat(40);
    hub.asked.length = 0;
    hub.models.set(ID, {
      commit,
      refs: { main: commit },
      files: { ...SMALLEST, "config.json": "{}", "vocab.txt": "new" },
    });
    expect(await download()).toBe(storage("snapshots", commit));
    expect(fetched()).toEqual(["vocab.txt"]); // the new config is the tokenizer's twin
    expect(await readFile(storage("refs/main"), "utf8")).toBe(commit);
    expect((await readdir(storage("snapshots"))).length).toBe(2);
  });

  test("is told byte by byte", async () => {
    const seen: HubProgress[] = [];
    await download({ onProgress: (progress) => seen.push(progress) });
    const all = CONFIG.length + 2 + WEIGHTS.length;
    expect(seen.at(-1)).toEqual({
      file: "model.safetensors",
      fileDone: WEIGHTS.length,
      fileSize: WEIGHTS.length,
      done: all,
      size: all,
    });
    expect(seen.map(({ done }) => done)).toEqual(seen.map(({ done }) => done).sort((a, b) => a - b));
    expect(new Set(seen.map(({ file }) => file))).toEqual(new Set(Object.keys(SMALLEST)));
    await download({ onProgress: () => expect.unreachable("everything is in the cache") });
  });
});

describe("the environment", () => {
  const notCached = (at: string): FormatError =>
    new FormatError(
      `org/tiny: revision main must be in ${at} to be used offline, got nothing. Download it once without HF_HUB_OFFLINE`,
    );

  test("says where the cache is, HF_HUB_CACHE first", async () => {
    vi.stubEnv("HF_HUB_OFFLINE", "1");
    await expect(downloadModel(ID)).rejects.toThrow(notCached(join(home, ".cache/huggingface/hub")));
    vi.stubEnv("XDG_CACHE_HOME", join(home, "xdg"));
    await expect(downloadModel(ID)).rejects.toThrow(notCached(join(home, "xdg/huggingface/hub")));
    vi.stubEnv("HF_HOME", "~/hf");
    await expect(downloadModel(ID)).rejects.toThrow(notCached(join(home, "hf/hub")));
    vi.stubEnv("HF_HUB_CACHE", join(home, "hub"));
    await expect(downloadModel(ID)).rejects.toThrow(notCached(join(home, "hub")));
  });

  test("says where the Hub is and who asks; the token goes nowhere else", async () => {
    vi.stubEnv("HF_ENDPOINT", `${hub.url}/`);
    vi.stubEnv("HF_HOME", home);
    await writeFile(join(home, "token"), "saved-token\n");
    await downloadModel(ID);
    const tokens = (host: string): (string | undefined)[] => [
      ...new Set(hub.asked.filter((asked) => asked.host === host).map(({ authorization }) => authorization)),
    ];
    expect(tokens("hub")).toEqual(["Bearer saved-token"]);
    expect(tokens("store")).toEqual([undefined]);
    hub.asked.length = 0;
    vi.stubEnv("HF_TOKEN", "hf_environment");
    await downloadModel(ID);
    expect(tokens("hub")).toEqual(["Bearer hf_environment"]);
  });

  test("a next page elsewhere is read without the token", async () => {
    const link = `<${hub.store}/page>; rel="next"`;
    hub.fault = ({ host, path }) => {
      if (host === "store" && path === "/page") return { status: 200, body: "[]" };
      return path.includes("/tree/") ? { status: 200, body: "[]", headers: { link } } : undefined;
    };
    await expect(download({ token: "hf_mine" })).rejects.toThrow("model.safetensors must be among its files");
    expect(hub.asked.at(-1)).toMatchObject({ host: "store", path: "/page", authorization: undefined });
    expect(hub.asked.at(-2)?.authorization).toBe("Bearer hf_mine");
  });

  test.each([
    [
      "HF_ENDPOINT",
      "huggingface.co",
      "hub: HF_ENDPOINT must be an address such as https://huggingface.co, got huggingface.co",
    ],
    [
      "HF_TOKEN",
      "hf_se cret",
      "hub: HF_TOKEN must be printable and without spaces, got other characters. Copy it anew",
    ],
  ])("%s=%s is refused", async (name, value, message) => {
    vi.stubEnv(name, value);
    await expect(downloadModel(ID, { cacheDir })).rejects.toThrow(new FormatError(message));
  });
});

describe("without network", () => {
  test("a model that Python brought is used, by branch and by commit", async () => {
    await asPython(SMALLEST);
    await hub.close();
    expect(await download({ offline: true })).toBe(storage("snapshots", COMMIT));
    expect(await download({ offline: true, revision: COMMIT })).toBe(storage("snapshots", COMMIT));
    expect(await download({ revision: COMMIT })).toBe(storage("snapshots", COMMIT));
    hub = await startHub();
  });

  test("so is one that was downloaded here, and nothing is asked", async () => {
    await download({ revision: "refs/pr/1" });
    expect(await readFile(storage("refs/refs/pr/1"), "utf8")).toBe(COMMIT);
    hub.asked.length = 0;
    await download({ revision: "refs/pr/1", offline: true });
    await download({ revision: COMMIT });
    expect(hub.asked).toEqual([]);
  });

  test("so is an adapter", async () => {
    await asPython({ "adapter_config.json": "{}", "adapter_model.safetensors": "weights" });
    await download({ revision: COMMIT });
    expect(hub.asked).toEqual([]);
  });

  test("so is one without a tokenizer, once the Hub or Python has found that it has none", async () => {
    const files = { "config.json": CONFIG, "model.safetensors": WEIGHTS };
    serve(files);
    await download({ revision: COMMIT });
    expect(await readFile(storage(".no_exist", COMMIT, "tokenizer.json"), "utf8")).toBe("");
    await rm(cacheDir, { recursive: true });
    await asPython(files);
    await mkdir(storage(".no_exist", COMMIT), { recursive: true });
    await writeFile(storage(".no_exist", COMMIT, "tokenizer.json"), "");
    hub.asked.length = 0;
    expect(await download({ revision: COMMIT })).toBe(storage("snapshots", COMMIT));
    expect(hub.asked).toEqual([]);
  });

  test.each([
    ["without weights", { "config.json": CONFIG, "tokenizer.json": "{}" }],
    [
      "without a shard",
      {
        ...SMALLEST,
        "model.safetensors": undefined,
        "model.safetensors.index.json": '{"weight_map":{"a":"b.safetensors"}}',
      },
    ],
    ["without configuration", { ...SMALLEST, "config.json": undefined }],
  ])("one %s is a part, and is completed online", async (_, files) => {
    await asPython(JSON.parse(JSON.stringify({ ...files, "model.safetensors": undefined })));
    for (const revision of ["main", COMMIT])
      await expect(download({ offline: true, revision })).rejects.toThrow(
        new FormatError(
          `org/tiny: revision ${revision} must be in ${cacheDir} to be used offline, got a part of it. Download it once without HF_HUB_OFFLINE`,
        ),
      );
    const snapshot = await download({ revision: COMMIT });
    expect(await hashAt(join(snapshot, "model.safetensors"))).toBe(sha256(WEIGHTS));
  });

  test("what Python brought is not brought again", async () => {
    await asPython({ "config.json": CONFIG, "model.safetensors": WEIGHTS });
    await download({ revision: COMMIT });
    expect(fetched()).toEqual(["tokenizer.json"]);
    await download();
    expect(fetched()).toEqual(["tokenizer.json"]);
  });

  test("a server that is not there is tried four times", async () => {
    await hub.close();
    await expect(download()).rejects.toThrow(unreachable("ECONNREFUSED"));
    vi.stubEnv("HTTPS_PROXY", "http://proxy.example");
    await expect(download()).rejects.toThrow(
      new FormatError(
        `${unreachable("ECONNREFUSED").message}. HTTPS_PROXY counts only with NODE_USE_ENV_PROXY=1, in Node 24 and later`,
      ),
    );
    hub = await startHub();
  });
});

describe("a connection that breaks", () => {
  const ranges = (host: string): (string | undefined)[] =>
    hub.asked.filter((asked) => asked.host === host && !asked.path.startsWith("/api")).map(({ range }) => range);

  test("is taken up where it broke, as often as it brings more", async () => {
    const cuts = [1000, 2000, 3000, 4000, 5000].map((cutAfter): Fault => ({ cutAfter }));
    failing(/^store/, ...cuts);
    const snapshot = await download();
    expect(ranges("store")).toEqual([
      undefined,
      "bytes=1000-",
      "bytes=3000-",
      "bytes=6000-",
      "bytes=10000-",
      "bytes=15000-",
    ]);
    expect(await hashAt(join(snapshot, "model.safetensors"))).toBe(sha256(WEIGHTS));
  });

  test("for good leaves what came, and the next download goes on from there", async () => {
    failing(/^store/, { cutAfter: 70_000 }, ...Array.from({ length: 3 }, () => ({ status: 503 })));
    await expect(download()).rejects.toThrow(unreachable("status 503"));
    expect(await hashAt(`${blob("model.safetensors", WEIGHTS)}.incomplete`)).toBe(sha256(WEIGHTS.subarray(0, 70_000)));
    expect(existsSync(storage("refs"))).toBe(false);
    hub.asked.length = 0;
    const seen: HubProgress[] = [];
    const snapshot = await download({ onProgress: (progress) => seen.push(progress) });
    expect(ranges("store")).toEqual(["bytes=70000-"]);
    expect(seen[0]).toMatchObject({ fileDone: 70_000, done: 70_000 });
    expect(await hashAt(join(snapshot, "model.safetensors"))).toBe(sha256(WEIGHTS));
    expect((await readdir(storage("blobs"))).sort()).toEqual(
      Object.entries(SMALLEST)
        .map((file) => blobName(...file))
        .sort(),
    );
  });

  test("begins anew where the server knows no ranges", async () => {
    failing(/^store/, { cutAfter: 70_000 }, { noRange: true });
    const snapshot = await download();
    expect(ranges("store")).toEqual([undefined, "bytes=70000-"]);
    expect(await hashAt(join(snapshot, "model.safetensors"))).toBe(sha256(WEIGHTS));
  });

  test("is not taken up with other bytes than were asked for", async () => {
    const wrong = { status: 206, headers: { "content-range": "bytes 7-9/10" }, body: "abc" };
    failing(/^store/, { cutAfter: 1000 }, wrong);
    const snapshot = await download();
    expect(ranges("store")).toEqual([undefined, "bytes=1000-", "bytes=1000-"]);
    expect(await hashAt(join(snapshot, "model.safetensors"))).toBe(sha256(WEIGHTS));
  });

  test("of a question is asked again, and so is an error of the server", async () => {
    failing(/^hub\/api/, { status: 500 }, { status: 429 }, { status: 503 }, {}, { status: 502 });
    await download();
    expect(hub.asked.filter(({ path }) => path.startsWith("/api")).length).toBe(6);
    serve(SMALLEST, "org/other");
    failing(/^hub/, ...Array.from({ length: 4 }, () => ({ status: 500 })));
    await expect(download()).rejects.toThrow(unreachable("status 500"));
  });

  test("an address in the store that has expired is asked for anew", async () => {
    failing(/^store/, { status: 403 });
    await download();
    expect(fetched().filter((path) => path === "model.safetensors").length).toBe(2);
  });

  test("an abort ends it at once with its reason, keeps what came and frees the lock", async () => {
    const stop = new AbortController();
    const reason = new Error("enough");
    failing(/^store/, { cutAfter: 5000 });
    const onProgress = ({ done }: HubProgress): void => {
      if (done > 1000) stop.abort(reason);
    };
    await expect(download({ signal: stop.signal, onProgress })).rejects.toBe(reason);
    expect((await readFile(`${blob("model.safetensors", WEIGHTS)}.incomplete`)).length).toBeGreaterThan(1000);
    expect(await readdir(join(cacheDir, ".locks/models--org--tiny"))).toEqual([]);
    hub.asked.length = 0;
    await expect(download({ signal: stop.signal })).rejects.toBe(reason);
    expect(hub.asked).toEqual([]);
  });
});

describe("what does not fit its hash", () => {
  test.each([
    [
      "model.safetensors",
      /^store/,
      { body: new Uint8Array(WEIGHTS.length) },
      sha256(WEIGHTS),
      sha256(new Uint8Array(WEIGHTS.length)),
    ],
    [
      "config.json",
      /resolve.*config\.json/,
      { body: '{"model_type":"gemma"}' },
      gitHash(CONFIG),
      gitHash('{"model_type":"gemma"}'),
    ],
  ])("%s is deleted and said, and the next download is right", async (path, pattern, fault, wanted, found) => {
    failing(pattern, fault);
    await expect(download()).rejects.toThrow(
      new FormatError(
        `org/tiny: ${path} must have the hash ${wanted}, got ${found}. What arrived was deleted: try again`,
      ),
    );
    expect(existsSync(storage("blobs", wanted))).toBe(false);
    expect(existsSync(storage("blobs", `${wanted}.incomplete`))).toBe(false);
    expect(existsSync(storage("snapshots", COMMIT, path))).toBe(false);
    await download();
    expect(existsSync(storage("snapshots", COMMIT, path))).toBe(true);
  });

  test("a file that is longer than listed is not read on", async () => {
    failing(/resolve.*config\.json/, { status: 200, body: new Uint8Array(2e7) });
    let most = 0;
    const onProgress = ({ done }: HubProgress): void => {
      most = Math.max(most, done);
    };
    await expect(download({ onProgress })).rejects.toThrow(`config.json must have the hash ${gitHash(CONFIG)}, got`);
    expect(most).toBeLessThan(1e7);
  });

  test("a damaged rest of an earlier download is deleted", async () => {
    await mkdir(storage("blobs"), { recursive: true });
    const partial = `${blob("model.safetensors", WEIGHTS)}.incomplete`;
    for (const size of [1000, WEIGHTS.length, WEIGHTS.length + 1]) {
      await writeFile(partial, new Uint8Array(size));
      await expect(download()).rejects.toThrow("What arrived was deleted: try again");
      expect(existsSync(partial)).toBe(false);
    }
    await download();
  });
});

describe("a refusal says what to do", () => {
  const REFUSALS: [what: string, fault: Fault, options: HubOptions, message: string][] = [
    [
      "no such model",
      { status: 404, headers: { "x-error-code": "RepoNotFound" } },
      { token: "hf_mine" },
      "must be a model on HUB, got 404. Check the name: there is no such model, or the token that is set may not read it",
    ],
    [
      "a private model, or none",
      { status: 401 },
      {},
      "must be a model on HUB, got 401. Check the name: there is no such model, or it is private. Set HF_TOKEN to a token that may read it",
    ],
    [
      "a gated model, unknown",
      { status: 401, headers: { "x-error-code": "GatedRepo" } },
      {},
      "must be open to you, got 401: it is gated or private. Ask for access on HUB/org/tiny, and set HF_TOKEN to a token of that account",
    ],
    [
      "a gated model, known",
      { status: 403, headers: { "x-error-code": "GatedRepo" } },
      { token: "hf_mine" },
      "must be open to you, got 403: it is gated or private. Ask for access on HUB/org/tiny, and set HF_TOKEN to a token of that account",
    ],
    [
      "no such revision",
      { status: 404, headers: { "x-error-code": "RevisionNotFound" } },
      { revision: "v9" },
      "the revision must be a branch, a tag or a full commit, got v9. See HUB/org/tiny/commits/main",
    ],
    ["another status", { status: 418 }, {}, "HUB must give the model, got status 418"],
  ];
  test.each(REFUSALS)("%s", async (_, fault, options, message) => {
    const all = `org/tiny: ${message}`.replaceAll("HUB", hub.url);
    for (const question of [/revision/, /resolve/]) {
      if (options.revision && `${question}`.includes("resolve")) continue;
      failing(question, fault, fault, fault, fault);
      await expect(download(options)).rejects.toThrow(new FormatError(all));
    }
  });

  test("the real answers for a name and a revision that are not there", async () => {
    await expect(downloadModel("org/none", { cacheDir, endpoint: hub.url })).rejects.toThrow(
      new FormatError(
        `org/none: must be a model on ${hub.url}, got 404. Check the name: there is no such model, or it is private. Set HF_TOKEN to a token that may read it`,
      ),
    );
    for (const revision of ["v9", "a".repeat(40)])
      await expect(download({ revision })).rejects.toThrow(
        new FormatError(
          `org/tiny: the revision must be a branch, a tag or a full commit, got ${revision}. See ${hub.url}/org/tiny/commits/main`,
        ),
      );
  });

  test.each([
    "tiny",
    "a/b/c",
    "../x",
    "org/..",
    "org/a--b",
    "org/a.git",
    "org/",
    "org/a b",
    "-o/a",
    `org/${"a".repeat(93)}`,
  ])("%s is no id", async (id) => {
    expect(isModelId(id)).toBe(false);
    await expect(downloadModel(id)).rejects.toThrow(
      new FormatError(`hub: a model's id must be org/name, got ${JSON.stringify(id)}. Copy it from the model's page`),
    );
  });

  test.each(["HuggingFaceTB/SmolLM2-135M", "a/b", "org_1/x.y-z_", "o.r-g/1"])("%s is one", (id) => {
    expect(isModelId(id)).toBe(true);
  });

  test.each(["../x", "a//b", "", "C:\\x", "a/."])("%j is no revision", async (revision) => {
    await expect(download({ revision })).rejects.toThrow(
      new FormatError(
        `org/tiny: the revision must be a branch, a tag or a full commit, got ${JSON.stringify(revision)}`,
      ),
    );
  });

  test("a server that is no Hub", async () => {
    hub.fault = () => ({ status: 200, body: "<html>" });
    await expect(download()).rejects.toThrow(`${hub.url}: must answer as the Hugging Face Hub does, got SyntaxError: `);
    hub.fault = () => ({ status: 200, body: '{"sha":"../../x"}' });
    await expect(download()).rejects.toThrow(new FormatError('org/tiny: the Hub must name a commit, got "../../x"'));
  });

  test("a full disk, and a cache that cannot be written", async () => {
    await mkdir(storage("blobs"), { recursive: true });
    await symlink("/dev/full", `${blob("model.safetensors", WEIGHTS)}.incomplete`);
    await expect(download()).rejects.toThrow(
      new FormatError(
        `${blob("model.safetensors", WEIGHTS)}.incomplete: must be a file that can be written, got ENOSPC (the disk is full). Free some space, or choose another path`,
      ),
    );
    await writeFile(join(home, "file"), "");
    await expect(download({ cacheDir: join(home, "file") })).rejects.toThrow(
      new FormatError(
        `${join(home, "file/models--org--tiny/blobs")}: must be a directory that can be written, got ENOTDIR (a part of the path is a file). Choose another path`,
      ),
    );
  });

  test("no safetensors, or not all shards", async () => {
    serve({ "config.json": CONFIG, "pytorch_model.bin": "pickle" });
    const wayOut = "Choose a model that has all its weights as safetensors";
    await expect(download()).rejects.toThrow(
      new FormatError(
        `org/tiny: model.safetensors must be among its files, got config.json, pytorch_model.bin. ${wayOut}`,
      ),
    );
    serve({ "adapter_config.json": "{}", "adapter_model.bin": "pickle" });
    await expect(download()).rejects.toThrow(
      new FormatError(
        `org/tiny: adapter_model.safetensors must be among its files, got adapter_config.json, adapter_model.bin. ${wayOut}`,
      ),
    );
    serve({ "model.safetensors.index.json": '{"weight_map":{"a":"../../../x.safetensors"}}' });
    await expect(download()).rejects.toThrow(
      new FormatError(
        `org/tiny: ../../../x.safetensors must be among its files, got model.safetensors.index.json. ${wayOut}`,
      ),
    );
  });

  test("names that could lead elsewhere, which are not among the files", async () => {
    const odd = ["../x", "/etc/passwd", "a/../../x", "C:\\x", "a\\..\\x", "logs/12:30/events"];
    serve({ ...SMALLEST, ...Object.fromEntries(odd.map((path) => [path, "odd"])) });
    const place = await download();
    expect((await readdir(place, { recursive: true })).sort()).toEqual(Object.keys(SMALLEST).sort());
    expect(hub.asked.filter(({ path }) => /passwd|events|x$/.test(path))).toEqual([]);
  });

  test.each([
    { oid: "../../x", size: 1 },
    { oid: COMMIT, size: -1 },
    { oid: COMMIT, size: "many" },
  ])("a listing with %j", async (entry) => {
    failing(/tree/, { status: 200, body: JSON.stringify([{ type: "file", path: "config.json", ...entry }]) });
    await expect(download()).rejects.toThrow(
      new FormatError(`org/tiny: config.json must be listed with hash and size, got ${JSON.stringify(entry)}`),
    );
  });
});

describe("two at once", () => {
  test("in one process fetch each file once", async () => {
    const [one, two] = await Promise.all([download(), download()]);
    expect(one).toBe(two);
    expect(fetched().sort()).toEqual(Object.keys(SMALLEST).sort());
  });

  test("in two processes fetch each file once", async () => {
    const entry = JSON.stringify(new URL("../../src/hub.ts", import.meta.url).href);
    const options = JSON.stringify({ cacheDir, endpoint: hub.url });
    const script = `const { downloadModel } = await import(${entry}); console.log(await downloadModel("${ID}", ${options}));`;
    const run = async (): Promise<string> => {
      const child = spawn(process.execPath, ["--import", "tsx", "--input-type=module", "-e", script]);
      let output = "";
      for (const stream of [child.stdout, child.stderr]) stream.on("data", (text) => (output += text));
      await new Promise((resolve) => child.on("close", resolve));
      return output.trim();
    };
    expect(await Promise.all([run(), run()])).toEqual([storage("snapshots", COMMIT), storage("snapshots", COMMIT)]);
    expect(fetched().sort()).toEqual(Object.keys(SMALLEST).sort());
    expect(await hashAt(storage("snapshots", COMMIT, "model.safetensors"))).toBe(sha256(WEIGHTS));
  });
});
