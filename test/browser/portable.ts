// Models and checkpoints kept in the browser, and a chat in a worker, in Chromium alone: npm run browser:chrome. The Hub is on this machine; see host.ts.
import {
  type CacheProgress,
  cachedDirectory,
  clearCached,
  type HubDirectoryOptions,
  hubDirectory,
  listCached,
  listCheckpoints,
  newestCheckpoint,
  removeCheckpoints,
  writeCheckpoint,
} from "../../src/browser.ts";
import {
  attachLora,
  checkpointContent,
  type Directory,
  type Gpu,
  httpDirectory,
  loadModel,
  memoryDirectory,
  openGpu,
  readAll,
  readCheckpoint,
  type SavedCheckpoint,
  tensor,
  train,
} from "../../src/index.ts";
import type { ByteSource } from "../../src/io/bytes.ts";
import { CHAT, checkChat, startChat } from "./chat.ts";

declare global {
  var startHub: () => Promise<string>;
  var breakAfter: (requests: number, bytes: number) => Promise<void>;
  var damage: () => Promise<void>;
  var mend: () => Promise<void>;
  var askedRanges: () => Promise<(string | undefined)[]>;
  var closeHub: () => Promise<void>;
  var setQuota: (bytes: number) => Promise<void>;
}

const ID = "org/stories";
const COMMIT = "0123456789abcdef0123456789abcdef01234567";
const PIECE = 200_000;
const WEIGHTS = "model.safetensors";

const checks: string[] = [];
function check(what: string, found: unknown, wanted: unknown): void {
  const [a, b] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (a !== b) throw new Error(`${what}: must be ${b}, got ${a}`);
  checks.push(what);
}

async function message(action: () => Promise<unknown>): Promise<string> {
  try {
    await action();
    return "no error";
  } catch (error) {
    return (error as Error).message;
  }
}

async function logitsOf(gpu: Gpu, directory: Directory): Promise<number[]> {
  const model = await loadModel(gpu, directory);
  const output = gpu.scope(() => model.logits(tensor(gpu, Int32Array.of(1, 403, 407, 261, 378), [1, 5])));
  const [logits = new Float32Array()] = await readAll([output]);
  gpu.release(output);
  model.destroy();
  return [...logits];
}

