/** Files on a disk, in Node and Deno. The only place in `io` that imports `node:`. */
import { createHash } from "node:crypto";
import { constants, createReadStream, realpathSync, statSync } from "node:fs";
import { access, appendFile, mkdir, open, readdir, realpath, rename, rm, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { type ByteSource, checkFileName, checkRange, type Directory } from "./bytes.ts";
import { FormatError } from "./errors.ts";
import { readText } from "./json.ts";
import type { Content, Digest, Disk } from "./snapshots.ts";

/** A file on disk, opened anew for each read, so that nothing has to be closed. Throws a FormatError if it cannot be read. */
export async function fileSource(path: string): Promise<ByteSource> {
  const info = await onDisk(path, "must be a file that can be read", () => stat(path));
  if (!info.isFile())
    throw new FormatError(`${path}: must be a file, got ${info.isDirectory() ? "a directory" : "a device"}`);
  return {
    sizeBytes: info.size,
    async read(offset, length) {
      checkRange(path, info.size, offset, length);
      const bytes = new Uint8Array(length);
      await onDisk(path, "must be a file that can be read", async () => {
        const file = await open(path, "r");
        try {
          for (let done = 0; done < length; ) {
            const { bytesRead } = await file.read(bytes, done, Math.min(length - done, 2 ** 30), offset + done);
            if (bytesRead === 0)
              throw new FormatError(`${path}: must keep its ${info.size} bytes while it is read, got ${offset + done}`);
            done += bytesRead;
          }
        } finally {
          await file.close();
        }
      });
      return bytes;
    },
  };
}

/** A directory on disk. Throws a FormatError if there is none. */
export function diskDirectory(path: string): Directory {
  const info = statSync(path, { throwIfNoEntry: false });
  if (!info?.isDirectory())
    throw new FormatError(
      `${path}: must be a directory, got ${info ? "a file" : "nothing there"}. Check the path; relative paths start at ${process.cwd()}`,
    );
  return {
    name: path,
    async open(file) {
      checkFileName(path, file);
      const inside = join(path, file);
      return statSync(inside, { throwIfNoEntry: false }) ? fileSource(inside) : undefined;
    },
  };
}

/**
 * The directories directly in `root`, for names that a stranger gives: undefined for one that is not there. A link out of it, or within, is as if
 * it were not there, and so are links inside of a directory. Messages name no path above a directory.
 *
 * Throws a FormatError unless `root` is a directory.
 */
export function directoriesIn(root: string): (name: string) => Promise<Directory | undefined> {
  diskDirectory(root);
  const home = realpathSync(root);
  /** Whether it is reached without a link. */
  const isPlain = async (path: string): Promise<boolean> => (await realpath(path).catch(() => undefined)) === path;
  return async (name) => {
    checkFileName(home, name);
    if (name.includes("/")) throw new FormatError(`a directory must be named without a slash, got "${name}"`);
    const path = join(home, name);
    if (!(await isPlain(path)) || !statSync(path).isDirectory()) return undefined;
    const withoutPath = async <T>(action: () => Promise<T>): Promise<T> => {
      try {
        return await action();
      } catch (error) {
        throw error instanceof FormatError ? new FormatError(error.message.replaceAll(path, name)) : error;
      }
    };
    return {
      name,
      async open(file) {
        checkFileName(name, file);
        const inside = join(path, file);
        if (!(await isPlain(inside))) return undefined;
        const source = await withoutPath(() => fileSource(inside));
        return { ...source, read: (offset, length) => withoutPath(() => source.read(offset, length)) };
      },
    };
  };
}

/**
 * Writes a file so that whoever reads `path` sees the old content or the new, never a part: temporary file beside it,
 * fsync, rename, fsync of the directory. A failure removes the temporary file; a kill may leave it as `<path>.<random>.tmp`.
 */
export const writeFileAtomic = (path: string, content: Content | Uint8Array): Promise<void> =>
  replaceAll([[path, content]]);

/**
 * Writes files that belong together into a directory, which is made where it is missing, over those that have their names. `head` is the one that
 * says what the others are: it comes last, and where another one is there, that goes first. Cut off at any moment, the directory has the old
 * files, the new ones or no head, and never others than its head says. A failure in the middle of the content leaves the old files.
 */
export async function replaceFiles(
  path: string,
  files: Readonly<Record<string, Content>>,
  head: string,
): Promise<void> {
  await ensureWritableDirectory(path);
  const headLast = Object.entries(files).sort(([a], [b]) => Number(a === head) - Number(b === head));
  const removeOther = async (): Promise<void> => {
    const there = await readText(diskDirectory(path), head).catch(() => "unreadable");
    if (there === undefined || there === files[head]) return;
    await disk.remove(join(path, head));
    await syncDirectory(path);
  };
  await replaceAll(
    headLast.map(([name, content]) => [join(path, name), content]),
    removeOther,
  );
}

/** All contents into temporary files, then one after the other into place. `prepare` is called between the two. */
async function replaceAll(
  files: readonly (readonly [path: string, content: Content | Uint8Array])[],
  prepare: () => Promise<void> = async () => {},
): Promise<void> {
  const staged = files.map(([path, content]) => ({ path, content, temporary: `${path}.${crypto.randomUUID()}.tmp` }));
  const rule = "must be a file that can be written";
  try {
    for (const { path, content, temporary } of staged) await onDisk(path, rule, () => writeSynced(temporary, content));
    await prepare();
    for (const { path, temporary } of staged) {
      await onDisk(path, rule, () => rename(temporary, path));
      await syncDirectory(dirname(path));
    }
  } catch (error) {
    for (const { temporary } of staged) await rm(temporary, { force: true });
    throw error;
  }
}

/** Writes a file that is not there yet, and syncs it. */
async function writeSynced(
  path: string,
  content: Content | Uint8Array,
  onPiece: (piece: Uint8Array) => void = () => {},
): Promise<void> {
  const file = await open(path, "wx");
  try {
    for await (const piece of pieces(content)) {
      onPiece(piece);
      for (let done = 0; done < piece.byteLength; ) done += (await file.write(piece, done)).bytesWritten;
    }
    await file.sync();
  } finally {
    await file.close();
  }
}

const pieces = (content: Content | Uint8Array): AsyncIterable<Uint8Array> | Uint8Array[] =>
  typeof content === "string" ? [new TextEncoder().encode(content)] : ArrayBuffer.isView(content) ? [content] : content;

/** Appends one line, for a log that grows by the step. */
export async function appendLine(path: string, line: string): Promise<void> {
  await onDisk(path, "must be a file that can be written", () => appendFile(path, `${line}\n`));
}

/** Makes durable what was appended to a file, if it is there. */
export async function syncFile(path: string): Promise<void> {
  if (!statSync(path, { throwIfNoEntry: false })) return;
  await onDisk(path, "must be a file that can be written", async () => {
    const file = await open(path, "r+");
    await file.sync().finally(() => file.close());
  });
}

/** This machine's disk, for snapshots. */
export const disk: Disk = {
  list: async (path) => (statSync(path, { throwIfNoEntry: false })?.isDirectory() ? await readdir(path) : []),
  makeDirectory: ensureWritableDirectory,
  write: (path, content) =>
    onDisk(path, "must be a file that can be written", async () => {
      const hash = createHash("sha256");
      let bytes = 0;
      await writeSynced(path, content, (piece) => {
        bytes += piece.byteLength;
        hash.update(piece);
      });
      return { bytes, sha256: hash.digest("hex") };
    }),
  digest: (path) => onDisk(path, "must be a file that can be read", () => digest(path)),
  rename: (from, to) => onDisk(to, "must be a path that can be written", () => rename(from, to)),
  remove: (path) =>
    onDisk(path, "must be a path that can be removed", () => rm(path, { recursive: true, force: true })),
  syncDirectory,
  directory: diskDirectory,
};

async function digest(path: string): Promise<Digest | undefined> {
  if (!statSync(path, { throwIfNoEntry: false })) return undefined;
  const hash = createHash("sha256");
  let bytes = 0;
  for await (const piece of createReadStream(path) as AsyncIterable<Uint8Array>) {
    bytes += piece.byteLength;
    hash.update(piece);
  }
  return { bytes, sha256: hash.digest("hex") };
}

/** Creates the directory and its parents where missing. Throws a FormatError that names path and reason if it cannot be written. */
export async function ensureWritableDirectory(path: string): Promise<void> {
  await onDisk(path, "must be a directory that can be written", async () => {
    await mkdir(path, { recursive: true });
    await access(path, constants.W_OK | constants.X_OK);
  });
}

/** Makes the rename itself durable. Windows cannot open a directory, and needs not. */
async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, "r").catch(() => undefined);
  await directory?.sync().catch(() => undefined);
  await directory?.close();
}

/** Says what the operating system said, about `path`. Errors that are not the system's pass through. */
export async function onDisk<T>(path: string, rule: string, action: () => Promise<T>): Promise<T> {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof Error) || !("code" in error) || !("syscall" in error)) throw error;
    const reason = REASONS[String(error.code)];
    throw new FormatError(`${path}: ${rule}, got ${error.code}${reason ? ` (${reason[0]}). ${reason[1]}` : ""}`);
  }
}

const REASONS: Readonly<Record<string, readonly [reason: string, wayOut: string]>> = {
  ENOENT: ["nothing there", "Check the path"],
  ENOTDIR: ["a part of the path is a file", "Choose another path"],
  EEXIST: ["a file has this name", "Choose another path"],
  EISDIR: ["a directory has this name", "Choose another path"],
  EACCES: ["permission denied", "Choose another path, or change its permissions"],
  EPERM: ["not permitted", "Choose another path, or change its permissions"],
  EROFS: ["a read-only disk", "Choose another path"],
  ENOSPC: ["the disk is full", "Free some space, or choose another path"],
};
