/** The weights of a model by name: their shapes, their way from a checkpoint, and who of them is a linear layer. */
import type { Gpu } from "../gpu/gpu.ts";
import { FormatError } from "../io/errors.ts";
import { emptyPacked, packMatrix } from "../kernels/pack.ts";
import { transpose } from "../kernels/transpose.ts";
import { isQuantized, loadNf4 } from "../nn/bitsandbytes.ts";
import {
  type Checkpoint,
  loadPacked,
  loadTensor,
  readMatrix,
  sliceName,
  sliceOf,
  storedDtype,
  storedName,
} from "../nn/checkpoint.ts";
import type { Linear } from "../nn/linear.ts";
import type { Module, Norm } from "../nn/module.ts";
import type { Table } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, type PackedFormat, type PackedMatrix, tensorsIn } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";

/** What a device can bind. */
export type Limits = Pick<GPUSupportedLimits, "maxBufferSize" | "maxStorageBufferBindingSize">;

/** Pieces of a vocabulary begin at multiples of so many words. */
const VOCABULARY_STEP = 64;

/** Name and shape of the weights of a model, collected layer by layer. */
export class Shapes {
  readonly map: Map<string, number[]> = new Map();
  /** N and K of every linear layer, by module name. */
  readonly linears: Map<string, readonly [N: number, K: number]> = new Map();
  readonly #limits: Limits | undefined;

  constructor(limits: Limits | undefined) {
    this.#limits = limits;
  }

  add(name: string, ...shape: number[]): void {
    this.map.set(name, shape);
  }

  /** W [N,K] and, if there is one, b [N]. */
  linear(module: string, N: number, K: number, bias: boolean): void {
    this.add(`${module}.weight`, N, K);
    this.linears.set(module, [N, K]);
    if (bias) this.add(`${module}.bias`, N);
  }

  /** All but some of them. */
  without(isLeftOut: (name: string) => boolean): Shapes {
    const left = new Shapes(this.#limits);
    for (const [name, shape] of this.map) if (!isLeftOut(name)) left.add(name, ...shape);
    for (const [module, size] of this.linears) if (!isLeftOut(`${module}.weight`)) left.linears.set(module, size);
    return left;
  }

  /** Whether this is the weight of a linear layer that kernels can read packed. */
  isPackable(name: string): boolean {
    const [, K = 1] = this.linears.get(name.replace(/\.weight$/, "")) ?? [];
    return name.endsWith(".weight") && K % 4 === 0;
  }

  /** A table [V,C]: where it is too large for the device, in pieces of rows, "name[0:65536]" and so on. */
  table(name: string, V: number, C: number): void {
    const limits = this.#limits;
    const most = limits ? Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize) / (4 * C) : V;
    const step = most >= V ? V : Math.max(1, Math.floor(most / VOCABULARY_STEP)) * VOCABULARY_STEP;
    for (let at = 0; at < V; at += step) {
      const end = Math.min(at + step, V);
      this.add(step === V ? name : sliceName(name, at, end), end - at, C);
    }
  }
}

/** Weights by name; those of linear layers may be packed. */
export type WeightMap = ReadonlyMap<string, Tensor | PackedMatrix>;

/** The weights of one model while it is put together. */
export class Weights {
  readonly map: WeightMap;
  /** Every module that was asked for, by name, and those of them that are linear layers. */
  readonly modules: Map<string, Module> = new Map();
  readonly linears: Map<string, Linear> = new Map();

  constructor(map: WeightMap) {
    this.map = map;
  }

  /** Throws ShapeError where there is none. */
  get(name: string): Tensor {
    const t = this.#any(name);
    if (isPacked(t)) throw new ShapeError(`model: weight "${name}" must be a tensor, got one packed as ${t.format}`);
    return t;
  }

