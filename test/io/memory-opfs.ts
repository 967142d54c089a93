/** OPFS in memory, as a page or as a dedicated worker has it, that stops at its n-th change as a closed tab would stop a real one. */
import { vi } from "vitest";

export class Crash extends Error {}

type Entry = MemoryFolder | MemoryFile;

/** One store; `install` makes it that of `navigator`. Every change is an operation, of a write each piece, of a removal each thing in it. */
export class MemoryOpfs {
  readonly root: MemoryFolder = new MemoryFolder("", this);
  /** So far. */
  operations = 0;
  /** Bytes that may be written from here on. */
  room: number = Number.POSITIVE_INFINITY;
  readonly isWorker: boolean;
  #last = Number.POSITIVE_INFINITY;

  constructor(isWorker: boolean) {
    this.isWorker = isWorker;
  }

  install(): void {
    const locks = { request: (_name: string, action: () => unknown) => action() };
    vi.stubGlobal("navigator", { storage: { getDirectory: async () => this.root }, locks });
    vi.stubGlobal("FileSystemFileHandle", MemoryFile);
  }

  /** The n-th operation from here on happens in half, where it is a write in place, or not at all; none after it does. */
  crashAt(n: number): void {
    this.#last = this.operations + n - 1;
  }

  restart(): void {
    this.#last = Number.POSITIVE_INFINITY;
  }

  operation(half: () => void = () => {}): void {
    if (this.operations > this.#last) throw new Crash("crash");
    if (this.operations++ < this.#last) return;
    half();
    throw new Crash("crash");
  }

  take(bytes: number): void {
    if (bytes > this.room) throw new DOMException("no room", "QuotaExceededError");
    this.room -= bytes;
  }

  /** Every file below a folder, by its path. */
  files(path: readonly string[]): MemoryFile[] {
    let folder: Entry | undefined = this.root;
    for (const part of path) folder = folder instanceof MemoryFolder ? folder.inside.get(part) : undefined;
    const below = (entry: Entry): MemoryFile[] =>
      entry instanceof MemoryFile ? [entry] : [...entry.inside.values()].flatMap(below);
    return folder ? below(folder) : [];
  }
}

const notFound = (name: string): DOMException => new DOMException(`${name} is not there`, "NotFoundError");

class MemoryFolder {
  readonly kind: string = "directory";
  readonly name: string;
  readonly inside: Map<string, Entry> = new Map();
  readonly #store: MemoryOpfs;

  constructor(name: string, store: MemoryOpfs) {
    this.name = name;
    this.#store = store;
  }

  async getDirectoryHandle(name: string, { create = false }: { create?: boolean } = {}): Promise<MemoryFolder> {
    return this.#child(name, create, MemoryFolder);
  }

  async getFileHandle(name: string, { create = false }: { create?: boolean } = {}): Promise<MemoryFile> {
    return this.#child(name, create, this.#store.isWorker ? WorkerFile : MemoryFile);
  }

  async removeEntry(name: string, { recursive = false }: { recursive?: boolean } = {}): Promise<void> {
    const entry = this.inside.get(name);
    if (!entry) throw notFound(name);
    if (entry instanceof MemoryFolder) {
      if (!recursive && entry.inside.size > 0) throw new DOMException("not empty", "InvalidModificationError");
      for (const inner of [...entry.inside.keys()]) await entry.removeEntry(inner, { recursive });
    }
    this.#store.operation();
    this.inside.delete(name);
  }

  async *entries(): AsyncGenerator<[string, Entry]> {
    yield* this.inside;
  }

  async *keys(): AsyncGenerator<string> {
    yield* this.inside.keys();
  }

  async *values(): AsyncGenerator<Entry> {
    yield* this.inside.values();
  }

  #child<T extends Entry>(name: string, create: boolean, kind: new (name: string, store: MemoryOpfs) => T): T {
    const found = this.inside.get(name);
    if (found instanceof kind) return found;
    if (found) throw new DOMException(name, "TypeMismatchError");
    if (!create) throw notFound(name);
    this.#store.operation();
    const made = new kind(name, this.#store);
    this.inside.set(name, made);
    return made;
  }
}

export class MemoryFile {
  readonly kind: string = "file";
  readonly name: string;
  bytes: Uint8Array<ArrayBuffer> = new Uint8Array();
  protected readonly store: MemoryOpfs;

  constructor(name: string, store: MemoryOpfs) {
    this.name = name;
    this.store = store;
  }

  async getFile(): Promise<File> {
    return new File([this.bytes], this.name);
  }

  /** What is written is there when it is closed. */
  async createWritable(): Promise<object> {
    let swap = new Uint8Array();
    return {
      write: async (piece: Uint8Array) => {
        this.store.operation();
        this.store.take(piece.length);
        swap = Uint8Array.from([...swap, ...piece]);
      },
      close: async () => {
        this.store.operation();
        this.bytes = swap;
      },
      abort: async () => {},
    };
  }
}

class WorkerFile extends MemoryFile {
  /** What is written is there at once, of a large piece the first half: callers have to go on. */
  async createSyncAccessHandle(): Promise<object> {
    const put = (piece: Uint8Array, at: number): void => {
      const bytes = new Uint8Array(Math.max(this.bytes.length, at + piece.length));
      bytes.set(this.bytes);
      bytes.set(piece, at);
      this.bytes = bytes;
    };
    return {
      write: (piece: Uint8Array, { at }: { at: number }) => {
        const part = piece.subarray(0, piece.length > 40 ? piece.length >> 1 : piece.length);
        if (this.store.room === 0) return 0;
        this.store.operation(() => put(part.subarray(0, part.length >> 1), at));
        this.store.take(part.length);
        put(part, at);
        return part.length;
      },
      flush: () => this.store.operation(),
      close: () => {},
    };
  }
}