async function run(): Promise<void> {
  const gpu = await openGpu();
  const files = await Promise.all(
    ["config.json", WEIGHTS].map(
      async (file) => [file, await globalThis.readRepoFile(`/shared/models/stories260K/${file}`)] as const,
    ),
  );
  const size = files[1]?.[1].length ?? 0;
  const pieces = Math.ceil(size / PIECE);
  const wanted = await logitsOf(gpu, memoryDirectory("memory", Object.fromEntries(files)));
  const endpoint = await globalThis.startHub();
  const name = `${endpoint}/${ID}/resolve/${COMMIT}`;
  const open = (options: HubDirectoryOptions = {}): Promise<Directory> =>
    hubDirectory(ID, { endpoint, pieceBytes: PIECE, ...options });

  await checkChat(gpu, check);
  await checkRuns(gpu, files);

  await globalThis.setQuota(1_000_000);
  check(
    "a model that is larger than the room is refused before it comes",
    (await message(async () => logitsOf(gpu, await open()))).replace(/got \d+/, "got N"),
    `${name}/${WEIGHTS}: ${size} bytes of room must be left in the browser's storage of this site, got N. Remove other models (listCached, clearCached), free some space on the disk, or leave the private window`,
  );
  check("and nothing of it was asked for", await globalThis.askedRanges(), []);
  await globalThis.setQuota(1e9);

  await globalThis.breakAfter(3, 1000);
  check(
    "a download that breaks for good says so",
    await message(async () => logitsOf(gpu, await open())),
    `${ID}: ${endpoint} must be reachable, got status 503 after 3 retries. Check the network and load again: it goes on where it stopped`,
  );
  await globalThis.mend();
  await globalThis.askedRanges();
  const seen: CacheProgress[] = [];
  const directory = await open({ onProgress: (progress) => seen.push(progress) });
  check("the model that came in two parts has the logits", await logitsOf(gpu, directory), wanted);
  check("only what was missing came", (await globalThis.askedRanges()).length, pieces - 3);
  const ofWeights = seen.filter(({ file }) => file === WEIGHTS);
  check("progress begins with what was there", ofWeights[0], { file: WEIGHTS, done: 3 * PIECE, size });
  check("progress ends with all", ofWeights.at(-1), { file: WEIGHTS, done: size, size });

  const inWorker = await fromWorker({ endpoint, wanted: WEIGHTS });
  check("a worker reads the same bytes", inWorker, await digest(files[1]?.[1] ?? new Uint8Array()));
  check("and asks for none", await globalThis.askedRanges(), []);

  await clearCached(name);
  check(
    "what is cleared is gone",
    (await listCached()).map((cached) => cached.name),
    [],
  );
  const both = [fromWorker({ endpoint, wanted: WEIGHTS }), (await open()).open(WEIGHTS)] as const;
  const [theirs, ours] = await Promise.all(both);
  check("a window and a worker at once get the same", theirs, await digest(await wholeOf(ours)));
  check("by one download", (await globalThis.askedRanges()).length, pieces);
  check("whose size is listed", ((await listCached())[0]?.sizeBytes ?? 0) > size, true);

  await clearCached();
  await globalThis.damage();
  const zeros = await digest(new Uint8Array(size));
  check(
    "other bytes than those of the hash are refused",
    await message(async () => logitsOf(gpu, await open())),
    `${name}/${WEIGHTS}: must have the hash ${await digest(files[1]?.[1] ?? new Uint8Array())}, got ${zeros}. What arrived was deleted: try again`,
  );
  await globalThis.mend();
  const stop = new AbortController();
  const aborted = await open({
    signal: stop.signal,
    onProgress: ({ done }) => done > 0 && stop.abort(new Error("enough")),
  });
  check("an abort throws its reason", await message(() => logitsOf(gpu, aborted)), "enough");
  check("and the next load goes on", await logitsOf(gpu, await open()), wanted);

  const plain = (): Directory =>
    cachedDirectory(httpDirectory(`${endpoint}/${ID}/resolve/main`), { pieceBytes: PIECE });
  check("so does any server with ranges", await logitsOf(gpu, plain()), wanted);
  check("which lacks a file", await plain().open("model.safetensors.index.json"), undefined);

  await globalThis.closeHub();
  check("without a server the branch is what it was", await logitsOf(gpu, await open()), wanted);
  check("and so is the commit", await logitsOf(gpu, await open({ revision: COMMIT })), wanted);
  check("and the other directory", await logitsOf(gpu, plain()), wanted);
  check("with what it lacks", await plain().open("model.safetensors.index.json"), undefined);
  check(
    "what was never loaded is missed",
    (await message(() => plain().open("tokenizer.json"))).replace(/got .*\./, "got WHY."),
    `${endpoint}/${ID}/resolve/main/tokenizer.json: must be reachable, got WHY. Check the address and the network`,
  );
  const gone = await (await open()).open(WEIGHTS);
  await clearCached();
  check(
    "a file that is cleared while it is read says so",
    (await message(async () => gone?.read(0, 100))).replace(/got .*\./, "got WHY."),
    `${name}/${WEIGHTS}: must stay in the browser's cache while it is read, got WHY. Load it again`,
  );
}

const wholeOf = async (source: ByteSource | undefined): Promise<Uint8Array> =>
  (await source?.read(0, source.sizeBytes)) ?? new Uint8Array();