  #any(name: string): Tensor | PackedMatrix {
    const t = this.map.get(name);
    if (!t) throw new ShapeError(`model: weight "${name}" must be given, got ${this.map.size} others`);
    return t;
  }

  linear(module: string): Linear {
    const bias = this.map.has(`${module}.bias`) ? this.get(`${module}.bias`) : undefined;
    const made: Linear = { weight: this.#any(`${module}.weight`), ...(bias && { bias }) };
    this.linears.set(module, made);
    this.modules.set(module, made);
    return made;
  }

  norm(module: string): Norm {
    const bias = this.map.has(`${module}.bias`) ? this.get(`${module}.bias`) : undefined;
    const made: Norm = { weight: this.get(`${module}.weight`), ...(bias && { bias }) };
    this.modules.set(module, made);
    return made;
  }

  /** A table of `Shapes.table`. One that is `tied` has its tensors, and no weight of its own. */
  table(module: string, use: Table["use"] = "embedding", tied?: Table): Table {
    const made: Table = { use, weight: tied ? tied.weight : this.#keys(module).map((key) => this.get(key)) };
    this.modules.set(module, made);
    return made;
  }

  /** What the pieces of a table go by. */
  #keys(module: string): string[] {
    const name = `${module}.weight`;
    const found = [...this.map.keys()].filter((key) => sliceOf(key).name === name);
    return found.length > 0 ? found : [name];
  }

  /** Those of `current` that are tensors. */
  get tensors(): Map<string, Tensor> {
    return new Map([...this.current()].flatMap(([name, w]) => (isPacked(w) ? [] : [[name, w] as const])));
  }

  /** Those of `current` that are packed. */
  get packed(): Map<string, PackedMatrix> {
    return new Map([...this.current()].flatMap(([name, w]) => (isPacked(w) ? [[name, w] as const] : [])));
  }

  /** Every weight as it is now: a merged layer shows its merged weight. */
  current(): Map<string, Tensor | PackedMatrix> {
    const merged = [...this.modules].flatMap(([module, { weight, bias }]) => {
      const keys = this.#keys(module);
      return [
        ...piecesOf(weight).map(({ W }, i) => [keys[i] ?? "", W] as const),
        ...(bias ? [[`${module}.bias`, bias] as const] : []),
      ];
    });
    return new Map([...this.map, ...merged.filter(([key]) => this.map.has(key))]);
  }
}

/**
 * How the weights of linear layers are kept: as f32, as they are stored where that is in 16 bits, or quantised. What a kernel cannot read
 * packed, for its rows are not a multiple of 4 long, is f32 all the same; what is stored as NF4 stays as it is.
 */
export type WeightFormat = "f32" | "stored" | "int8" | "nf4";

