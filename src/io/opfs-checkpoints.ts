/** Checkpoints of training runs in the origin private file system (OPFS) of a browser: two slots for each run, by its name. */
import { FormatError } from "./errors.ts";
import { opfsDisk } from "./opfs-disk.ts";
import { openStore, sizeIn } from "./opfs-store.ts";
import { newestSlot, type SlotDisk, writeSlot } from "./slots.ts";
import { type Content, demandSnapshot, type Snapshot } from "./snapshots.ts";

export interface CheckpointOptions {
  /** The folder of OPFS that has the runs; "lowrank" unless given. */
  readonly root?: string | undefined;
}

/** A run that has checkpoints, and what they take. */
export interface StoredRun {
  readonly run: string;
  readonly sizeBytes: number;
}

const RUNS = "runs";

/**
 * Keeps a checkpoint of the run, as `checkpointContent` of `lowrank` makes it, in the browser. The one before stays until this one is whole:
 * a page that is closed or a machine that stops meanwhile leaves it. Other tabs and workers that write the same run wait. Works in a window and,
 * without a copy of each file meanwhile, in a dedicated Worker, of a secure page (https or localhost).
 *
 *     train({ …, checkpoint: { every: 50, save: (state) => writeCheckpoint("my run", checkpointContent(adapter, id, state, notes)) } })
 *
 * A run takes twice what a checkpoint does. When the disk is full a browser may delete all that a site keeps, unless the page has called
 * `navigator.storage.persist()`. Throws FormatError: no OPFS, no room, a name with a "/".
 */
export const writeCheckpoint = (
  run: string,
  { step, files }: { readonly step: number; readonly files: Readonly<Record<string, Content>> },
  options: CheckpointOptions = {},
): Promise<void> =>
  inRun(run, options, async (disk) => {
    await disk.makeDirectory(run);
    await writeSlot(disk, run, step, files);
  });

/**
 * The newest checkpoint of the run that is whole, for `readCheckpoint` of `lowrank`; `warn` is told of a newer one that is not, and why. It stays
 * readable until the run has written two more. Throws FormatError where there is none.
 */
export const newestCheckpoint = (
  run: string,
  warn: (message: string) => void,
  options: CheckpointOptions = {},
): Promise<Snapshot> =>
  inRun(run, options, (disk) => demandSnapshot(run, (complain) => newestSlot(disk, run, complain), warn));

/** The runs that have checkpoints, whole or not. */
export async function listCheckpoints({ root = "lowrank" }: CheckpointOptions = {}): Promise<StoredRun[]> {
  const found: StoredRun[] = [];
  for await (const [name, handle] of (await openStore([root, RUNS])).entries())
    found.push({ run: decodeURIComponent(name), sizeBytes: await sizeIn(handle) });
  return found;
}

/** Removes all checkpoints of a run, if there are any. */
export const removeCheckpoints = (run: string, options: CheckpointOptions = {}): Promise<void> =>
  inRun(run, options, (disk) => disk.remove(run));

/** One tab or worker at a time. */
async function inRun<T>(
  run: string,
  { root = "lowrank" }: CheckpointOptions,
  action: (disk: SlotDisk) => Promise<T>,
): Promise<T> {
  if (["", ".", ".."].includes(run) || run.includes("/"))
    throw new FormatError(`checkpoint: the name of a run must be one part of a path, got ${JSON.stringify(run)}`);
  const disk = opfsDisk(await openStore([root, RUNS]));
  return navigator.locks.request(`${root} ${RUNS} ${run}`, () => action(disk)) as Promise<T>;
}
