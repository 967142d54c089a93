/** Files in the origin private file system (OPFS) of a browser, in a window or a worker. */
import { FormatError } from "./errors.ts";

export type Folder = FileSystemDirectoryHandle;

/** A folder of OPFS by its path, made where it is not there. Throws FormatError where the browser or the page has no OPFS. */
export async function openStore(path: readonly string[]): Promise<Folder> {
  const { storage, locks } = (globalThis.navigator ?? {}) as Partial<Navigator>;
  if (!storage?.getDirectory || !locks || !("createWritable" in FileSystemFileHandle.prototype))
    throw new FormatError(
      `opfs: a page that is secure (https, or localhost) and a browser that can write to the origin private file system must be there, got ${globalThis.isSecureContext ? "no such browser" : "no secure page"}. Those with WebGPU can: Chrome 121, Firefox 141, Safari 26, or later`,
    );
  let folder = await storage.getDirectory().catch((error: unknown) => {
    throw new FormatError(
      `opfs: the browser must let this page keep data, got ${error}. Allow it for this site, or leave the private window`,
    );
  });
  for (const name of path) folder = await folder.getDirectoryHandle(encodeURIComponent(name), { create: true });
  return folder;
}

/** The file, or undefined where there is none. */
export async function readFile(folder: Folder, name: string): Promise<File | undefined> {
  const handle = await folder.getFileHandle(name).catch(() => undefined);
  return handle?.getFile();
}

/** Puts a file, whole, in the place of the one before: what is killed meanwhile leaves that, or an empty one. */
export async function writeFile(folder: Folder, name: string, content: Uint8Array | string): Promise<void> {
  const stream = await (await folder.getFileHandle(name, { create: true })).createWritable();
  try {
    await stream.write(content as Uint8Array<ArrayBuffer> | string);
  } catch (error) {
    await stream.abort().catch(() => undefined);
    throw error;
  }
  await stream.close();
}

export async function emptyFolder(folder: Folder): Promise<void> {
  const names: string[] = [];
  for await (const name of folder.keys()) names.push(name);
  for (const name of names) await folder.removeEntry(name, { recursive: true });
}

/** Bytes of a file, or of all files in a folder. */
export async function sizeIn(handle: FileSystemHandle): Promise<number> {
  if (handle.kind === "file") return (await (handle as FileSystemFileHandle).getFile()).size;
  let sum = 0;
  for await (const inside of (handle as Folder).values()) sum += await sizeIn(inside);
  return sum;
}

/** Throws FormatError where this origin may not keep so many bytes more. */
export async function checkRoom(name: string, wanted: number): Promise<void> {
  const { quota = Number.POSITIVE_INFINITY, usage = 0 } = await navigator.storage.estimate();
  if (wanted > quota - usage) throw noRoom(name, wanted, `${quota - usage}`);
}

/** Runs `action`, which writes so many bytes; a full disk becomes a FormatError. */
export async function withRoom<T>(name: string, wanted: number, action: () => Promise<T>): Promise<T> {
  try {
    return await action();
  } catch (error) {
    if (error instanceof Error && error.name === "QuotaExceededError") throw noRoom(name, wanted, "less");
    throw error;
  }
}

const noRoom = (name: string, wanted: number, got: string): FormatError =>
  new FormatError(
    `${name}: ${wanted} bytes of room must be left in the browser's storage of this site, got ${got}. Remove other models (listCached, clearCached), free some space on the disk, or leave the private window`,
  );
