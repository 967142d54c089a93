import type { Directory } from "../io/bytes.ts";
import type { FloatDtype } from "../io/dtype.ts";
import { encodeSafetensors } from "../io/safetensors.ts";
import { openCheckpoint, sliceOf, storedDtype, storedName, tensorToWrite } from "../nn/checkpoint.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** What a model directory has beside its weights, where it has it. */
const COPIED = [
  "config.json",
  "generation_config.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
] as const;

/** Anything with weights by name, such as a model. */
export interface HasWeights {
  readonly weights: ReadonlyMap<string, Tensor>;
  /** Those that are packed, which cannot be saved. */
  readonly packed?: ReadonlyMap<string, PackedMatrix>;
  /** Whether files have this weight as [K,N]. */
  isTransposed?(name: string): boolean;
}

export interface ModelFiles {
  /** File name → content, in the order to write them. */
  readonly files: ReadonlyMap<string, AsyncIterable<Uint8Array>>;
  /** The types that the weights are stored in. */
  readonly dtypes: ReadonlySet<FloatDtype>;
}

/**
 * A model as the files of a Hugging Face directory: its weights as they are now, each in the type that it has in `source`
 * (the directory the model came from), in one `model.safetensors`; the other files are those of `source`, byte for byte.
 *
 * Tensors are read from the device, and files from `source`, only when their turn to be written comes. Throws FormatError
 * where `source` lacks a weight of the model.
 */
export async function saveModel(model: HasWeights, source: Directory): Promise<ModelFiles> {
  const [[first, packed] = []] = model.packed ?? [];
  if (packed)
    throw new ShapeError(
      `saveModel: weights must be f32, got ${first} packed as ${packed.format}. Load the model as f32`,
    );
  const checkpoint = await openCheckpoint(source, "model");
  const pieces = new Map<string, Tensor[]>();
  for (const [key, t] of model.weights) {
    const { name } = sliceOf(key);
    pieces.set(name, [...(pieces.get(name) ?? []), t]);
  }
  const tensors = [...pieces].map(([name, parts]) => {
    const stored = storedName(checkpoint, name);
    return tensorToWrite(stored, parts, storedDtype(checkpoint, stored), model.isTransposed?.(name));
  });
  const files = new Map<string, AsyncIterable<Uint8Array>>();
  for (const name of COPIED) if (await source.open(name)) files.set(name, copied(source, name));
  files.set("model.safetensors", encodeSafetensors(tensors, { format: "pt" }));
  return { files, dtypes: new Set(tensors.map(({ dtype }) => dtype as FloatDtype)) };
}

async function* copied(source: Directory, name: string): AsyncGenerator<Uint8Array> {
  const file = await source.open(name);
  if (file) yield file.read(0, file.sizeBytes);
}