/** What is to be loaded. */
export interface WeightsToLoad {
  /** In pieces, for the device. */
  readonly shapes: Shapes;
  /** The same, as the file has it. */
  readonly whole: Shapes;
  readonly format: WeightFormat;
  /** nf4: whether the scales are quantised, too. */
  readonly doubleQuant: boolean;
  /** Which matrices the file has the other way around. */
  readonly isTransposed: (name: string) => boolean;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Loads weights: those of linear layers in the format, or as they are where they are stored as NF4, all others as f32. Throws FormatError naming a
 * tensor that is missing or has a wrong shape, and where NF4 is to become int8.
 */
export async function loadWeights(
  gpu: Gpu,
  checkpoint: Checkpoint,
  asked: WeightsToLoad,
): Promise<Map<string, Tensor | PackedMatrix>> {
  const weights = new Map<string, Tensor | PackedMatrix>();
  try {
    for (const [key, shape] of asked.shapes.map) {
      asked.signal?.throwIfAborted();
      weights.set(key, await loadWeight(gpu, checkpoint, asked, key, shape));
    }
  } catch (error) {
    gpu.release(...tensorsOf(weights));
    throw error;
  }
  return weights;
}

async function loadWeight(
  gpu: Gpu,
  checkpoint: Checkpoint,
  { shapes, whole, format, doubleQuant, isTransposed }: WeightsToLoad,
  key: string,
  shape: readonly number[],
): Promise<Tensor | PackedMatrix> {
  const { name, first } = sliceOf(key);
  const stored = storedName(checkpoint, name);
  const [N = 0, K = 0] = shape;
  if (shapes.linears.has(name.replace(/\.weight$/, "")) && isQuantized(checkpoint, stored)) {
    if (format === "int8")
      throw new FormatError(
        `${checkpoint.name}: weights to be kept as int8 must be stored unquantised, got ${stored} in NF4. Keep them as they are`,
      );
    return loadNf4(gpu, checkpoint, stored, [N, K]);
  }
  const isPackable = format !== "f32" && shapes.isPackable(name);
  if (isPackable && format === "stored" && !isTransposed(name) && storedDtype(checkpoint, stored) !== "F32")
    return loadPacked(gpu, checkpoint, stored, shape);
  if (isPackable && format !== "stored") {
    const values = await readMatrix(checkpoint, stored, [N, K], isTransposed(name));
    return packMatrix(gpu, values, [N, K], format, format === "nf4" ? { doubleQuant } : {});
  }
  if (isTransposed(name)) return loadTurned(gpu, checkpoint, stored, shape);
  return loadTensor(gpu, checkpoint, stored, whole.map.get(name) ?? shape, first, shape[0]);
}

/** Every tensor of the weights, to be released. */
export const tensorsOf = (weights: WeightMap): Tensor[] => [...weights.values()].flatMap(tensorsIn);

async function loadTurned(gpu: Gpu, checkpoint: Checkpoint, name: string, shape: readonly number[]): Promise<Tensor> {
  const turned = await loadTensor(gpu, checkpoint, name, shape.toReversed());
  try {
    return transpose(turned);
  } finally {
    gpu.release(turned);
  }
}

/** In what a file keeps a weight. */
export interface Kept {
  readonly format: PackedFormat;
  readonly doubleQuant?: boolean;
}

/** Weights of undefined content, in the format: what a dry run is planned with. `stored` says which the file has in NF4 or 16 bits. */
export function emptyWeights(
  gpu: Gpu,
  shapes: Shapes,
  { format, doubleQuant }: Pick<WeightsToLoad, "format" | "doubleQuant">,
  stored: (name: string) => Kept | undefined,
): Map<string, Tensor | PackedMatrix> {
  const keptAs = (name: string): Kept | undefined => {
    const kept = stored(name);
    if (kept?.format === "nf4" || format === "stored") return kept;
    return format === "f32" ? undefined : { format, ...(format === "nf4" && { doubleQuant }) };
  };
  const of = (name: string, shape: readonly number[]): Tensor | PackedMatrix => {
    const [N = 0, K = 0] = shape;
    const kept = shapes.isPackable(name) ? keptAs(name) : undefined;
    return kept ? emptyPacked(gpu, [N, K], kept.format, kept) : empty(gpu, shape, name);
  };
  return new Map([...shapes.map].map(([name, shape]) => [name, of(name, shape)]));
}

/** Anything with weights, such as a model. */
interface HasBits {
  readonly linears: ReadonlyMap<string, Linear>;
  readonly weights: ReadonlyMap<string, Tensor>;
  readonly packed: ReadonlyMap<string, PackedMatrix>;
}

/** Bits that a weight takes on the device, in the mean: of the linear layers, and of all; the scales of quantised ones count. */
export function bitsPerWeight({ linears, weights, packed }: HasBits): {
  readonly linears: number;
  readonly all: number;
} {
  const mean = (list: readonly (Tensor | PackedMatrix)[]): number => {
    const bytes = list.flatMap(tensorsIn).reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    return (8 * bytes) / list.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
  };
  return {
    linears: mean([...linears.values()].map(({ weight }) => weight)),
    all: mean([...weights.values(), ...packed.values()]),
  };
}
