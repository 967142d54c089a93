/** Models of the Hugging Face Hub, kept in the cache of Python's `huggingface_hub`. For Node and Deno. */
import { createHash } from "node:crypto";
import { constants, createReadStream, existsSync, readdirSync, readFileSync } from "node:fs";
import { copyFile, link, open, rename, rm, symlink } from "node:fs/promises";
import { homedir } from "node:os";
import { dirname, join, relative, resolve } from "node:path";
import { FormatError } from "./errors.ts";
import { diskDirectory, ensureWritableDirectory, onDisk, writeFileAtomic } from "./files.ts";
import {
  COMMIT,
  checkModel,
  currentCommit,
  type HubFile,
  type HubModel,
  type HubWords,
  listModel,
  openFile,
  persist,
} from "./hub-client.ts";
import { excerpt, isObject, readJson } from "./json.ts";
import { withLock } from "./lock.ts";

export interface HubOptions {
  /** A branch, a tag or a full commit; "main" unless given. */
  readonly revision?: string | undefined;
  /** HF_HUB_CACHE unless given, else HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub or ~/.cache/huggingface/hub. */
  readonly cacheDir?: string | undefined;
  /** HF_ENDPOINT unless given, else https://huggingface.co. */
  readonly endpoint?: string | undefined;
  /** HF_TOKEN unless given, else what is in the file HF_TOKEN_PATH or HF_HOME/token. Sent to the endpoint alone. */
  readonly token?: string | undefined;
  /** Use nothing but the cache: unless given, where HF_HUB_OFFLINE is 1. */
  readonly offline?: boolean | undefined;
  /** Whether the weights are wanted too: true unless given. */
  readonly weights?: boolean | undefined;
  /** An adapter is wanted, which may be one of mlx-lm or a GGUF file too; without it, a model or an adapter of PEFT. */
  readonly adapter?: boolean | undefined;
  /** Called as bytes arrive; not at all where everything is in the cache. */
  readonly onProgress?: ((progress: HubProgress) => void) | undefined;
  /** Ends the download by throwing its reason; what has arrived is kept. */
  readonly signal?: AbortSignal | undefined;
}

/** Bytes that are on this disk and that there will be: of one file, and of all known so far (an index names more). */
export interface HubProgress {
  readonly file: string;
  readonly fileDone: number;
  readonly fileSize: number;
  readonly done: number;
  readonly size: number;
}

interface Snapshot extends HubModel, Pick<HubOptions, "onProgress"> {
  readonly offline: boolean;
  readonly weights: boolean;
  readonly adapter: boolean;
  readonly cacheDir: string;
  /** `models--org--name`, the model's directory in the cache. */
  readonly folder: string;
}

/** All but the weights that a model or an adapter is read from. */
const SMALL =
  /^((adapter_|generation_)?config|(adapter_)?model\.safetensors\.index|tokenizer(_config)?|special_tokens_map|added_tokens|vocab|chat_template)\.json$|^(merges|vocab)\.txt$|^(tokenizer|spiece)\.model$|^chat_template\.jinja$/;
const ADAPTERS = ["adapter_model.safetensors", "adapters.safetensors"];
const TOKENIZER = "tokenizer.json";
const AT_ONCE = 4;
const WORDS: HubWords = {
  token: "HF_TOKEN",
  endpoint: "HF_ENDPOINT",
  again: "go on with the same command, or set HF_HUB_OFFLINE=1 to use the cache alone",
};

const PROXIED: HubWords = {
  ...WORDS,
  again: `${WORDS.again}. HTTPS_PROXY counts only with NODE_USE_ENV_PROXY=1, in Node 24 and later`,
};
const isProxied = (): boolean =>
  process.env.NODE_USE_ENV_PROXY !== "1" && ["HTTPS_PROXY", "https_proxy"].some((name) => process.env[name]);

/**
 * Downloads what the cache lacks of a model or an adapter and returns the directory of the snapshot, for `diskDirectory`:
 * configuration, tokenizer, chat template and safetensors, no other format but an adapter's single GGUF file.
 *
 * The cache is that of Python's `huggingface_hub`: either finds what the other brought. A full commit that is there with its
 * tokenizer, or known to have none, is used without network. A broken download goes on where it stopped; every file is checked against the hash that
 * the Hub lists. Throws FormatError with a way out: no such model, revision, access, network or space, a wrong hash.
 */
export async function downloadModel(id: string, options: HubOptions = {}): Promise<string> {
  const model = settle(id, options);
  const { revision, offline, cacheDir, folder } = model;
  const ref = join(cacheDir, folder, "refs", revision);
  const saved = textOf(ref);
  const commit = COMMIT.test(revision) ? revision : offline ? saved : await currentCommit(model);
  const snapshot = join(cacheDir, folder, "snapshots", commit);
  if ((offline || commit === revision) && COMMIT.test(commit) && (await isWhole(model, commit, snapshot)))
    return snapshot;
  if (offline)
    throw new FormatError(
      `${id}: revision ${revision} must be in ${cacheDir} to be used offline, got ${existsSync(snapshot) && commit ? "a part of it" : "nothing"}. Download it once without HF_HUB_OFFLINE`,
    );
  await complete(model, commit, snapshot);
  if (commit !== revision && commit !== saved) {
    await ensureWritableDirectory(dirname(ref));
    await writeFileAtomic(ref, commit);
  }
  return snapshot;
}

