/**
 * Directories that are there whole or not at all, one for each step of a run: `checkpoints/step-000123/`.
 *
 * Files go into a temporary directory, each synced; the manifest, with size and SHA-256 of each, goes last; then one rename makes the directory
 * what it is. Whatever is cut off where, and whatever happens to the files later, reading finds the newest one that its manifest vouches for.
 */
import type { Directory } from "./bytes.ts";
import { FormatError } from "./errors.ts";
import { isObject, type JsonObject, readJson } from "./json.ts";

/** What is known of a file's content. */
export interface Digest {
  readonly bytes: number;
  /** In hexadecimal. */
  readonly sha256: string;
}

export type Content = string | AsyncIterable<Uint8Array>;

/** The few things that a disk is asked for here. Paths have "/" between their parts. */
export interface Disk {
  /** Names in a directory; none where there is no directory. */
  list(path: string): Promise<string[]>;
  /** Makes a directory in one that is there, unless it is there already. */
  makeDirectory(path: string): Promise<void>;
  /** Writes a file that is not there yet, and syncs its content. */
  write(path: string, content: Content): Promise<Digest>;
  /** Undefined where there is no such file. */
  digest(path: string): Promise<Digest | undefined>;
  rename(from: string, to: string): Promise<void>;
  /** Removes a file, or a directory with all that is in it, if it is there. */
  remove(path: string): Promise<void>;
  /** Makes durable what has which name in a directory. */
  syncDirectory(path: string): Promise<void>;
  directory(path: string): Directory;
}

export interface Snapshot {
  readonly step: number;
  readonly directory: Directory;
}

const ROOT = "checkpoints";
const MANIFEST = "manifest.json";
const FORMAT = 1;
const TEMPORARY = ".tmp";

/** Where the snapshots of a run in `home` are. */
export const snapshotsIn = (home: string): string => `${home}/${ROOT}`;
const nameOf = (step: number): string => `step-${String(step).padStart(6, "0")}`;

/** Steps that have a directory, whole or not, the newest first. */
export async function snapshotSteps(disk: Disk, home: string): Promise<number[]> {
  const names = await disk.list(snapshotsIn(home));
  const steps = names.flatMap((name) => /^step-(\d{6,})$/.exec(name)?.[1] ?? []).map(Number);
  return steps.sort((a, b) => b - a);
}

/**
 * Writes a snapshot of step `step` of the run in `home`, a directory that is there. The `keep` newest up to this one stay; later ones, which
 * this run does not come from, go. When it returns, the snapshot outlasts a loss of power.
 */
export async function writeSnapshot(
  disk: Disk,
  home: string,
  step: number,
  files: Readonly<Record<string, Content>>,
  keep: number,
): Promise<void> {
  const root = snapshotsIn(home);
  const path = `${root}/${nameOf(step)}`;
  const temporary = path + TEMPORARY;
  await disk.makeDirectory(root);
  await disk.syncDirectory(home);
  await disk.remove(temporary);
  await disk.makeDirectory(temporary);
  const digests = await writeFiles(disk, temporary, files);
  const manifest = { format: FORMAT, step, files: digests };
  await disk.write(`${temporary}/${MANIFEST}`, `${JSON.stringify(manifest, null, 2)}\n`);
  await disk.syncDirectory(temporary);
  const before = await snapshotSteps(disk, home);
  if (before.includes(step)) await discard(disk, path);
  await disk.rename(temporary, path);
  await disk.syncDirectory(root);
  const kept = before.filter((other) => other < step).slice(0, keep - 1);
  for (const other of before)
    if (other !== step && !kept.includes(other)) await discard(disk, `${root}/${nameOf(other)}`);
}

/** Writes files that are not there yet into `path`, one after the other. */
export async function writeFiles(
  disk: Pick<Disk, "write">,
  path: string,
  files: Readonly<Record<string, Content>>,
): Promise<Record<string, Digest>> {
  const digests: Record<string, Digest> = {};
  for (const [file, content] of Object.entries(files)) digests[file] = await disk.write(`${path}/${file}`, content);
  return digests;
}

/** Gives it another name first: a directory that is half gone should not look like a snapshot. */
async function discard(disk: Disk, path: string): Promise<void> {
  const away = `${path}.old${TEMPORARY}`;
  await disk.remove(away);
  await disk.rename(path, away);
  await disk.remove(away);
}

/** Removes what writers that were cut off left in `home` and among its snapshots. */
export async function removeLeftovers(disk: Disk, home: string): Promise<void> {
  const root = snapshotsIn(home);
  for (const name of await disk.list(root)) if (name.endsWith(TEMPORARY)) await disk.remove(`${root}/${name}`);
  const isOurs = (name: string): boolean => /\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.tmp$/.test(name);
  for (const name of await disk.list(home)) if (isOurs(name)) await disk.remove(`${home}/${name}`);
}

/** The newest whole snapshot of the run in `home`. `warn` is told of each newer one that is not. */
export async function newestSnapshot(
  disk: Disk,
  home: string,
  warn: (message: string) => void,
): Promise<Snapshot | undefined> {
  for (const step of await snapshotSteps(disk, home)) {
    const directory = disk.directory(`${snapshotsIn(home)}/${nameOf(step)}`);
    const wrong = await complaint(disk, directory, step);
    if (wrong === undefined) return { step, directory };
    warn(wrong);
  }
  return undefined;
}

/** What `find` finds; where that is nothing throws FormatError with the first of its complaints, else passes them on to `warn`. */
export async function demandSnapshot(
  place: string,
  find: (warn: (message: string) => void) => Promise<Snapshot | undefined>,
  warn: (message: string) => void,
): Promise<Snapshot> {
  const complaints: string[] = [];
  const found = await find((message) => complaints.push(message));
  if (!found)
    throw new FormatError(
      complaints.length === 0
        ? `${place}: must have a checkpoint to go on from, got none`
        : `${place}: must have a checkpoint that is whole, got ${complaints.length} that are not. ${complaints[0]}`,
    );
  for (const message of complaints) warn(message);
  return found;
}

/** What is wrong with a snapshot, or undefined. */
async function complaint(disk: Disk, directory: Directory, step: number): Promise<string | undefined> {
  const { name } = directory;
  try {
    const manifest = await readJson(directory, MANIFEST);
    if (!manifest) return `${name}/${MANIFEST}: must be there, got nothing`;
    const { format, step: of, files } = manifest;
    if (format !== FORMAT || of !== step || !isObject(files))
      return `${name}/${MANIFEST}: must be of format ${FORMAT} and step ${step}, got ${JSON.stringify(format)} and ${JSON.stringify(of)}`;
    return await wrongFile(disk, name, files);
  } catch (error) {
    if (error instanceof FormatError) return error.message;
    throw error;
  }
}

/** What is wrong with the first file in `path` that is not as its manifest says, or undefined. */
export async function wrongFile(
  disk: Pick<Disk, "digest">,
  path: string,
  files: JsonObject,
): Promise<string | undefined> {
  for (const [file, expected] of Object.entries(files)) {
    const found = await disk.digest(`${path}/${file}`);
    if (!found) return `${path}/${file}: must be there, got nothing`;
    const { bytes, sha256 } = isObject(expected) ? expected : {};
    if (found.bytes !== bytes) return `${path}/${file}: must have ${bytes} bytes, got ${found.bytes}`;
    if (found.sha256 !== sha256) return `${path}/${file}: must have the SHA-256 of its manifest, got another`;
  }
  return undefined;
}
