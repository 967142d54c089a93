import type { Gpu } from "../gpu/gpu.ts";
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { openCheckpoint } from "../nn/checkpoint.ts";
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { tensor } from "../tensor/tensor.ts";
import { BertClassifier, bertShapes, isOfHead, unnamed } from "./bert.ts";
import { readClassifierConfig } from "./config.ts";
import { readQuantization } from "./quantization.ts";
import { type Limits, loadWeights } from "./weights.ts";

export interface ClassifierOptions {
  /** Begin with a new classifier for so many classes, in place of what the files have, which may be none: as of a base model. */
  readonly newClasses?: number;
  /** Of the new classifier's weights; 0 unless given. */
  readonly seed?: number;
  /** May be narrower than the device's. */
  readonly limits?: Limits;
}

/**
 * Loads an encoder with a classifier, BERT or RoBERTa, from a Hugging Face directory, as `loadModel` does. Throws FormatError as it does, and
 * where the files have no classifier and none is to be made; ShapeError for fewer than two classes.
 */
export async function loadClassifier(
  gpu: Gpu,
  directory: Directory,
  { newClasses, seed = 0, limits = gpu.limits }: ClassifierOptions = {},
): Promise<BertClassifier> {
  if (newClasses !== undefined && !(Number.isInteger(newClasses) && newClasses >= 2))
    throw new ShapeError(`loadClassifier: newClasses must be a whole number of at least 2, got ${newClasses}`);
  const stored = await readClassifierConfig(directory);
  await readQuantization(directory);
  const config = newClasses === undefined ? stored : { ...stored, labels: unnamed(newClasses) };
  const checkpoint = await openCheckpoint(directory, "model");
  const shapes = bertShapes(config, limits);
  const [head] = [...shapes.map.keys()].filter(isOfHead);
  if (newClasses === undefined && head && !checkpoint.tensors.has(head))
    throw new FormatError(
      `${checkpoint.name}: a classifier must be there, got no "${head}". To train one, begin with a new one: give newClasses, or --num-labels on the command line`,
    );
  const isMade = (key: string): boolean => newClasses !== undefined && isOfHead(key);
  const isTransposed = (): boolean => false;
  const asked = {
    shapes: shapes.without(isMade),
    whole: bertShapes(config),
    format: "f32",
    doubleQuant: true,
    isTransposed,
  } as const;
  const weights = await loadWeights(gpu, checkpoint, asked);
  const random = new Random(seed);
  for (const [key, shape] of shapes.map) {
    if (!isMade(key)) continue;
    const std = shape.length > 1 ? config.initializerRange : 0; // biases begin at 0
    const length = shape.reduce((a, b) => a * b, 1);
    const values = Float32Array.from({ length }, () => random.normal(0, std));
    weights.set(key, tensor(gpu, values, shape));
  }
  return new BertClassifier(gpu, config, weights);
}
