import type { Directory } from "../io/bytes.ts";
import type { FloatDtype } from "../io/dtype.ts";
import { type JsonObject, readJson } from "../io/json.ts";
import { encodeSafetensors, type TensorToWrite } from "../io/safetensors.ts";
import { packMatrix } from "../kernels/pack.ts";
import { transpose } from "../kernels/transpose.ts";
import { unpackMatrix } from "../kernels/unpack.ts";
import { isDoubleQuantized, isQuantized, nf4ToWrite, quantState } from "../nn/bitsandbytes.ts";
import {
  type Checkpoint,
  madeToWrite,
  openCheckpoint,
  sliceOf,
  storedDtype,
  storedName,
  tensorToWrite,
} from "../nn/checkpoint.ts";
import type { Linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { PackedMatrix } from "../tensor/packed.ts";
import { read, type Tensor } from "../tensor/tensor.ts";
import { quantizationConfig, TORCH_NAMES } from "./quantization.ts";

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
  /** Those that are packed. */
  readonly packed?: ReadonlyMap<string, PackedMatrix>;
  /** The linear layers by module name: what transformers would quantise. */
  readonly linears?: ReadonlyMap<string, Linear>;
  /** Whether files have this weight as [K,N]. */
  isTransposed?(name: string): boolean;
}

export interface SaveOptions {
  /** Write every weight in this type, widening packed ones; each in the type that it has in `source` unless given. */
  readonly dtype?: FloatDtype;
}

export interface ModelFiles {
  /** File name → content, in the order to write them. */
  readonly files: ReadonlyMap<string, AsyncIterable<Uint8Array>>;
  /** The types that the weights are stored in. */
  readonly dtypes: ReadonlySet<FloatDtype | "NF4">;
  /** Where weights were quantised again: the norm of what that changed over the norm of these weights. */
  readonly requantizationError?: number;
}

/**
 * A model as the files of a Hugging Face directory: its weights as they are now, each in the type that it has in `source`
 * (the directory the model came from), in one `model.safetensors`; the other files are those of `source`, byte for byte.
 *
 * What is packed as NF4 is written as that, as bitsandbytes lays it out and bit for bit, and said in `config.json`; what is stored as NF4 and was
 * merged into is quantised again. Tensors are read from the device, and files from `source`, only when their turn to be written comes.
 *
 * Throws FormatError where `source` lacks a weight of the model; ShapeError for weights in another packed format, without a `dtype` to
 * widen them to.
 */
export async function saveModel(
  model: HasWeights,
  source: Directory,
  { dtype }: SaveOptions = {},
): Promise<ModelFiles> {
  const packed = model.packed ?? new Map<string, PackedMatrix>();
  const refused = [...packed].find(([, { format }]) => format !== "nf4");
  if (refused && !dtype)
    throw new ShapeError(
      `saveModel: weights must be f32 or nf4, got ${refused[0]} packed as ${refused[1].format}. Load the model as f32`,
    );
  const checkpoint = await openCheckpoint(source, "model");
  const encoded: Encoded[] = [];
  const isTransposed = (name: string): boolean => model.isTransposed?.(name) ?? false;
  for (const [name, pieces] of joined(model.weights))
    encoded.push(await encodeTensor(checkpoint, name, pieces, dtype, isTransposed(name)));
  for (const [name, w] of packed) encoded.push(await encodePacked(checkpoint, name, w, dtype, isTransposed(name)));
  const files = new Map<string, AsyncIterable<Uint8Array>>();
  for (const name of COPIED) if (await source.open(name)) files.set(name, copied(source, name));
  const config = await changedConfig(source, model, encoded, dtype);
  if (config) files.set("config.json", textOf(`${JSON.stringify(config, null, 2)}\n`));
  const tensors = encoded.flatMap((weight) => weight.tensors);
  files.set("model.safetensors", encodeSafetensors(tensors, { format: "pt" }));
  const changes = encoded.flatMap(({ change }) => change ?? []);
  const sum = (of: keyof Change): number => changes.reduce((total, change) => total + change[of], 0);
  return {
    files,
    dtypes: new Set(encoded.map((weight) => weight.dtype)),
    ...(changes.length > 0 && { requantizationError: Math.sqrt(sum("changed") / sum("whole")) }),
  };
}

/** Squared norms of what quantising changed, and of what it was before. */
interface Change {
  readonly changed: number;
  readonly whole: number;
}

interface Encoded {
  readonly name: string;
  readonly tensors: readonly TensorToWrite[];
  readonly dtype: FloatDtype | "NF4";
  readonly change?: Change;
}

