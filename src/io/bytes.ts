/** Where bytes come from: memory, a Blob, a web server; a disk is in `files.ts`. */
import { FormatError, UnreachableError } from "./errors.ts";

/** Bytes of known length, of which any part may be asked for, as often as one likes. */
export interface ByteSource {
  readonly sizeBytes: number;
  /** Another one than before where the content is another: an ETag, a hash. */
  readonly version?: string;
  /** SHA-256 of the content in hexadecimal, where the source says. */
  readonly sha256?: string;
  /** Exactly `length` bytes from `offset` on, or a FormatError. Where it takes time, `signal` ends it by throwing its reason. */
  read(offset: number, length: number, signal?: AbortSignal): Promise<Uint8Array>;
}

/** Files by their names: what a model or an adapter is read from, wherever it is. */
export interface Directory {
  readonly name: string;
  /** Undefined when there is no such file. */
  open(file: string): Promise<ByteSource | undefined>;
}

/** Throws a FormatError unless bytes [offset, offset + length) lie inside a source of `sizeBytes`. */
export function checkRange(name: string, sizeBytes: number, offset: number, length: number): void {
  if (![offset, length].every((n) => Number.isSafeInteger(n) && n >= 0) || offset + length > sizeBytes)
    throw new FormatError(`${name}: a read must stay within its ${sizeBytes} bytes, got ${length} from ${offset} on`);
}

/** Whether a name is a plain relative path, on any system. */
export const isFileName = (file: string): boolean =>
  !(file.includes("\\") || file.includes(":") || file.split("/").some((part) => ["", ".", ".."].includes(part)));

/** Throws a FormatError unless `file` is a plain relative path: names come out of files that may be hostile. */
export function checkFileName(directory: string, file: string): void {
  if (!isFileName(file))
    throw new FormatError(`${directory}: a file name must stay inside the directory, got ${JSON.stringify(file)}`);
}

/** Bytes in memory. `read` gives views, not copies. */
export function memorySource(bytes: Uint8Array, name = "memory"): ByteSource {
  return {
    sizeBytes: bytes.byteLength,
    async read(offset, length) {
      checkRange(name, bytes.byteLength, offset, length);
      return bytes.subarray(offset, offset + length);
    },
  };
}

/** A Blob, or a File that a user chose. */
export function blobSource(blob: Blob, name: string = "name" in blob ? String(blob.name) : "blob"): ByteSource {
  return {
    sizeBytes: blob.size,
    async read(offset, length) {
      checkRange(name, blob.size, offset, length);
      return new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer());
    },
  };
}

/** A directory in memory; strings become UTF-8. */
export function memoryDirectory(name: string, files: Readonly<Record<string, Uint8Array | string>>): Directory {
  const byName = new Map(Object.entries(files));
  return {
    name,
    async open(file) {
      checkFileName(name, file);
      const content = byName.get(file);
      if (content === undefined) return undefined;
      return memorySource(typeof content === "string" ? new TextEncoder().encode(content) : content, `${name}/${file}`);
    },
  };
}

/**
 * A directory on a web server. Reads by Range request; where the server has none, or hides the size (`Content-Range`
 * not exposed to this origin), a file is downloaded whole on `open`. 404, 410 and a page, which some servers give for whatever they do not
 * have, mean: no such file.
 */
export function httpDirectory(url: string): Directory {
  const name = url.replace(/\/+$/, "");
  return {
    name,
    async open(file) {
      checkFileName(name, file);
      const address = `${name}/${file.split("/").map(encodeURIComponent).join("/")}`;
      const first = await request(address, "bytes=0-0");
      if (first.status === 404 || first.status === 410) return undefined;
      if (isPage(first) && !/\.html?$/.test(file)) {
        await first.body?.cancel();
        return undefined;
      }
      if (first.status === 416) return memorySource(new Uint8Array(), address); // an empty file has no first byte
      if (first.status === 200) return memorySource(await body(first, address), address);
      const total = /\/(\d+)$/.exec(first.headers.get("content-range") ?? "")?.[1];
      await first.body?.cancel();
      if (total === undefined) return memorySource(await body(await request(address), address), address);
      const sizeBytes = Number(total);
      const version = first.headers.get("etag") ?? first.headers.get("last-modified");
      return {
        sizeBytes,
        ...(version && { version }),
        async read(offset, length, signal) {
          checkRange(address, sizeBytes, offset, length);
          if (length === 0) return new Uint8Array();
          const response = await request(address, `bytes=${offset}-${offset + length - 1}`, signal);
          const bytes = await body(response, address, signal);
          if (response.status !== 206 || bytes.byteLength !== length)
            throw new FormatError(
              `${address}: a range of ${length} bytes was asked for, got ${bytes.byteLength} and status ${response.status}. Try again: the file may have changed`,
            );
          return bytes;
        },
      };
    },
  };
}

const isPage = ({ headers }: Response): boolean => /^text\/html\b/.test(headers.get("content-type") ?? "");

async function request(address: string, range?: string, signal?: AbortSignal): Promise<Response> {
  const options = { ...(range && { headers: { range } }), ...(signal && { signal }) };
  const response = await reach(address, () => fetch(address, options), signal);
  if (response.ok || [404, 410, 416].includes(response.status)) return response;
  await response.body?.cancel();
  throw new FormatError(`${address}: the server must answer 200 or 206, got ${response.status}`);
}

const body = (response: Response, address: string, signal?: AbortSignal): Promise<Uint8Array> =>
  reach(address, async () => new Uint8Array(await response.arrayBuffer()), signal);

async function reach<T>(address: string, action: () => Promise<T>, signal?: AbortSignal): Promise<T> {
  try {
    return await action();
  } catch (error) {
    signal?.throwIfAborted();
    throw new UnreachableError(
      `${address}: must be reachable, got ${String(error)}. Check the address and the network`,
    );
  }
}
