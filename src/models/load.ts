import type { Gpu } from "../gpu/gpu.ts";
import type { Directory } from "../io/bytes.ts";
import type { FloatDtype } from "../io/dtype.ts";
import { isDoubleQuantized, isQuantized } from "../nn/bitsandbytes.ts";
import { openCheckpoint, readMatrix, storedDtype, storedName } from "../nn/checkpoint.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { CausalModel } from "./causal.ts";
import { type ModelConfig, readConfig } from "./config.ts";
import { Decoder, decoderShapes } from "./decoder.ts";
import { Gpt2, type Gpt2Config, gpt2Shapes, isConv1D } from "./gpt2.ts";
import { readQuantization } from "./quantization.ts";
import {
  emptyWeights,
  type Kept,
  type Limits,
  loadWeights,
  type Shapes,
  type WeightFormat,
  type WeightMap,
} from "./weights.ts";

/**
 * Name and shape of every weight of a model, in the order of its layers.
 *
 * Given the limits of a device, an embedding or output projection that is too large for it comes in pieces of rows,
 * "model.embed_tokens.weight[0:65536]" and so on.
 */
export const weightShapes = (config: ModelConfig, limits?: Limits): Map<string, number[]> =>
  shapesOf(config, limits).map;

/** N and K of every linear layer of a model, by module name: W is [N,K]. */
export const linearSizes = (config: ModelConfig): ReadonlyMap<string, readonly [N: number, K: number]> =>
  shapesOf(config).linears;

/** Whether files have this weight of such a model as [K,N]. */
export const isTurned = (config: ModelConfig, name: string): boolean => isGpt2(config) && isConv1D(name);

const shapesOf = (config: ModelConfig, limits?: Limits): Shapes =>
  isGpt2(config) ? gpt2Shapes(config, limits) : decoderShapes(config, limits);

/** The model of these weights, which are named, shaped and ordered as `weightShapes` says. Those of linear layers may be packed. */
export const makeModel = (gpu: Gpu, config: ModelConfig, weights: WeightMap): CausalModel =>
  isGpt2(config) ? new Gpt2(gpu, config, weights) : new Decoder(gpu, config, weights);

const isGpt2 = (config: ModelConfig): config is Gpt2Config => config.modelType === "gpt2";

export interface LoadOptions {
  /** How the weights of linear layers are kept; "f32" unless given, or NF4 where they are stored so. Packed ones are frozen. */
  readonly weights?: WeightFormat;
  /** nf4: quantise the scales, too; true unless given. */
  readonly doubleQuant?: boolean;
  /** May be narrower than the device's. */
  readonly limits?: Limits;
  /** Ends it between two weights by throwing the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/**
 * Loads a model from a Hugging Face directory: `config.json` and `model.safetensors`, or its shards with their index.
 *
 * Weights that bitsandbytes quantised to NF4 stay as they are. Weights are frozen: they require no gradient unless you set `requiresGrad`.
 * Throws FormatError naming file and tensor for an architecture or a quantisation that is not supported, a missing tensor or shard, or a
 * wrong shape.
 */
export async function loadModel(gpu: Gpu, directory: Directory, options: LoadOptions = {}): Promise<CausalModel> {
  const { weights: format = "f32", doubleQuant = true, limits = gpu.limits, signal } = options;
  const config = await readConfig(directory);
  await readQuantization(directory);
  const checkpoint = await openCheckpoint(directory, "model");
  const isTransposed = (name: string): boolean => isTurned(config, name);
  const asked = {
    shapes: shapesOf(config, limits),
    whole: shapesOf(config),
    format,
    doubleQuant,
    isTransposed,
    signal,
  };
  const model = makeModel(gpu, config, await loadWeights(gpu, checkpoint, asked));
  gpu.trim();
  return model;
}

/** The weights of linear layers as they are stored, one at a time: W [N,K] of a module by rows, on the host. Errors as in `loadModel`. */
export async function openLinears(directory: Directory): Promise<(module: string) => Promise<Float32Array>> {
  const config = await readConfig(directory);
  const checkpoint = await openCheckpoint(directory, "model");
  const sizes = linearSizes(config);
  return async (module) => {
    const size = sizes.get(module);
    if (!size) throw new ShapeError(`openLinears: a module must be a linear layer of the model, got ${module}`);
    const name = `${module}.weight`;
    return readMatrix(checkpoint, storedName(checkpoint, name), size, isTurned(config, name));
  };
}

/** What each weight is stored in: by the weights themselves where they are there, else by what `config.json` says of all. */
async function storedFormats(directory: Directory): Promise<(name: string) => Kept | undefined> {
  const { dtype, doubleQuant } = await readQuantization(directory);
  const files = ["model.safetensors", "model.safetensors.index.json"].map((file) => directory.open(file));
  if ((await Promise.all(files)).every((file) => file === undefined))
    return () => (doubleQuant === undefined ? keptAs(dtype) : { format: "nf4", doubleQuant });
  const checkpoint = await openCheckpoint(directory, "model");
  return (name) => {
    const stored = storedName(checkpoint, name);
    return isQuantized(checkpoint, stored)
      ? { format: "nf4", doubleQuant: isDoubleQuantized(checkpoint, stored) }
      : keptAs(storedDtype(checkpoint, stored));
  };
}

const keptAs = (dtype: FloatDtype | undefined): Kept | undefined =>
  dtype === "F16" ? { format: "f16" } : dtype === "BF16" ? { format: "bf16" } : undefined;

/** A model with weights of undefined content on a dry Gpu, of the size that `loadModel` would give: to plan with. */
export async function emptyModel(dry: Gpu, directory: Directory, options: LoadOptions = {}): Promise<CausalModel> {
  const { weights: format = "f32", doubleQuant = true, limits = dry.limits } = options;
  const config = await readConfig(directory);
  const stored = await storedFormats(directory);
  const weights = emptyWeights(dry, shapesOf(config, limits), { format, doubleQuant }, (name) => {
    const kept = stored(name);
    return kept?.format !== "nf4" && isTurned(config, name) ? undefined : kept;
  });
  return makeModel(dry, config, weights);
}
