// Models kept in the browser, in Chromium alone: npm run browser:chrome. The Hub is on this machine; see host.ts.
import {
  type CacheProgress,
  cachedDirectory,
  clearCached,
  type HubDirectoryOptions,
  hubDirectory,
  listCached,
} from "../../src/browser.ts";
import {
  type Directory,
  type Gpu,
  httpDirectory,
  loadModel,
  memoryDirectory,
  openGpu,
  readAll,
  tensor,
} from "../../src/index.ts";
import type { ByteSource } from "../../src/io/bytes.ts";

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

interface WorkerTask {
  readonly endpoint: string;
  readonly wanted: string;
}

/** The hash of a file that a worker, of this same script, opened. */
const fromWorker = (task: WorkerTask): Promise<string> =>
  new Promise((resolve) => {
    const worker = new Worker("/.script.js", { type: "module" });
    worker.onmessage = ({ data }) => {
      worker.terminate();
      resolve(String(data));
    };
    worker.postMessage(task);
  });

if (globalThis.document === undefined)
  globalThis.onmessage = async ({ data }: MessageEvent<WorkerTask>) => {
    const { endpoint, wanted } = data;
    const directory = await hubDirectory(ID, { endpoint, pieceBytes: PIECE });
    globalThis.postMessage(await digest(await wholeOf(await directory.open(wanted))));
  };
else
  await run().then(
    () => globalThis.finish(JSON.stringify({ ok: true, checks })),
    (error: Error) =>
      globalThis.finish(JSON.stringify({ ok: false, error: error.message, checks, stack: error.stack })),
  );
