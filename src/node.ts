/** `lowrank/node`: models, adapters and data on a disk, in Node and Deno. */
import type { Gpu } from "./gpu/gpu.ts";
import { diskDirectory, replaceFiles } from "./io/files.ts";
import type { LoraAdapter } from "./lora/adapter.ts";
import type { HasLinears } from "./lora/parts.ts";
import { type LoadPeftOptions, loadPeft, savePeft } from "./lora/peft.ts";
import { CONFIG } from "./lora/peft-config.ts";
import type { CausalModel } from "./models/causal.ts";
import { type LoadOptions, loadModel } from "./models/load.ts";

export {
  changedSettings,
  type RunNotes,
  type RunSettings,
  type SavedCheckpoint,
  startAsIn,
} from "./checkpoint-content.ts";
export { checkpointSteps, openCheckpoint, saveCheckpoint } from "./checkpoints.ts";
export { appendLine, diskDirectory, ensureWritableDirectory, fileSource, writeFileAtomic } from "./io/files.ts";
export { profilePage } from "./train/profile-page.ts";

/** Loads a model from a Hugging Face directory on disk. See `loadModel`. */
export const loadModelFrom = async (gpu: Gpu, path: string, options?: LoadOptions): Promise<CausalModel> =>
  loadModel(gpu, diskDirectory(path), options);

/** Loads a PEFT adapter from a directory on disk onto the model, enabled. See `loadPeft`. */
export const loadPeftFrom = async (model: HasLinears, path: string, options?: LoadPeftOptions): Promise<LoraAdapter> =>
  loadPeft(model, diskDirectory(path), options);

/**
 * Saves the adapter as a PEFT directory, over another that is there. Cut off at any moment, there is the old adapter, the new one or none, and never
 * the weights of one with the settings of another; a failure while the weights are read or written leaves the old one.
 */
export const savePeftTo = (adapter: LoraAdapter, path: string, baseModel: string): Promise<void> =>
  replaceFiles(path, { ...savePeft(adapter, baseModel) }, CONFIG);
