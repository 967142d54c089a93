/** Tensors out of and into safetensors files, whole or in shards. */
import type { Gpu } from "../gpu/gpu.ts";
import type { Directory } from "../io/bytes.ts";
import { decodeFloats, encodeFloats, type FloatDtype } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { isObject, readJson } from "../io/json.ts";
import { openSafetensors, type SafetensorsFile, type TensorToWrite } from "../io/safetensors.ts";
import { widen16 } from "../kernels/cast.ts";
import { emptyPacked } from "../kernels/pack.ts";
import { transpose } from "../kernels/transpose.ts";
import { isPacked, type PackedMatrix, tensorsIn } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { empty, read, type Tensor } from "../tensor/tensor.ts";

/** The tensors of one model or adapter, wherever their shards are. */
export interface Checkpoint {
  /** The file to name in errors: the one file, or the index of the shards. */
  readonly name: string;
  /** Tensor name → the file that holds it. */
  readonly tensors: ReadonlyMap<string, SafetensorsFile>;
}

/** Opens `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` lists. Throws FormatError naming what is missing. */
export async function openCheckpoint(directory: Directory, stem: string): Promise<Checkpoint> {
  const single = await directory.open(`${stem}.safetensors`);
  const name = `${directory.name}/${stem}.safetensors`;
  if (single) {
    const file = await openSafetensors(single, name);
    return { name, tensors: new Map([...file.tensors.keys()].map((tensor) => [tensor, file])) };
  }
  const indexName = `${name}.index.json`;
  const index = await readJson(directory, `${stem}.safetensors.index.json`);
  if (!index)
    throw new FormatError(
      `${name}: the weights must be there, or ${stem}.safetensors.index.json, got neither. Download the model again`,
    );
  const map = index.weight_map;
  if (!isObject(map)) throw new FormatError(`${indexName}: "weight_map" must be an object, got ${JSON.stringify(map)}`);
  const shards = new Map<string, SafetensorsFile>();
  const tensors = new Map<string, SafetensorsFile>();
  for (const [tensor, shardName] of Object.entries(map)) {
    const key = String(shardName);
    const shard = shards.get(key) ?? (await openShard(directory, key, indexName));
    shards.set(key, shard);
    if (!shard.tensors.has(tensor))
      throw new FormatError(
        `${directory.name}/${key}: tensor "${tensor}" must be here by ${indexName}, got none. Download the model again`,
      );
    tensors.set(tensor, shard);
  }
  return { name: indexName, tensors };
}

async function openShard(directory: Directory, file: string, indexName: string): Promise<SafetensorsFile> {
  const source = await directory.open(file);
  if (!source)
    throw new FormatError(
      `${directory.name}/${file}: the shard must be there by ${indexName}, got no such file. Download the model again`,
    );
  return openSafetensors(source, `${directory.name}/${file}`);
}

/**
 * What a weight goes by in this checkpoint: some were saved without the name of the part that has the layers, "transformer." or "model.", and
 * BERT's first ones call the weight and bias of a LayerNorm gamma and beta.
 */
export function storedName({ tensors }: Checkpoint, name: string): string {
  const bare = name.slice(name.indexOf(".") + 1);
  const old = (key: string): string =>
    key.replace(/(LayerNorm\.)weight$/, "$1gamma").replace(/(LayerNorm\.)bias$/, "$1beta");
  return [name, bare, old(name), old(bare)].find((key) => tensors.has(key)) ?? name;
}

/** The type a tensor is stored in. Throws FormatError unless it is there and floating point. */
export function storedDtype({ name, tensors }: Checkpoint, tensor: string): FloatDtype {
  const dtype = tensors.get(tensor)?.tensors.get(tensor)?.dtype;
  if (dtype === undefined)
    throw new FormatError(`${name}: tensor "${tensor}" must be there, got ${listSome([...tensors.keys()])}`);
  if (dtype !== "F32" && dtype !== "F16" && dtype !== "BF16")
    throw new FormatError(`${name}: tensor "${tensor}" must be F32, F16 or BF16, got ${dtype}`);
  return dtype;
}

/** What some rows of a tensor go by: `name[first:end]`. */
export const sliceName = (name: string, first: number, end: number): string => `${name}[${first}:${end}]`;

/** Name and first row of what `sliceName` named; a whole tensor begins at row 0. */
export function sliceOf(key: string): { readonly name: string; readonly first: number } {
  const [, name = key, first = 0] = /^(.*)\[(\d+):\d+\]$/.exec(key) ?? [];
  return { name, first: Number(first) };
}

/**
 * Loads one tensor of this shape as f32, or some of its rows, in pieces of at most 64 MB, so that the host never holds a whole large one.
 *
 * Throws FormatError when there is no such tensor, or it has another shape or a type that is not floating point.
 */
