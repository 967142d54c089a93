/** Checkpoints of the training of an adapter, on a disk: `checkpoints/step-000123/` in the directory of the run. */
import { checkpointContent, type RunNotes, readCheckpoint, type SavedCheckpoint } from "./checkpoint-content.ts";
import { disk } from "./io/files.ts";
import { demandSnapshot, newestSnapshot, snapshotSteps, snapshotsIn, writeSnapshot } from "./io/snapshots.ts";
import type { LoraAdapter } from "./lora/adapter.ts";
import type { TrainingState } from "./train/checkpoint.ts";

/**
 * Writes adapter, state and notes as the checkpoint of this step and keeps the `keep` newest. Cut off at any moment it leaves the checkpoints
 * that there were; when it returns, this one outlasts a loss of power. `home` must be there.
 */
export async function saveCheckpoint(
  home: string,
  adapter: LoraAdapter,
  baseModel: string,
  state: TrainingState,
  notes: RunNotes,
  keep = 2,
): Promise<void> {
  const { step, files } = checkpointContent(adapter, baseModel, state, notes);
  await writeSnapshot(disk, home, step, files, keep);
}

/** Steps of the checkpoints in `home`, whole or not, the newest first. */
export const checkpointSteps = (home: string): Promise<number[]> => snapshotSteps(disk, home);

/**
 * The newest checkpoint in `home` that is whole; `warn` is told of each newer one that is not, and why. Throws FormatError where there is none.
 */
export const openCheckpoint = async (home: string, warn: (message: string) => void): Promise<SavedCheckpoint> =>
  readCheckpoint(await demandSnapshot(snapshotsIn(home), (tell) => newestSnapshot(disk, home, tell), warn));
