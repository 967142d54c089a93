/** What a checkpoint of the training of an adapter consists of, wherever it is kept: on a disk (`lowrank/node`) or in a browser (`lowrank/browser`). */
import { FormatError } from "./io/errors.ts";
import { isObject, readJson } from "./io/json.ts";
import type { Content, Snapshot } from "./io/snapshots.ts";
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

/** The files of a checkpoint by their names. */
export interface CheckpointContent {
  readonly step: number;
  readonly files: Readonly<Record<string, Content>>;
}

/** `directory` has the adapter of that step as PEFT has it. */
export interface SavedCheckpoint extends RunNotes, Snapshot {
  readonly state: TrainingState;
}

const [STATE, BEGINNINGS, NOTES] = ["training.safetensors", "beginnings.safetensors", "run.json"];

/**
 * Adapter, optimizer, position in the data and notes as files. The tensors of the adapter are read as the files are written: do that before the
 * next step is sent, as `train` does where `save` is awaited. `baseModel` is the model's path or Hub id.
 */
export function checkpointContent(
  adapter: LoraAdapter,
  baseModel: string,
  state: TrainingState,
  { settings, madeBy }: RunNotes,
): CheckpointContent {
  const files = {
    ...savePeft(adapter, baseModel),
    [STATE]: encodeState(state),
    ...(adapter.beginnings.size > 0 && { [BEGINNINGS]: encodeBeginnings(adapter) }),
    [NOTES]: `${JSON.stringify({ settings, made_by: madeBy }, null, 2)}\n`,
  };
  return { step: state.optimizer.stepCount, files };
}

/** Reads what `checkpointContent` became. Throws FormatError where a file is missing or not what it should be. */
export async function readCheckpoint({ step, directory }: Snapshot): Promise<SavedCheckpoint> {
  const { settings, made_by: madeBy } = (await readJson(directory, NOTES)) ?? {};
  if (!isObject(settings) || !isObject(madeBy))
    throw new FormatError(`${directory.name}/${NOTES}: must have settings and made_by, got neither or one`);
  const state = await decodeState(directory, STATE);
  return { step, directory, state, settings, madeBy: madeBy as Readonly<Record<string, string>> };
}

/** Starts a fresh adapter as the one of the checkpoint was started, where that took a part of the base. */
export const startAsIn = ({ directory }: Pick<SavedCheckpoint, "directory">, adapter: LoraAdapter): Promise<void> =>
  startFrom(adapter, directory, BEGINNINGS);

/** "--rank 8 in place of 4" for each setting that is not what it was. */
export function changedSettings(then: RunSettings, now: RunSettings): string[] {
  const shown = (value: unknown): string => (value === undefined ? "nothing" : JSON.stringify(value));
  return [...new Set([...Object.keys(then), ...Object.keys(now)])]
    .filter((name) => shown(then[name]) !== shown(now[name]))
    .map((name) => `${name} ${shown(now[name])} in place of ${shown(then[name])}`);
}