/** The options with what the environment says in place of those not given. Throws FormatError on what cannot be. */
function settle(id: string, options: HubOptions): Snapshot {
  const { env } = process;
  const inHome = (path: string): string => path.replace(/^~(?=\/|$)/, homedir());
  const home = inHome(env.HF_HOME || join(env.XDG_CACHE_HOME || join(homedir(), ".cache"), "huggingface"));
  const { revision = "main", weights = true, adapter = false, onProgress, signal } = options;
  const offline = options.offline ?? /^(1|on|yes|true)$/i.test(env.HF_HUB_OFFLINE ?? "");
  const cacheDir = resolve(options.cacheDir ?? inHome(env.HF_HUB_CACHE || join(home, "hub")));
  const endpoint = (options.endpoint ?? (env.HF_ENDPOINT || "https://huggingface.co")).replace(/\/+$/, "");
  const token = (options.token || env.HF_TOKEN)?.trim() || textOf(inHome(env.HF_TOKEN_PATH || join(home, "token")));
  const folder = `models--${id.replace("/", "--")}`;
  const model = { id, revision, endpoint, token, words: isProxied() ? PROXIED : WORDS, signal };
  checkModel(model);
  return { ...model, offline, weights, adapter, cacheDir, folder, onProgress };
}

/** A line that was saved; empty where there is none. */
function textOf(path: string): string {
  try {
    return readFileSync(path, "utf8").trim();
  } catch {
    return "";
  }
}

/** Whether all is there that one can know to be wanted without the Hub's listing. */
async function isWhole(model: Snapshot, commit: string, snapshot: string): Promise<boolean> {
  if (!existsSync(snapshot)) return false;
  const { weights, adapter, offline } = model;
  const names = new Set(readdirSync(snapshot));
  const needsTokenizer = !offline && !existsSync(join(absences(model, commit), TOKENIZER));
  const ofModel = ["config.json", ...(needsTokenizer ? [TOKENIZER] : [])];
  const rest = adapter || names.has("adapter_config.json") ? [] : ofModel;
  const wanted = weights ? [...rest, ...(await weightsOf(model, names, snapshot))] : rest;
  return wanted.every((name) => existsSync(join(snapshot, name)));
}

/** Where an empty file stands for each that is known not to be in the commit. */
const absences = ({ cacheDir, folder }: Snapshot, commit: string): string =>
  join(cacheDir, folder, ".no_exist", commit);

/**
 * The weights to look for, given the names that there are: the single safetensors, or the shards of the index in the snapshot; of an adapter
 * that has none, its GGUF files.
 */
async function weightsOf(
  { adapter }: Snapshot,
  names: ReadonlySet<string>,
  snapshot: string,
): Promise<readonly string[]> {
  const found = new Set<string>();
  for (const single of adapter ? ADAPTERS : ["model.safetensors", "adapter_model.safetensors"])
    if (names.has(single)) found.add(single);
    else if (names.has(`${single}.index.json`)) {
      const map = (await readJson(diskDirectory(snapshot), `${single}.index.json`))?.weight_map;
      if (isObject(map)) for (const shard of Object.values(map)) found.add(String(shard));
    }
  if (found.size > 0) return [...found];
  const ggufs = adapter ? [...names].filter((name) => /^[^/]+\.gguf$/.test(name)) : [];
  if (ggufs.length > 0) return ggufs;
  return [adapter || names.has("adapter_config.json") ? "adapter_model.safetensors" : "model.safetensors"];
}

