/** `lowrank/node`: models, adapters and data on a disk, in Node and Deno. */
import { join } from "node:path";
import type { Gpu } from "./gpu/gpu.ts";
import { disk, diskDirectory, ensureWritableDirectory, writeFileAtomic } from "./io/files.ts";
import { readText } from "./io/json.ts";
import type { LoraAdapter } from "./lora/adapter.ts";
import type { HasLinears } from "./lora/parts.ts";
import { type LoadPeftOptions, loadPeft, savePeft } from "./lora/peft.ts";
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
 * Saves the adapter as a PEFT directory. Each file is replaced whole or not at all, the weights first; where another configuration is there it goes
 * before them: cut off at any moment, there is the old adapter, the new one or none, and never the weights of one with the settings of another.
 */
export async function savePeftTo(adapter: LoraAdapter, path: string, baseModel: string): Promise<void> {
  await ensureWritableDirectory(path);
  const files = savePeft(adapter, baseModel);
  const config = join(path, "adapter_config.json");
  const there = await readText(diskDirectory(path), "adapter_config.json").catch(() => "unreadable");
  if (there !== undefined && there !== files["adapter_config.json"]) {
    await disk.remove(config);
    await disk.syncDirectory(path);
  }
  await writeFileAtomic(join(path, "adapter_model.safetensors"), files["adapter_model.safetensors"]);
  await writeFileAtomic(config, files["adapter_config.json"]);
}
