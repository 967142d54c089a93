/** The weights of a model by name: their shapes, their way from a checkpoint, and who of them is a linear layer. */
import type { Gpu } from "../gpu/gpu.ts";
import { transpose } from "../kernels/transpose.ts";
import { type Checkpoint, loadTensor, sliceName, sliceOf, storedName } from "../nn/checkpoint.ts";
import type { Linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** What a device can bind. */
export type Limits = Pick<GPUSupportedLimits, "maxBufferSize" | "maxStorageBufferBindingSize">;

/** Pieces of a vocabulary begin at multiples of so many words. */
const VOCABULARY_STEP = 64;

/** Name and shape of the weights of a model, collected layer by layer. */
export class Shapes {
  readonly map: Map<string, number[]> = new Map();
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
    if (bias) this.add(`${module}.bias`, N);
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

/** The weights of one model while it is put together. */
export class Weights {
  readonly map: ReadonlyMap<string, Tensor>;
  /** Every linear layer that `linear` was asked for, by module name. */
  readonly linears: Map<string, Linear> = new Map();

  constructor(map: ReadonlyMap<string, Tensor>) {
    this.map = map;
  }

  /** Throws ShapeError where there is none. */
  get(name: string): Tensor {
    const t = this.map.get(name);
    if (!t) throw new ShapeError(`model: weight "${name}" must be given, got ${this.map.size} others`);
    return t;
  }

  linear(module: string): Linear {
    const bias = this.map.get(`${module}.bias`);
    const made: Linear = { weight: this.get(`${module}.weight`), ...(bias && { bias }) };
    this.linears.set(module, made);
    return made;
  }

  /** A table of `Shapes.table`. */
  pieces(name: string): readonly Tensor[] {
    const found = [...this.map].flatMap(([key, t]) => (sliceOf(key).name === name ? [t] : []));
    return found.length > 0 ? found : [this.get(name)];
  }

  /** Every weight as it is now: a merged layer shows its merged weight. */
  current(): Map<string, Tensor> {
    const merged = [...this.linears].flatMap(([module, { weight, bias }]) => [
      [`${module}.weight`, weight] as const,
      ...(bias ? [[`${module}.bias`, bias] as const] : []),
    ]);
    return new Map([...this.map, ...merged]);
  }
}

/** What is to be loaded. */
export interface WeightsToLoad {
  /** In pieces, for the device. */
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  /** The same, as the file has it. */
  readonly whole: ReadonlyMap<string, readonly number[]>;
  /** Which matrices the file has the other way around. */
  readonly isTransposed: (name: string) => boolean;
}

/** Loads weights as f32. Throws FormatError naming a tensor that is missing or has a wrong shape. */
export async function loadWeights(
  gpu: Gpu,
  checkpoint: Checkpoint,
  { shapes, whole, isTransposed }: WeightsToLoad,
): Promise<Map<string, Tensor>> {
  const weights = new Map<string, Tensor>();
  try {
    for (const [key, shape] of shapes) {
      const { name, first } = sliceOf(key);
      const stored = storedName(checkpoint, name);
      if (isTransposed(name)) {
        const turned = await loadTensor(gpu, checkpoint, stored, shape.toReversed());
        weights.set(key, transpose(turned));
        gpu.release(turned);
      } else weights.set(key, await loadTensor(gpu, checkpoint, stored, whole.get(name) ?? shape, first, shape[0]));
    }
  } catch (error) {
    gpu.release(...weights.values());
    throw error;
  }
  return weights;
}