/** The weights under the names of files, with their pieces. */
function joined(weights: ReadonlyMap<string, Tensor>): Map<string, readonly Tensor[]> {
  const pieces = new Map<string, Tensor[]>();
  for (const [key, t] of weights) {
    const { name } = sliceOf(key);
    pieces.set(name, [...(pieces.get(name) ?? []), t]);
  }
  return pieces;
}

/** A weight that is in f32: in NF4 again where the file has it so. */
async function encodeTensor(
  checkpoint: Checkpoint,
  name: string,
  pieces: readonly Tensor[],
  asked: FloatDtype | undefined,
  isTransposed: boolean,
): Promise<Encoded> {
  const stored = storedName(checkpoint, name);
  const [W] = pieces;
  if (W && !asked && isQuantized(checkpoint, stored)) {
    const { dtype: before } = await quantState(checkpoint, stored);
    const made = await requantize(stored, W, String(before), isDoubleQuantized(checkpoint, stored));
    return { name, dtype: "NF4", ...made };
  }
  const dtype = asked ?? storedDtype(checkpoint, stored);
  return { name, dtype, tensors: [tensorToWrite(stored, pieces, dtype, isTransposed)] };
}

/** A weight that is packed: in NF4 as it is, or widened to what is asked for. */
async function encodePacked(
  checkpoint: Checkpoint,
  name: string,
  w: PackedMatrix,
  asked: FloatDtype | undefined,
  isTransposed: boolean,
): Promise<Encoded> {
  const stored = storedName(checkpoint, name);
  if (asked) return { name, dtype: asked, tensors: [widened(stored, w, asked, isTransposed)] };
  const before = isQuantized(checkpoint, stored)
    ? String((await quantState(checkpoint, stored)).dtype)
    : TORCH_NAMES[storedDtype(checkpoint, stored)];
  return { name, dtype: "NF4", tensors: await nf4ToWrite(stored, w, before) };
}

/** Q(W), and how far that is from W. */
async function requantize(
  name: string,
  W: Tensor,
  dtype: string,
  doubleQuant: boolean,
): Promise<Omit<Encoded, "name" | "dtype">> {
  const [N = 0, K = 0] = W.shape;
  const before = await read(W);
  const packed = packMatrix(W.gpu, before, [N, K], "nf4", { doubleQuant });
  const wide = unpackMatrix(packed);
  const after = await read(wide);
  W.gpu.release(wide);
  const squares = (value: (x: number, i: number) => number): number =>
    before.reduce((sum, x, i) => sum + value(x, i) ** 2, 0);
  const change = { changed: squares((x, i) => x - (after[i] ?? Number.NaN)), whole: squares((x) => x) };
  return { tensors: await nf4ToWrite(name, packed, dtype, true), change };
}

const widened = (name: string, w: PackedMatrix, dtype: FloatDtype, isTransposed: boolean): TensorToWrite => {
  const [N, K] = w.shape;
  const make = (): Tensor => w.gpu.scope(() => (isTransposed ? transpose(unpackMatrix(w)) : unpackMatrix(w)));
  return madeToWrite(name, isTransposed ? [K, N] : [N, K], make, dtype);
};

/** `config.json` where it must say something else than in `source`. */
async function changedConfig(
  source: Directory,
  { linears, packed }: HasWeights,
  encoded: readonly Encoded[],
  asked: FloatDtype | undefined,
): Promise<JsonObject | undefined> {
  const json = await readJson(source, "config.json");
  const { quantization_config: before, ...rest } = json ?? {};
  const nf4 = new Set(encoded.flatMap(({ name, dtype }) => (dtype === "NF4" ? [name] : [])));
  if (!json || (!asked && (before !== undefined || nf4.size === 0))) return undefined;
  if (asked) {
    const key = "torch_dtype" in json ? "torch_dtype" : "dtype";
    return { ...rest, [key]: TORCH_NAMES[asked] };
  }
  const left = [...(linears?.keys() ?? [])].filter((module) => !nf4.has(`${module}.weight`));
  const doubleQuant = [...(packed?.values() ?? [])].some((w) => w.doubleQuant);
  return { ...rest, quantization_config: quantizationConfig(doubleQuant, left) };
}

async function* textOf(text: string): AsyncGenerator<Uint8Array> {
  yield new TextEncoder().encode(text);
}

async function* copied(source: Directory, name: string): AsyncGenerator<Uint8Array> {
  const file = await source.open(name);
  if (file) yield file.read(0, file.sizeBytes);
}
