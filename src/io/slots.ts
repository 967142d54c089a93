/**
 * Snapshots where no directory can be renamed, as in OPFS: two slots, written by turns, so that the snapshot before stays until the new one is whole.
 *
 * A slot's manifest goes first when it is overwritten and comes last: it has the number of the writing, size and SHA-256 of each file, and a
 * SHA-256 of itself. Whatever is cut off where, and whatever happens to the files later, reading finds the newest slot that its manifest vouches for.
 */
import { FormatError } from "./errors.ts";
import { isObject, type JsonObject, readJson } from "./json.ts";
import { Sha256 } from "./sha256.ts";
import { type Content, type Disk, type Snapshot, writeFiles, wrongFile } from "./snapshots.ts";

/** What a disk is asked for here. */
export type SlotDisk = Pick<Disk, "list" | "makeDirectory" | "write" | "digest" | "remove" | "directory">;

const SLOTS = ["slot-0", "slot-1"] as const;
const MANIFEST = "manifest.json";
const FORMAT = 1;

/** A slot that is there. */
interface Slot {
  readonly path: string;
  /** Counts writings of the run; undefined where the manifest does not say. */
  readonly generation?: number;
  /** What is in it, or what is wrong with that. */
  readonly content: Snapshot | string;
}

/** Writes a snapshot of step `step` of the run in `home`, a directory that is there, over the older of its two, or over one that is not whole. */
export async function writeSlot(
  disk: SlotDisk,
  home: string,
  step: number,
  files: Readonly<Record<string, Content>>,
): Promise<void> {
  const slots = await openSlots(disk, home);
  const kept = slots.find(({ content }) => typeof content !== "string");
  const path = SLOTS.map((slot) => `${home}/${slot}`).find((slot) => slot !== kept?.path) ?? "";
  await disk.remove(`${path}/${MANIFEST}`);
  await disk.remove(path);
  await disk.makeDirectory(path);
  const digests = await writeFiles(disk, path, files);
  const generation = 1 + Math.max(0, ...slots.map((slot) => slot.generation ?? 0));
  const manifest = { format: FORMAT, generation, step, files: digests };
  await disk.write(`${path}/${MANIFEST}`, JSON.stringify({ ...manifest, sha256: hashOf(manifest) }));
}

/** The newest whole snapshot of the run in `home`. `warn` is told of each that is not whole and newer, or may be. */
export async function newestSlot(
  disk: SlotDisk,
  home: string,
  warn: (message: string) => void,
): Promise<Snapshot | undefined> {
  for (const { content } of await openSlots(disk, home)) {
    if (typeof content !== "string") return content;
    warn(content);
  }
  return undefined;
}

/** Those that are there, the newest first, and before them any of which it is not known: it was being written. */
async function openSlots(disk: SlotDisk, home: string): Promise<Slot[]> {
  const names = await disk.list(home);
  const there = SLOTS.filter((name) => names.includes(name));
  const slots = await Promise.all(there.map((name) => openSlot(disk, `${home}/${name}`)));
  const rank = ({ generation = Number.POSITIVE_INFINITY }: Slot): number => generation;
  return slots.sort((a, b) => (rank(a) < rank(b) ? 1 : -1));
}

async function openSlot(disk: SlotDisk, path: string): Promise<Slot> {
  try {
    const directory = disk.directory(path);
    const manifest = await readJson(directory, MANIFEST);
    if (!manifest) return { path, content: `${path}/${MANIFEST}: must be there, got nothing` };
    const { sha256, ...said } = manifest;
    const { format, generation, step, files } = said;
    if (sha256 !== hashOf(said))
      return { path, content: `${path}/${MANIFEST}: must have its own SHA-256, got another` };
    if (format !== FORMAT || typeof generation !== "number" || typeof step !== "number" || !isObject(files))
      return { path, content: `${path}/${MANIFEST}: must be of format ${FORMAT}, got ${JSON.stringify(format)}` };
    return { path, generation, content: (await wrongFile(disk, path, files)) ?? { step, directory } };
  } catch (error) {
    if (error instanceof FormatError) return { path, content: error.message };
    throw error;
  }
}

function hashOf(manifest: JsonObject): string {
  const hash = new Sha256();
  hash.update(new TextEncoder().encode(JSON.stringify(manifest)));
  return hash.digest();
}
