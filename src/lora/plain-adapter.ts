/** An adapter in memory, without a model and without a GPU: what files of every format become, and are made of. */
import { decodeFloats, encodeFloats, type FloatDtype } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { groupBy } from "../io/group-by.ts";
import type { TensorToWrite } from "../io/safetensors.ts";
import { type LoraConfig, settingsOf } from "./config.ts";
import type { LoraParts } from "./parts.ts";

/** Row-major; a vector has one row. */
export interface Matrix {
  readonly rows: number;
  readonly columns: number;
  readonly values: Float32Array;
}

/** A [r,K], B [N,r], and [1,N] what else there is. */
export type PlainModule = Readonly<Record<"A" | "B", Matrix> & Partial<Record<keyof LoraParts, Matrix>>>;
/** By the names that modules have in Hugging Face models. */
export type PlainModules = ReadonlyMap<string, PlainModule>;

export interface PlainAdapter {
  readonly format: "peft" | "mlx" | "gguf";
  readonly config: LoraConfig;
  /** Path or Hub id of the model as the file names it; empty where it does not. */
  readonly baseModel: string;
  readonly modules: PlainModules;
  /** Those of `modules` that are embeddings: A [r,V], B [C,r]. */
  readonly embeddings?: ReadonlySet<string>;
  /** What is trained whole, by the name of the weight: copies, biases, rows of tokens. Only PEFT has such. */
  readonly others?: ReadonlyMap<string, PlainTensor>;
  /** The types of the file's tensors, and their bytes in all. */
  readonly dtypes: ReadonlySet<FloatDtype>;
  readonly sizeBytes: number;
}

export interface PlainTensor {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** Of a model, what formats have to know. `ModelConfig` has it. */
export interface BaseModel {
  readonly modelType: string;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
}

/** Where a tensor of a file belongs. */
export interface Place {
  readonly module: string;
  readonly part: keyof LoraParts;
  /** Whether the file has the transpose. */
  readonly isTurned?: boolean;
}

export interface StoredTensor {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  read(): Promise<Uint8Array>;
}

/**
 * Reads all tensors and puts them together. Throws FormatError for a tensor that belongs nowhere, where a module lacks A or B, and for
 * shapes that do not fit each other.
 */
export async function readModules(
  file: string,
  tensors: Iterable<readonly [name: string, tensor: StoredTensor]>,
  placeOf: (tensor: string) => Place | undefined,
): Promise<Pick<PlainAdapter, "dtypes" | "modules" | "sizeBytes">> {
  const found = new Map<string, Partial<Record<keyof LoraParts, Matrix>>>();
  const dtypes = new Set<FloatDtype>();
  let sizeBytes = 0;
  for (const [name, { dtype, shape, read }] of tensors) {
    const place = placeOf(name);
    if (!place) throw new FormatError(`${file}: a tensor must be a part of a LoRA module, got "${name}"`);
    const isMatrix = place.part === "A" || place.part === "B";
    const [rows = 0, columns = 0] = isMatrix ? shape : [1, ...shape];
    if (shape.length !== (isMatrix ? 2 : 1) || rows * columns === 0)
      throw new FormatError(`${file}: tensor "${name}" must be a ${isMatrix ? "matrix" : "vector"}, got [${shape}]`);
    const bytes = await read();
    const stored = { rows, columns, values: decodeFloats(dtype, bytes) };
    found.set(place.module, {
      ...found.get(place.module),
      [place.part]: place.isTurned ? transposed(stored) : stored,
    });
    dtypes.add(dtype);
    sizeBytes += bytes.byteLength;
  }
  if (found.size === 0) throw new FormatError(`${file}: an adapter must have a module, got none`);
  for (const [name, { A, B, ...vectors }] of found) {
    if (!A || !B) throw new FormatError(`${file}: ${name} must have A and B, got ${A ? "A" : B ? "B" : "neither"}`);
    if (A.rows !== B.columns)
      throw new FormatError(`${file}: A and B of ${name} must have one rank, got ${A.rows} and ${B.columns}`);
    for (const [part, { columns }] of Object.entries(vectors))
      if (columns !== B.rows)
        throw new FormatError(`${file}: ${part} of ${name} must have ${B.rows} elements, got ${columns}`);
  }
  return { modules: found as ReadonlyMap<string, PlainModule>, dtypes, sizeBytes };
}

/** Throws FormatError where ranks and parts are not those that the settings say. */
export function checkModules(file: string, config: LoraConfig, modules: PlainModules): void {
  for (const [name, { A, magnitude, loraBias, bias }] of modules) {
    const { r } = settingsOf(config, name);
    if (A.rows !== r) throw new FormatError(`${file}: ${name} must have rank ${r} by its settings, got ${A.rows}`);
    for (const [part, given, isAsked = false] of [
      ["magnitude", magnitude, config.useDora],
      ["bias of B", loraBias, config.loraBias],
      ["bias", bias, bias && (config.bias ?? "none") !== "none"],
    ] as const)
      if (Boolean(given) !== isAsked)
        throw new FormatError(
          `${file}: ${name} must have ${isAsked ? "a" : "no"} ${part} by its settings, got ${isAsked ? "none" : "one"}`,
        );
  }
}

/** Throws FormatError for the first part that a format has no words for, and for embeddings and what is trained whole. */
export function refuse(
  format: string,
  { modules, embeddings = new Set(), others = new Map() }: PlainAdapter,
  parts: readonly (keyof LoraParts)[],
): void {
  const found = [...modules].flatMap(([name, module]) =>
    parts.filter((part) => module[part]).map((part) => `${part} of ${name}`),
  );
  const [strange] = [...found, ...embeddings, ...others.keys()];
  if (strange !== undefined)
    throw new FormatError(
      `${format}: an adapter must have A and B alone${parts.includes("magnitude") ? "" : ", or a magnitude with them"}, got ${strange}, for which the format has no words. Convert to PEFT, or merge it into the model`,
    );
}

/** The layer that a module is in and what it is there: "model.layers.3.mlp.up_proj" is the mlp.up_proj of layer 3. */
export function layerOf(module: string): { readonly layer?: number; readonly kind: string } {
  const [, layer, kind] = /^.*?\.[^.]*\.(\d+)\.(.+)$/.exec(module) ?? [];
  return layer === undefined || kind === undefined ? { kind: module } : { layer: Number(layer), kind };
}

/** Settings that name these modules and no others, whatever else the model has. */
export function targetsOf(
  modules: PlainModules,
): Pick<LoraConfig, "fanInFanOut" | "layersToTransform" | "targetModules"> {
  const names = [...modules.keys()].sort();
  const fanInFanOut = names.some((name) => name.startsWith("transformer.h.")); // GPT-2's layers are Conv1D
  const layers = groupBy(names, (name) => layerOf(name).layer ?? -1);
  const [kinds = [], ...others] = [...layers.values()].map((of) => of.map((name) => layerOf(name).kind));
  if (layers.has(-1) || others.some((other) => `${other}` !== `${kinds}`)) return { targetModules: names, fanInFanOut };
  return { targetModules: kinds, layersToTransform: [...layers.keys()].sort((a, b) => a - b), fanInFanOut };
}

/**
 * The same adapter for a format that has one number for all modules: the one that most of them have. For the others what is missing is
 * multiplied into B.
 */
export function withOneNumber(
  modules: PlainModules,
  numberOf: (name: string) => number,
): { readonly number: number; readonly folded: readonly string[]; readonly modules: PlainModules } {
  const sets = groupBy(modules.keys(), (name) => Math.fround(numberOf(name)));
  const [most = []] = [...sets.values()].sort((a, b) => b.length - a.length);
  const number = numberOf(most[0] ?? "");
  const scaled = [...modules].map(([name, module]): [string, PlainModule] => {
    const factor = most.includes(name) ? 1 : numberOf(name) / number;
    return [name, { ...module, B: { ...module.B, values: module.B.values.map((x) => x * factor) } }];
  });
  return { number, folded: [...modules.keys()].filter((name) => !most.includes(name)), modules: new Map(scaled) };
}

export function matrix(rows: number, columns: number, at: (row: number, column: number) => number): Matrix {
  const values = new Float32Array(rows * columns);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) values[i * columns + j] = at(i, j);
  return { rows, columns, values };
}

