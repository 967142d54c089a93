import type { Gpu } from "../gpu/gpu.ts";
import type { Directory } from "../io/bytes.ts";
import { openCheckpoint } from "../nn/checkpoint.ts";
import { readConfig } from "./config.ts";
import { type Llama, loadLlama } from "./llama.ts";

/**
 * Loads a model from a Hugging Face directory: `config.json` and `model.safetensors`, or its shards with their index.
 *
 * Weights are frozen: they require no gradient unless you set `requiresGrad`. Throws FormatError naming file and tensor for an
 * architecture that is not supported, a missing tensor or shard, or a wrong shape.
 */
export async function loadModel(gpu: Gpu, directory: Directory): Promise<Llama> {
  const config = await readConfig(directory);
  return loadLlama(gpu, config, await openCheckpoint(directory, "model"));
}