/** Brings what the snapshot lacks: first the small files, among them the index that names the weights. */
async function complete(model: Snapshot, commit: string, snapshot: string): Promise<void> {
  const files = await listModel(model, commit);
  const arrived: Arrived = new Map();
  const bring = async (wanted: readonly HubFile[]): Promise<void> => {
    const lacking = wanted.filter(({ path }) => !existsSync(join(snapshot, path)));
    if (lacking.length === 0) return;
    const blobs = join(model.cacheDir, model.folder, "blobs");
    const locks = join(model.cacheDir, ".locks", model.folder);
    const parents = lacking.map(({ path }) => dirname(join(snapshot, path)));
    for (const directory of new Set([blobs, locks, ...parents])) await ensureWritableDirectory(directory);
    const fetchAll = (): Promise<void> => fetchBlobs(model, commit, blobs, lacking, arrived);
    await withLock(join(locks, "lowrank.lock"), fetchAll, model.signal);
    for (const { path, oid } of lacking) await placeLink(join(snapshot, path), join(blobs, oid));
  };
  await bring([...files.values()].filter(({ path }) => SMALL.test(path)));
  if (!files.has(TOKENIZER)) {
    await ensureWritableDirectory(absences(model, commit));
    await writeFileAtomic(join(absences(model, commit), TOKENIZER), "");
  }
  if (!model.weights) return;
  const weights = await weightsOf(model, new Set(files.keys()), snapshot);
  if (weights.length > 1 && weights.every((name) => name.endsWith(".gguf")))
    throw new FormatError(
      `${model.id}: an adapter must be one GGUF file, got ${excerpt(weights.join(", "))}. Download the one that you want and give its path`,
    );
  const demand = (name: string): HubFile => {
    const file = files.get(name);
    if (file) return file;
    throw new FormatError(
      `${model.id}: ${name} must be among its files, got ${excerpt([...files.keys()].join(", "))}. Choose ${model.adapter ? "an adapter" : "a model"} that has all its weights as safetensors`,
    );
  };
  await bring(weights.map(demand));
}

/** A relative symbolic link, there at once. Where there are none, another name of the blob, or on some disks a copy. */
const placeLink = (path: string, blob: string): Promise<void> =>
  onDisk(path, "must be a link that can be made", async () => {
    const temporary = `${path}.${crypto.randomUUID()}`;
    await symlink(relative(dirname(path), blob), temporary)
      .catch(() => link(blob, temporary))
      .catch(() => copyFile(blob, temporary));
    await rename(temporary, path);
  });

/** Blob → bytes of it that are here. */
type Arrived = Map<string, { fileDone: number; readonly fileSize: number }>;

/** Brings the blobs that are missing, a few at a time. The first failure ends all. */
async function fetchBlobs(
  model: Snapshot,
  commit: string,
  blobs: string,
  files: readonly HubFile[],
  arrived: Arrived,
): Promise<void> {
  const missing = files.filter(({ oid }) => !existsSync(join(blobs, oid)));
  for (const { oid, size } of missing) arrived.set(oid, { fileDone: 0, fileSize: size });
  const failed = new AbortController();
  const signal = model.signal ? AbortSignal.any([model.signal, failed.signal]) : failed.signal;
  const queue = new Map(missing.map((file) => [file.oid, file])).values();
  const work = async (): Promise<void> => {
    for (const file of queue)
      await fetchBlob({ ...model, signal }, commit, file, join(blobs, file.oid), (fileDone) => {
        arrived.set(file.oid, { fileDone, fileSize: file.size });
        const [done, size] = [...arrived.values()].reduce(([d, s], of) => [d + of.fileDone, s + of.fileSize], [0, 0]);
        model.onProgress?.({ file: file.path, fileDone, fileSize: file.size, done, size });
      });
  };
  await Promise.all(Array.from({ length: AT_ONCE }, () => work().catch((error) => failed.abort(error))));
  signal.throwIfAborted();
}

/**
 * Brings one blob, from where an earlier attempt stopped; the library's own downloads neither go on nor check. Bytes are written
 * at their own place in the file, so that two processes that do come to write the same one write the same.
 */
const fetchBlob = (
  model: HubModel,
  commit: string,
  { path, size, oid }: HubFile,
  blob: string,
  onBytes: (done: number) => void,
): Promise<void> =>
  onDisk(`${blob}.incomplete`, "must be a file that can be written", async () => {
    const partial = `${blob}.incomplete`;
    const file = await open(partial, constants.O_CREAT | constants.O_WRONLY);
    try {
      let { size: done } = await file.stat();
      onBytes(done);
      const goOn = async (): Promise<void> => {
        if (done >= size) return;
        const { start, bytes } = await openFile(model, commit, path, done);
        done = start;
        for await (const chunk of bytes) {
          for (let from = 0; from < chunk.byteLength; )
            from += (await file.write(chunk, from, chunk.byteLength - from, done + from)).bytesWritten;
          done += chunk.byteLength;
          onBytes(done);
          if (done > size) return;
        }
        if (done < size) throw new Error(`${done} of ${size} bytes`);
      };
      await persist(model, goOn, () => done);
      await file.sync();
    } finally {
      await file.close();
    }
    const found = await hashOf(partial, oid.length === 64, size);
    if (found !== oid) {
      await rm(partial, { force: true });
      throw new FormatError(
        `${model.id}: ${path} must have the hash ${oid}, got ${found}. What arrived was deleted: try again`,
      );
    }
    await rename(partial, blob);
  });

async function hashOf(path: string, isLfs: boolean, size: number): Promise<string> {
  const hash = isLfs ? createHash("sha256") : createHash("sha1").update(`blob ${size}\0`);
  for await (const piece of createReadStream(path, { highWaterMark: 2 ** 20 })) hash.update(piece as Uint8Array);
  return hash.digest("hex");
}