/** The transpose, cut or padded with zeros to a size. */
export const transposed = (m: Matrix, rows: number = m.columns, columns: number = m.rows): Matrix =>
  matrix(rows, columns, (i, j) => (i < m.columns && j < m.rows ? (m.values[j * m.columns + i] ?? 0) : 0));

/** The tensor as a file has it. */
export async function readPlain({ dtype, shape, read }: StoredTensor): Promise<PlainTensor> {
  return { shape, values: decodeFloats(dtype, await read()) };
}

/** What an encoder needs to write it as f32. */
export function matrixToWrite(name: string, { rows, columns, values }: Matrix, isVector = false): TensorToWrite {
  const shape = isVector ? [columns] : [rows, columns];
  return { name, dtype: "F32", shape, sizeBytes: values.byteLength, data: async () => encodeFloats("F32", values) };
}

/** ‖A‖, ‖B‖ and ‖s·B·A‖, all of Frobenius: ‖B·A‖² = ⟨BᵀB, A·Aᵀ⟩, so that B·A itself is never made. */
export function norms({ A, B }: PlainModule, s: number): Readonly<Record<"A" | "B" | "BA", number>> {
  const [gramA, gramB] = [gram(A), gram(transposed(B))];
  // Rounding can leave less than 0 of a product that vanishes.
  const inner = (x: Float64Array, y: Float64Array): number => x.reduce((sum, xi, i) => sum + xi * (y[i] ?? 0), 0);
  const norm = (x: Float64Array, y: Float64Array): number => Math.sqrt(Math.max(0, inner(x, y)));
  const I = Float64Array.from(gramA, (_, i) => (i % (A.rows + 1) === 0 ? 1 : 0));
  return { A: norm(gramA, I), B: norm(gramB, I), BA: Math.abs(s) * norm(gramA, gramB) };
}

/** M·Mᵀ. */
function gram({ rows, columns, values }: Matrix): Float64Array {
  const products = new Float64Array(rows * rows);
  const row = (i: number): Float32Array => values.subarray(i * columns, (i + 1) * columns);
  for (let i = 0; i < rows; i++)
    for (let j = 0; j <= i; j++) {
      const [x, y] = [row(i), row(j)];
      let sum = 0;
      for (let k = 0; k < columns; k++) sum += (x[k] ?? 0) * (y[k] ?? 0);
      products[i * rows + j] = sum;
      products[j * rows + i] = sum;
    }
  return products;
}
