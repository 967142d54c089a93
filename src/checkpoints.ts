/** Checkpoints of the training of an adapter, on a disk: `checkpoints/step-000123/` in the directory of the run. */
import type { Directory } from "./io/bytes.ts";
import { FormatError } from "./io/errors.ts";
import { disk } from "./io/files.ts";
import { isObject, readJson } from "./io/json.ts";
import { newestSnapshot, snapshotSteps, snapshotsIn, writeSnapshot } from "./io/snapshots.ts";
import type { LoraAdapter } from "./lora/adapter.ts";
import { encodeBeginnings, startFrom } from "./lora/beginnings.ts";
import { savePeft } from "./lora/peft.ts";
import { decodeState, encodeState, type TrainingState } from "./train/checkpoint.ts";

/** What has to be the same where a run goes on: names and values. */
export type RunSettings = Readonly<Record<string, unknown>>;

/** What is written beside adapter and state, as `run.json`. */
export interface RunNotes {
  readonly settings: RunSettings;
  /** What made it, such as versions and the device: bits may differ elsewhere. */
  readonly madeBy: Readonly<Record<string, string>>;
}

export interface SavedCheckpoint extends RunNotes {
  readonly step: number;
  readonly state: TrainingState;
  /** With the adapter of that step as PEFT has it. */
  readonly directory: Directory;
}

const [STATE, BEGINNINGS, NOTES] = ["training.safetensors", "beginnings.safetensors", "run.json"];

/**
 * Writes adapter, state and notes as the checkpoint of this step and keeps the `keep` newest. Cut off at any moment it leaves the checkpoints
 * that there were; when it returns, this one outlasts a loss of power. `home` must be there.
 */
export async function saveCheckpoint(
  home: string,
  adapter: LoraAdapter,
  baseModel: string,
  state: TrainingState,
  { settings, madeBy }: RunNotes,
  keep = 2,
): Promise<void> {
  const files = {
    ...savePeft(adapter, baseModel),
    [STATE]: encodeState(state),
    ...(adapter.beginnings.size > 0 && { [BEGINNINGS]: encodeBeginnings(adapter) }),
    [NOTES]: `${JSON.stringify({ settings, made_by: madeBy }, null, 2)}\n`,
  };
  await writeSnapshot(disk, home, state.optimizer.stepCount, files, keep);
}

/** Steps of the checkpoints in `home`, whole or not, the newest first. */
export const checkpointSteps = (home: string): Promise<number[]> => snapshotSteps(disk, home);

/**
 * The newest checkpoint in `home` that is whole; `warn` is told of each newer one that is not, and why. Throws FormatError where there is none.
 */
export async function openCheckpoint(home: string, warn: (message: string) => void): Promise<SavedCheckpoint> {
  const complaints: string[] = [];
  const found = await newestSnapshot(disk, home, (message) => complaints.push(message));
  if (!found)
    throw new FormatError(
      complaints.length === 0
        ? `${snapshotsIn(home)}: must have a checkpoint to go on from, got none`
        : `${snapshotsIn(home)}: must have a checkpoint that is whole, got ${complaints.length} that are not. ${complaints[0]}`,
    );
  for (const complaint of complaints) warn(complaint);
  const { step, directory } = found;
  const { settings, made_by: madeBy } = (await readJson(directory, NOTES)) ?? {};
  if (!isObject(settings) || !isObject(madeBy))
    throw new FormatError(`${directory.name}/${NOTES}: must have settings and made_by, got neither or one`);
  const state = await decodeState(directory, STATE);
  return { step, directory, state, settings, madeBy: madeBy as Readonly<Record<string, string>> };
}

/** Starts a fresh adapter as the one of the checkpoint was started, where that took a part of the base. */
export const startAsIn = ({ directory }: SavedCheckpoint, adapter: LoraAdapter): Promise<void> =>
  startFrom(adapter, directory, BEGINNINGS);

/** "--rank 8 in place of 4" for each setting that is not what it was. */
export function changedSettings(then: RunSettings, now: RunSettings): string[] {
  const shown = (value: unknown): string => (value === undefined ? "nothing" : JSON.stringify(value));
  return [...new Set([...Object.keys(then), ...Object.keys(now)])]
    .filter((name) => shown(then[name]) !== shown(now[name]))
    .map((name) => `${name} ${shown(now[name])} in place of ${shown(then[name])}`);
}