async function digest(bytes: Uint8Array): Promise<string> {
  const hash = await crypto.subtle.digest("SHA-256", bytes as Uint8Array<ArrayBuffer>);
  return Array.from(new Uint8Array(hash), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

type ModelFiles = readonly (readonly [name: string, bytes: Uint8Array])[];

const RUN = "a run";
const STEPS = 6;

interface Stretch {
  readonly from?: SavedCheckpoint;
  readonly until?: number;
  readonly saveEvery?: number;
}

/** Trains a fresh adapter of the model from a checkpoint on, up to a step, with dropout and shuffled rows: losses and the adapter's hash. */
async function trained(gpu: Gpu, files: ModelFiles, { from, until = STEPS, saveEvery }: Stretch): Promise<unknown> {
  const model = await loadModel(gpu, memoryDirectory("memory", Object.fromEntries(files)));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj", "v_proj"], dropout: 0.2 }, 1);
  const rows = Array.from({ length: 5 }, (_row, i) => {
    const inputIds = Array.from({ length: 3 + i }, (_id, t) => 3 + ((7 * i + 5 * t) % 60));
    return { inputIds, labels: inputIds };
  });
  const stop = new AbortController();
  const losses: number[] = [];
  for await (const { step, loss } of train({
    ...{ model, adapter, parameters: adapter.parameters, rows, batchSize: 2, seed: 3, shuffleSeed: 4, readEvery: 1 },
    ...{ steps: STEPS, learningRate: 1e-2, warmupSteps: 2 },
    from: from?.state,
    signal: stop.signal,
    checkpoint: {
      every: saveEvery,
      save: (state) => writeCheckpoint(RUN, checkpointContent(adapter, ID, state, { settings: { r: 2 }, madeBy: {} })),
    },
  })) {
    losses.push(loss);
    if (step === until) stop.abort();
  }
  const values = await readAll(adapter.parameters);
  adapter.detach();
  model.destroy();
  return [losses, ...(await Promise.all(values.map(({ buffer }) => digest(new Uint8Array(buffer)))))];
}

async function newest(warnings: string[] = []): Promise<SavedCheckpoint> {
  return readCheckpoint(await newestCheckpoint(RUN, (warning) => warnings.push(warning)));
}

/** Runs that are stopped and go on from OPFS, in a window and in a worker. */
async function checkRuns(gpu: Gpu, files: ModelFiles): Promise<void> {
  const rest = ([losses, ...hashes]: [number[], ...string[]], step: number): unknown => [losses.slice(step), ...hashes];
  const whole = (await trained(gpu, files, {})) as [number[], ...string[]];
  check("a run that is not stopped keeps nothing", await listCheckpoints(), []);
  await trained(gpu, files, { until: 2 });
  const saved = await newest();
  check("a run that is stopped keeps where it was", [saved.step, saved.settings], [2, { r: 2 }]);
  check("and goes on from there bit for bit", await trained(gpu, files, { from: saved }), rest(whole, 2));
  check("as it does in a worker", await fromWorker({ files }), rest(whole, 2));
  check("whose last checkpoint is the newest", (await newest()).step, STEPS);

  const warnings: string[] = [];
  let folder = await navigator.storage.getDirectory();
  for (const name of ["lowrank", "runs", encodeURIComponent(RUN), "slot-0"])
    folder = await folder.getDirectoryHandle(name);
  const stream = await (await folder.getFileHandle("training.safetensors")).createWritable({ keepExistingData: true });
  await stream.write({ type: "write", position: 1000, data: "damage" });
  await stream.close();
  const before = await newest(warnings);
  check(
    "a newest one that is damaged is left out",
    [before.step, warnings],
    [5, [`${RUN}/slot-0/training.safetensors: must have the SHA-256 of its manifest, got another`]],
  );
  check("and the run goes on from the other", await trained(gpu, files, { from: before }), rest(whole, 5));
  await removeCheckpoints(RUN);
  check("what is removed is gone", await listCheckpoints(), []);
}

/** A file whose hash is wanted, or a run to go on with. */
type WorkerTask = { readonly endpoint: string; readonly wanted: string } | { readonly files: ModelFiles };

/** What a worker, of this same script, has found. */
const fromWorker = (task: WorkerTask): Promise<unknown> =>
  new Promise((resolve, reject) => {
    const worker = new Worker("/.script.js", { type: "module" });
    worker.onmessage = ({ data }: MessageEvent<{ readonly found?: unknown; readonly error?: string }>) => {
      worker.terminate();
      if (data.error === undefined) resolve(data.found);
      else reject(new Error(data.error));
    };
    worker.postMessage(task);
  });

async function work(task: WorkerTask): Promise<unknown> {
  if ("files" in task) {
    if (!("createSyncAccessHandle" in FileSystemFileHandle.prototype)) throw new Error("no access handles in a worker");
    return trained(await openGpu(), task.files, { from: await newest(), saveEvery: 1 });
  }
  const directory = await hubDirectory(ID, { endpoint: task.endpoint, pieceBytes: PIECE });
  return digest(await wholeOf(await directory.open(task.wanted)));
}

if (globalThis.document === undefined && self.name === CHAT) startChat();
else if (globalThis.document === undefined)
  globalThis.onmessage = ({ data }: MessageEvent<WorkerTask>) =>
    work(data).then(
      (found) => globalThis.postMessage({ found }),
      (error: Error) => globalThis.postMessage({ error: String(error.stack) }),
    );
else
  await run().then(
    () => globalThis.finish(JSON.stringify({ ok: true, checks })),
    (error: Error) =>
      globalThis.finish(JSON.stringify({ ok: false, error: error.message, checks, stack: error.stack })),
  );
