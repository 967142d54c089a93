/** Directories of a server kept in the browser: each file comes once, in pieces, and stays in the origin private file system (OPFS). */
import { type ByteSource, blobSource, checkFileName, type Directory } from "./bytes.ts";
import { FormatError, UnreachableError } from "./errors.ts";
import { checkRoom, emptyFolder, type Folder, openStore, readFile, sizeIn, withRoom, writeFile } from "./opfs-store.ts";
import { Sha256 } from "./sha256.ts";

export interface CacheOptions {
  /** The folder of OPFS that has the cache; "lowrank" unless given. */
  readonly root?: string | undefined;
  /** Bytes of one request, and of one file of the cache: up to 64 MiB; 8 MiB unless given. Three are on their way at once. */
  readonly pieceBytes?: number | undefined;
  /** Called as pieces arrive; not at all where the file is in the cache. */
  readonly onProgress?: ((progress: CacheProgress) => void) | undefined;
  /** Ends a download by throwing its reason; the pieces that have arrived are kept. */
  readonly signal?: AbortSignal | undefined;
}

/** Bytes of a file that are in the cache, and that there will be. */
export interface CacheProgress {
  readonly file: string;
  readonly done: number;
  readonly size: number;
}

/** A directory in the cache and what it takes. */
export interface CachedDirectory {
  readonly name: string;
  readonly sizeBytes: number;
}

/** What is known of a file: kept beside its pieces, "0", "1" and so on, in `about.json`. */
interface About {
  readonly sizeBytes: number;
  readonly pieceBytes: number;
  readonly version: string;
  readonly isWhole: boolean;
}

/** Where a file is on its way from and to. */
interface Transfer {
  readonly name: string;
  readonly folder: Folder;
  readonly source: ByteSource;
  readonly pieceBytes: number;
  readonly signal: AbortSignal | undefined;
  readonly report: (done: number, size: number) => void;
}

const LIMIT_BYTES = 64 * 2 ** 20;
const PIECE_BYTES = 8 * 2 ** 20;
const AT_ONCE = 3;
const FILES = "files";
/** About a file that the server does not have. */
const ABSENT = "absent";

/**
 * The directory as it is on the server, by way of OPFS. `open` brings a file that the cache lacks, whole; its reads come from the cache then,
 * and the server is not asked again: a file that has changed there is seen after `clearCached`. A broken or aborted download goes on
 * with the pieces that are missing, unless the source's `version` or size has changed. A source's `sha256` is checked. Other tabs that want
 * the same directory wait. Works in a window and a Worker of a secure page (https or localhost), in every browser with WebGPU. When the disk is
 * full a browser may delete all that a site keeps, unless the page has called `navigator.storage.persist()`.
 *
 * Throws FormatError: no OPFS, no room for the file, a wrong hash, and what the directory itself throws.
 */
export function cachedDirectory(remote: Directory, options: CacheOptions = {}): Directory {
  const { root = "lowrank", pieceBytes = PIECE_BYTES, onProgress, signal } = options;
  if (!(Number.isInteger(pieceBytes) && pieceBytes >= 1 && pieceBytes <= LIMIT_BYTES))
    throw new FormatError(`cachedDirectory: pieceBytes must be 1 to ${LIMIT_BYTES}, got ${pieceBytes}`);
  return {
    name: remote.name,
    async open(file) {
      checkFileName(remote.name, file);
      const name = `${remote.name}/${file}`;
      const path = [root, FILES, remote.name, file];
      const kept = await openWhole(name, await openStore(path));
      if (kept) return kept;
      return locked(root, remote.name, signal, async () => {
        const folder = await openStore(path);
        const brought = await openWhole(name, folder); // by another tab
        if (brought) return brought;
        const source = await openRemote(remote, file, folder);
        if (!source) return undefined;
        const report = (done: number, size: number): void => onProgress?.({ file, done, size });
        return bring({ name, folder, source, pieceBytes, signal, report });
      });
    },
  };
}

/** One tab or worker at a time. */
const locked = <T>(root: string, name: string, signal: AbortSignal | undefined, action: () => Promise<T>): Promise<T> =>
  navigator.locks.request(`${root} ${name}`, { ...(signal && { signal }) }, action) as Promise<T>;

/** What the server says of the file. That it had none is kept for when it cannot be reached. */
async function openRemote(remote: Directory, file: string, folder: Folder): Promise<ByteSource | undefined> {
  try {
    const source = await remote.open(file);
    if (!source) await writeFile(folder, ABSENT, "");
    return source;
  } catch (error) {
    if (error instanceof UnreachableError && (await readFile(folder, ABSENT))) return undefined;
    throw error;
  }
}

/** A file that is in the cache whole. */
async function openWhole(name: string, folder: Folder): Promise<ByteSource | undefined> {
  const about = await readAbout(folder);
  if (!about?.isWhole) return undefined;
  const pieces = await piecesOf(folder, about);
  const whole = pieces.flatMap((piece) => piece ?? []);
  if (whole.length < pieces.length) return undefined;
  const inside = blobSource(new Blob(whole), name);
  return {
    sizeBytes: about.sizeBytes,
    version: about.version,
    read: (offset, length) =>
      inside.read(offset, length).catch((error: unknown) => {
        if (error instanceof FormatError) throw error;
        throw new FormatError(
          `${name}: must stay in the browser's cache while it is read, got ${error}. Load it again`,
        );
      }),
  };
}

