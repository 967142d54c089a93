/** `lowrank/node`: models, adapters and data on a disk, in Node and Deno. */
import type { Gpu } from "./gpu/gpu.ts";
import { diskDirectory, replaceFiles } from "./io/files.ts";
import type { LoraAdapter } from "./lora/adapter.ts";
import type { HasLinears } from "./lora/parts.ts";
import { type LoadPeftOptions, loadPeft, savePeft } from "./lora/peft.ts";
import { CONFIG } from "./lora/peft-config.ts";
import type { CausalModel } from "./models/causal.ts";
import { type LoadOptions, loadModel } from "./models/load.ts";
import { type HasWeights, type ModelFiles, type SaveOptions, saveModel } from "./models/save.ts";

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
 * Saves the model as a Hugging Face directory `to`, its weights as they are now, merged ones too: each in the type that it has in `from`, the
 * directory it came from, or in `dtype`; the other files are those of `from`. Cut off at any moment, there is the old model, the new one or none.
 * Gives the types written and, of weights quantised again, what that changed over their norm.
 *
 * Throws FormatError where `from` lacks a weight of the model, ShapeError for weights packed otherwise than NF4 without a `dtype`.
 */
export async function saveModelTo(
  model: HasWeights,
  from: string,
  to: string,
  options?: SaveOptions,
): Promise<Omit<ModelFiles, "files">> {
  const { files, ...rest } = await saveModel(model, diskDirectory(from), options);
  await replaceFiles(to, Object.fromEntries(files), "config.json");
  return rest;
}

/**
 * Saves the adapter as a PEFT directory, over another that is there. Cut off at any moment, there is the old adapter, the new one or none, and never
 * the weights of one with the settings of another; a failure while the weights are read or written leaves the old one.
 */
export const savePeftTo = (adapter: LoraAdapter, path: string, baseModel: string): Promise<void> =>
  replaceFiles(path, { ...savePeft(adapter, baseModel) }, CONFIG);
