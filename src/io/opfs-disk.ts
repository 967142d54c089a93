/** The origin private file system (OPFS) as a disk, for snapshots. */
import { blobSource, checkFileName } from "./bytes.ts";
import { type Folder, readFile, withRoom } from "./opfs-store.ts";
import { Sha256 } from "./sha256.ts";
import type { SlotDisk } from "./slots.ts";
import type { Content, Digest } from "./snapshots.ts";

/** Where the bytes of a file go, one piece after the other; they last when `close` is done. */
interface Writer {
  write(piece: Uint8Array<ArrayBuffer>): Promise<void>;
  close(): Promise<void>;
  /** After a failure. */
  abort(): Promise<void>;
}

/** What TypeScript's library for pages leaves out of it: dedicated workers have it, and they alone. */
interface SyncFileHandle {
  createSyncAccessHandle(): Promise<{
    write(piece: Uint8Array<ArrayBuffer>, options: { readonly at: number }): number;
    flush(): void;
    close(): void;
  }>;
}

/** Bytes that are read at a time to hash them. */
const CHUNK_BYTES = 4 * 2 ** 20;

/**
 * The folder as a disk; paths begin in it. A dedicated worker writes through synchronous access handles, in place and flushed, a page through
 * streams that put a file into its place when they are closed. Throws FormatError where the browser has no room left.
 */
export function opfsDisk(root: Folder): SlotDisk {
  const folderOf = async (parts: readonly string[], create: boolean): Promise<Folder> => {
    let folder = root;
    for (const part of parts) folder = await folder.getDirectoryHandle(encodeURIComponent(part), { create });
    return folder;
  };
  const there = (parts: readonly string[]): Promise<Folder | undefined> => folderOf(parts, false).catch(missing);
  const open = async (path: string): Promise<File | undefined> => {
    const [parents, name] = split(path);
    const folder = await there(parents);
    return folder && readFile(folder, encodeURIComponent(name));
  };
  return {
    async list(path) {
      const names: string[] = [];
      const folder = await there(path.split("/"));
      if (folder) for await (const name of folder.keys()) names.push(decodeURIComponent(name));
      return names;
    },
    makeDirectory: async (path) => void (await folderOf(path.split("/"), true)),
    async write(path, content) {
      const [parents, name] = split(path);
      const handle = await (await folderOf(parents, false)).getFileHandle(encodeURIComponent(name), { create: true });
      return writeAll(path, await writerOf(handle), content);
    },
    async digest(path) {
      const file = await open(path);
      if (!file) return undefined;
      const hash = new Sha256();
      for (let at = 0; at < file.size; at += CHUNK_BYTES)
        hash.update(new Uint8Array(await file.slice(at, at + CHUNK_BYTES).arrayBuffer()));
      return { bytes: file.size, sha256: hash.digest() };
    },
    async remove(path) {
      const [parents, name] = split(path);
      await (await there(parents))?.removeEntry(encodeURIComponent(name), { recursive: true }).catch(missing);
    },
    directory: (path) => ({
      name: path,
      async open(file) {
        checkFileName(path, file);
        const found = await open(`${path}/${file}`);
        return found && blobSource(found, `${path}/${file}`);
      },
    }),
  };
}

function split(path: string): [parents: string[], name: string] {
  const parts = path.split("/");
  return [parts.slice(0, -1), parts.at(-1) ?? ""];
}

/** Other errors pass. */
function missing(error: unknown): undefined {
  if (error instanceof Error && error.name === "NotFoundError") return undefined;
  throw error;
}

async function writeAll(path: string, writer: Writer, content: Content): Promise<Digest> {
  const hash = new Sha256();
  let bytes = 0;
  try {
    const pieces = typeof content === "string" ? [new TextEncoder().encode(content)] : content;
    for await (const piece of pieces) {
      bytes += piece.byteLength;
      hash.update(piece);
      await withRoom(path, piece.byteLength, () => writer.write(piece as Uint8Array<ArrayBuffer>));
    }
    await withRoom(path, bytes, () => writer.close());
  } catch (error) {
    await writer.abort().catch(() => undefined);
    throw error;
  }
  return { bytes, sha256: hash.digest() };
}

async function writerOf(handle: FileSystemFileHandle & Partial<SyncFileHandle>): Promise<Writer> {
  if (!handle.createSyncAccessHandle) return handle.createWritable();
  const access = await handle.createSyncAccessHandle();
  let at = 0;
  return {
    async write(piece) {
      for (let done = 0; done < piece.byteLength; ) {
        const written = access.write(piece.subarray(done), { at });
        if (written === 0) throw new DOMException("nothing was written", "QuotaExceededError");
        done += written;
        at += written;
      }
    },
    async close() {
      access.flush();
      access.close();
    },
    abort: async () => access.close(),
  };
}