/** Undefined where there is nothing: a tab that was closed while it wrote leaves an empty file. */
async function readAbout(folder: Folder): Promise<About | undefined> {
  const text = await (await readFile(folder, "about.json"))?.text();
  return text ? (JSON.parse(text) as About) : undefined;
}

const sizeOf = ({ sizeBytes, pieceBytes }: About, i: number): number =>
  Math.min(pieceBytes, sizeBytes - i * pieceBytes);

/** The pieces in their order; undefined for one that is not there whole. */
function piecesOf(folder: Folder, about: About): Promise<(File | undefined)[]> {
  const count = Math.ceil(about.sizeBytes / about.pieceBytes);
  const pieces = Array.from({ length: count }, async (_, i) => {
    const file = await readFile(folder, `${i}`);
    return file?.size === sizeOf(about, i) ? file : undefined;
  });
  return Promise.all(pieces);
}

/** Brings the pieces that are missing, and checks the whole. */
async function bring(transfer: Transfer): Promise<ByteSource | undefined> {
  const { name, folder, source, pieceBytes } = transfer;
  const { sizeBytes, version = "" } = source;
  const before = await readAbout(folder);
  const isSame = before?.sizeBytes === sizeBytes && before.version === version;
  if (!isSame) await emptyFolder(folder);
  const about = isSame ? before : { sizeBytes, version, pieceBytes, isWhole: false };
  await withRoom(name, sizeBytes, async () => {
    await writeFile(folder, "about.json", JSON.stringify(about));
    await bringPieces(transfer, about);
    await checkHash(transfer, about);
    await writeFile(folder, "about.json", JSON.stringify({ ...about, isWhole: true }));
  });
  return openWhole(name, folder);
}

/** A few at a time. The first failure ends all. */
async function bringPieces(transfer: Transfer, about: About): Promise<void> {
  const { name, folder, source, report } = transfer;
  const missing = (await piecesOf(folder, about)).flatMap((piece, i) => (piece ? [] : [i]));
  const wanted = missing.reduce((sum, i) => sum + sizeOf(about, i), 0);
  await checkRoom(name, wanted);
  let done = about.sizeBytes - wanted;
  report(done, about.sizeBytes);
  const failed = new AbortController();
  const signal = transfer.signal ? AbortSignal.any([transfer.signal, failed.signal]) : failed.signal;
  const queue = missing.values();
  const work = async (): Promise<void> => {
    for (const i of queue) {
      signal.throwIfAborted();
      await writeFile(folder, `${i}`, await source.read(i * about.pieceBytes, sizeOf(about, i), signal));
      done += sizeOf(about, i);
      report(done, about.sizeBytes);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, () => work().catch((error) => failed.abort(error))));
  signal.throwIfAborted();
}

async function checkHash({ name, folder, source, signal }: Transfer, about: About): Promise<void> {
  if (!source.sha256) return;
  const hash = new Sha256();
  for (const piece of await piecesOf(folder, about)) {
    signal?.throwIfAborted();
    if (piece) hash.update(new Uint8Array(await piece.arrayBuffer()));
  }
  const found = hash.digest();
  if (found === source.sha256) return;
  await emptyFolder(folder);
  throw new FormatError(
    `${name}: must have the hash ${source.sha256}, got ${found}. What arrived was deleted: try again`,
  );
}

/** What is in the cache, whole or in part. */
export async function listCached({ root = "lowrank" }: Pick<CacheOptions, "root"> = {}): Promise<CachedDirectory[]> {
  const found: CachedDirectory[] = [];
  const files = await openStore([root, FILES]);
  for await (const [name, handle] of files.entries())
    found.push({ name: decodeURIComponent(name), sizeBytes: await sizeIn(handle) });
  return found;
}

/** Removes a directory from the cache by its name, or all of them; waits for downloads into it. What is being read from them fails. */
export async function clearCached(name?: string, { root = "lowrank" }: Pick<CacheOptions, "root"> = {}): Promise<void> {
  const files = await openStore([root, FILES]);
  const all = (await listCached({ root })).map((cached) => cached.name);
  for (const cached of all.filter((one) => name === undefined || one === name))
    await locked(root, cached, undefined, () => files.removeEntry(encodeURIComponent(cached), { recursive: true }));
}

/** What `ask` answers; where it cannot reach the server, what it answered last. */
export async function remembered(root: string | undefined, key: string, ask: () => Promise<string>): Promise<string> {
  const folder = await openStore([root ?? "lowrank", "answers"]);
  const file = encodeURIComponent(key);
  try {
    const answer = await ask();
    await writeFile(folder, file, answer);
    return answer;
  } catch (error) {
    const kept = error instanceof UnreachableError ? await readFile(folder, file) : undefined;
    if (kept) return kept.text();
    throw error;
  }
}
