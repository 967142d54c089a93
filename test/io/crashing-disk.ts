/** A disk in memory that stops at its n-th operation, as a kill or a loss of power would stop a real one. */
import { createHash } from "node:crypto";
import { memoryDirectory } from "../../src/io/bytes.ts";
import type { Content, Digest, Disk } from "../../src/io/snapshots.ts";

export class Crash extends Error {}

/** Entries are durable once the folder was synced. */
class Folder {
  entries = new Map<string, Folder | Document>();
  durable = new Map<string, Folder | Document>();
}

/** Its content is durable once it was synced. */
class Document {
  bytes = new Uint8Array();
  synced = false;
}

const split = (path: string): [parent: string, name: string] => {
  const at = path.lastIndexOf("/");
  return [path.slice(0, Math.max(0, at)), path.slice(at + 1)];
};

/** Every change is an operation, of a write each piece, of a removal each thing in it. */
export class CrashingDisk implements Disk {
  readonly #root = new Folder();
  /** So far. */
  operations = 0;
  #last = Number.POSITIVE_INFINITY;

  /** With one directory in it, which is durable. */
  constructor(home: string) {
    this.#root.entries.set(home, new Folder());
    this.#root.durable.set(home, this.#folder(home));
  }

  /** The n-th operation from here on does not happen, nor any after it. */
  crashAt(n: number): void {
    this.#last = this.operations + n - 1;
  }

  /** After a kill: what was done is there. */
  restart(): void {
    this.#last = Number.POSITIVE_INFINITY;
  }

  /** After a loss of power: names that were not synced are as they were, content that was not is half there. */
  restartWithoutPower(): void {
    this.restart();
    const lose = (folder: Folder): void => {
      folder.entries = new Map(folder.durable);
      for (const entry of folder.entries.values())
        if (entry instanceof Folder) lose(entry);
        else if (!entry.synced) entry.bytes = entry.bytes.slice(0, entry.bytes.length >> 1);
    };
    lose(this.#root);
  }

  /** Every file below a directory, by its path. */
  files(path: string): string[] {
    return [...this.#folder(path).entries].flatMap(([name, entry]) =>
      entry instanceof Folder ? this.files(`${path}/${name}`) : [`${path}/${name}`],
    );
  }

  /** Changes what is in a file behind everybody's back; undefined removes it. */
  damage(path: string, change: (bytes: Uint8Array) => Uint8Array<ArrayBuffer> | undefined): void {
    const [parent, name] = split(path);
    const file = this.#find(path);
    if (!(file instanceof Document)) throw new Error(`${path} is no file`);
    const bytes = change(file.bytes);
    if (bytes) file.bytes = bytes;
    else this.#folder(parent).entries.delete(name);
  }

  async list(path: string): Promise<string[]> {
    const found = this.#find(path);
    return found instanceof Folder ? [...found.entries.keys()] : [];
  }

  async makeDirectory(path: string): Promise<void> {
    const [parent, name] = split(path);
    if (this.#find(path)) return;
    this.#operation();
    this.#folder(parent).entries.set(name, new Folder());
  }

  async write(path: string, content: Content): Promise<Digest> {
    const [parent, name] = split(path);
    if (this.#find(path)) throw new Error(`${path} is there already`);
    this.#operation();
    const file = new Document();
    this.#folder(parent).entries.set(name, file);
    for await (const piece of typeof content === "string" ? [new TextEncoder().encode(content)] : content) {
      this.#operation();
      file.bytes = Uint8Array.from([...file.bytes, ...piece]);
    }
    this.#operation();
    file.synced = true;
    return digestOf(file);
  }

  async digest(path: string): Promise<Digest | undefined> {
    const found = this.#find(path);
    return found instanceof Document ? digestOf(found) : undefined;
  }

  async rename(from: string, to: string): Promise<void> {
    const [[fromParent, fromName], [toParent, toName]] = [split(from), split(to)];
    const moved = this.#find(from);
    if (!moved || this.#find(to)) throw new Error(`${from} cannot become ${to}`);
    this.#operation();
    this.#folder(fromParent).entries.delete(fromName);
    this.#folder(toParent).entries.set(toName, moved);
  }

  async remove(path: string): Promise<void> {
    const [parent, name] = split(path);
    const found = this.#find(path);
    if (!found) return;
    if (found instanceof Folder) for (const inside of [...found.entries.keys()]) await this.remove(`${path}/${inside}`);
    this.#operation();
    this.#folder(parent).entries.delete(name);
  }

  async syncDirectory(path: string): Promise<void> {
    this.#operation();
    const folder = this.#folder(path);
    folder.durable = new Map(folder.entries);
  }

  directory(path: string): ReturnType<Disk["directory"]> {
    const files = [...this.#folder(path).entries].flatMap(([name, entry]) =>
      entry instanceof Document ? [[name, entry.bytes] as const] : [],
    );
    return memoryDirectory(path, Object.fromEntries(files));
  }

  #operation(): void {
    if (this.operations >= this.#last) throw new Crash("crash");
    this.operations++;
  }

  #find(path: string): Folder | Document | undefined {
    if (path === "") return this.#root;
    const [parent, name] = split(path);
    const folder = this.#find(parent);
    return folder instanceof Folder ? folder.entries.get(name) : undefined;
  }

  #folder(path: string): Folder {
    const found = this.#find(path);
    if (!(found instanceof Folder)) throw new Error(`${path} is no directory`);
    return found;
  }
}

const digestOf = ({ bytes }: Document): Digest => ({
  bytes: bytes.byteLength,
  sha256: createHash("sha256").update(bytes).digest("hex"),
});