export async function loadTensor(
  gpu: Gpu,
  checkpoint: Checkpoint,
  name: string,
  shape: readonly number[],
  first = 0,
  rows: number = shape[0] ?? 1,
): Promise<Tensor> {
  const dtype = storedDtype(checkpoint, name);
  const file = checkpoint.tensors.get(name);
  expectStored(checkpoint, name, shape);
  const rowSize = shape.slice(1).reduce((a, b) => a * b, 1);
  const rowBytes = rowSize * (dtype === "F32" ? 4 : 2);
  const taken = [...shape.slice(0, 1).map(() => rows), ...shape.slice(1)];
  const target = dtype === "F32" ? empty(gpu, taken, name) : empty(gpu, [Math.ceil((rows * rowSize) / 2)], name, "i32");
  await fill(target, file?.readPieces(name, undefined, first * rowBytes, (first + rows) * rowBytes));
  if (dtype === "F32") return target;
  try {
    return widen16(target, taken, dtype === "F16" ? "f16" : "bf16");
  } finally {
    gpu.release(target);
  }
}

/** Writes what is read into t or its words. Where reading fails, t is released. */
export async function fill(t: Tensor | PackedMatrix, pieces: AsyncIterable<Uint8Array> | undefined): Promise<void> {
  let offset = 0;
  try {
    for await (const piece of pieces ?? []) {
      t.gpu.write(isPacked(t) ? t.words : t, piece, offset);
      offset += piece.byteLength;
    }
  } catch (error) {
    t.gpu.release(...tensorsIn(t));
    throw error;
  }
}

/** Bytes of a tensor that are decoded at once: f32 takes twice as many as 16 bits, and some more on the way. */
const DECODED_BYTES = 16 * 2 ** 20;

/** A matrix [N,K] on the host, as f32, read in pieces; `isTransposed` where the file has it as [K,N]. Errors as in `loadTensor`. */
export async function readMatrix(
  checkpoint: Checkpoint,
  name: string,
  [N, K]: readonly [N: number, K: number],
  isTransposed: boolean,
): Promise<Float32Array> {
  const dtype = storedDtype(checkpoint, name);
  expectStored(checkpoint, name, isTransposed ? [K, N] : [N, K]);
  const values = new Float32Array(N * K);
  let [n, k] = [0, 0];
  let at = 0;
  for await (const piece of checkpoint.tensors.get(name)?.readPieces(name, DECODED_BYTES) ?? []) {
    const part = decodeFloats(dtype, piece);
    if (!isTransposed) values.set(part, at);
    else
      for (let i = 0; i < part.length; i++) {
        values[n * K + k] = part[i] ?? Number.NaN;
        if (++n === N) [n, k] = [0, k + 1];
      }
    at += part.length;
  }
  return values;
}

/** Loads a matrix [N,K] that is stored in 16 bits as it is. Errors as in `loadTensor`; K must be a multiple of 4. */
export async function loadPacked(
  gpu: Gpu,
  checkpoint: Checkpoint,
  name: string,
  shape: readonly number[],
): Promise<PackedMatrix> {
  const [N = 0, K = 0] = shape;
  const format = storedDtype(checkpoint, name) === "F16" ? "f16" : "bf16";
  const file = checkpoint.tensors.get(name);
  expectStored(checkpoint, name, shape);
  const packed = emptyPacked(gpu, [N, K], format);
  await fill(packed, file?.readPieces(name));
  return packed;
}

function expectStored({ name: file, tensors }: Checkpoint, name: string, shape: readonly number[]): void {
  const stored = tensors.get(name)?.tensors.get(name)?.shape ?? [];
  if (`${stored}` !== `${shape}`)
    throw new FormatError(`${file}: tensor "${name}" must be [${shape}], got [${stored}]`);
}

/**
 * What `encodeSafetensors` needs to write t, or its rows in pieces, or tᵀ, which comes in one piece; values are read from the device only
 * when their turn comes.
 */
export function tensorToWrite(
  name: string,
  t: Tensor | readonly Tensor[],
  dtype: FloatDtype = "F32",
  isTransposed = false,
): TensorToWrite {
  const pieces = piecesOf(t);
  const [, ...row] = pieces[0]?.W.shape ?? [];
  const shape = [pieces.reduce((sum, { rows }) => sum + rows, 0), ...row];
  return {
    name,
    dtype,
    shape: isTransposed ? shape.toReversed() : shape,
    sizeBytes: pieces.reduce((sum, { W }) => sum + W.size, 0) * (dtype === "F32" ? 4 : 2),
    data: async function* () {
      for (const { W } of pieces) {
        const turned = isTransposed ? transpose(W) : W;
        yield encodeFloats(dtype, await read(turned));
        if (isTransposed) W.gpu.release(turned);
      }
    },
  };
}

/** As `tensorToWrite`, of a matrix that is made when its turn comes, and released after. */
export function madeToWrite(
  name: string,
  shape: readonly [number, number],
  make: () => Tensor,
  dtype: FloatDtype = "F32",
): TensorToWrite {
  return {
    ...{ name, dtype, shape, sizeBytes: (dtype === "F32" ? 4 : 2) * shape[0] * shape[1] },
    data: async function* () {
      const made = make();
      yield encodeFloats(dtype, await read(made));
      made.gpu.release(made);
    },
  };
}

/** "a, b, c and 40 more": names for an error message. */
export function listSome(names: readonly string[], most = 8): string {
  if (names.length === 0) return "nothing";
  const more = names.length > most ? ` and ${names.length - most} more` : "";
  return `${names.slice(0, most).join(", ")}${more}`;
}
