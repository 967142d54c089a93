import type { Gpu } from "../gpu/gpu.ts";
import type { Directory } from "../io/bytes.ts";
import { openCheckpoint } from "../nn/checkpoint.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { CausalModel } from "./causal.ts";
import { type ModelConfig, readConfig } from "./config.ts";
import { Decoder, decoderShapes } from "./decoder.ts";
import { Gpt2, type Gpt2Config, gpt2Shapes, isConv1D } from "./gpt2.ts";
import { type Limits, loadWeights } from "./weights.ts";

/**
 * Name and shape of every weight of a model, in the order of its layers.
 *
 * Given the limits of a device, an embedding or output projection that is too large for it comes in pieces of rows,
 * "model.embed_tokens.weight[0:65536]" and so on.
 */
export const weightShapes = (config: ModelConfig, limits?: Limits): Map<string, number[]> =>
  isGpt2(config) ? gpt2Shapes(config, limits) : decoderShapes(config, limits);

/** The model of these weights, which are named, shaped and ordered as `weightShapes` says. */
export const makeModel = (gpu: Gpu, config: ModelConfig, weights: ReadonlyMap<string, Tensor>): CausalModel =>
  isGpt2(config) ? new Gpt2(gpu, config, weights) : new Decoder(gpu, config, weights);

const isGpt2 = (config: ModelConfig): config is Gpt2Config => config.modelType === "gpt2";

/**
 * Loads a model from a Hugging Face directory: `config.json` and `model.safetensors`, or its shards with their index. `limits` may be
 * narrower than the device's.
 *
 * Weights are frozen: they require no gradient unless you set `requiresGrad`. Throws FormatError naming file and tensor for an
 * architecture that is not supported, a missing tensor or shard, or a wrong shape.
 */
export async function loadModel(gpu: Gpu, directory: Directory, limits: Limits = gpu.limits): Promise<CausalModel> {
  const config = await readConfig(directory);
  const checkpoint = await openCheckpoint(directory, "model");
  const weights = await loadWeights(gpu, checkpoint, {
    shapes: weightShapes(config, limits),
    whole: weightShapes(config),
    isTransposed: (key) => isGpt2(config) && isConv1D(key),
  });
  return makeModel(gpu, config, weights);
}
