/** What an adapter consists of, and what it needs of a model. */
import type { Linear } from "../nn/linear.ts";
import type { Module } from "../nn/module.ts";
import type { Table } from "../nn/table.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** Anything with named linear layers, such as a model. */
export interface HasLinears {
  readonly linears: ReadonlyMap<string, Linear>;
  /** Modules that read the same input, each list in the order of `linears`: their adapters then read it together. */
  readonly groups?: readonly (readonly string[])[];
  /** Whether files have this weight as [K,N]. */
  isTransposed?(name: string): boolean;
  /** Every module with parameters of its own, the linear layers and what else there is: norms, embeddings, a head. */
  readonly modules?: ReadonlyMap<string, Module>;
  /** What PEFT calls it; "CAUSAL_LM" unless given. */
  readonly taskType?: string;
}

/** What an adapter has for one module. All of it is trained. */
export interface LoraParts {
  /** [r, K] */
  readonly A: Tensor;
  /** [N, r] */
  readonly B: Tensor;
  /** DoRA's m [N]. */
  readonly magnitude?: Tensor | undefined;
  /** [N], added to B·(A·x) and scaled with it. */
  readonly loraBias?: Tensor | undefined;
  /** [N], in place of the layer's own. */
  readonly bias?: Tensor | undefined;
}

export interface LoraPair extends LoraParts {
  readonly layer: Linear;
  /** s, before `setScale`. */
  readonly scale: number;
}

/** What a module that is trained whole has instead of its own: of `modulesToSave` weight and bias, by `bias` "all" the bias. */
export interface SavedParts {
  readonly weight?: Tensor | readonly Tensor[] | undefined;
  readonly bias?: Tensor | undefined;
}

export interface SavedLayer extends SavedParts {
  readonly layer: Module;
  readonly tiedTo?: string | undefined;
}

/** LoRA of an embedding or a head W [V,C]: W + s·X·Y. In PEFT's words X is Aᵀ and Y is Bᵀ of an embedding, B and A of a head. */
export interface TableParts {
  /** [V, r] */
  readonly X: Tensor;
  /** [r, C] */
  readonly Y: Tensor;
}

export interface TablePair extends TableParts {
  readonly table: Table;
  readonly scale: number;
  /** Another table on the same weight, which the adapter leaves alone. */
  readonly tiedTo?: string | undefined;
}

/** Rows of a table that are trained by themselves. */
export interface TokenRows {
  /** The table, and the head that is tied to it. */
  readonly tables: readonly Table[];
  readonly ids: readonly number[];
  /** [n, C]: what stands in their place. Trained. */
  readonly rows: Tensor;
  readonly tiedTo?: string | undefined;
}

/** The parts by the names that their kinds have, in one order everywhere. */
export const PARTS = ["A", "B", "magnitude", "loraBias", "bias"] as const;

/** What an adapter began with where that was taken from the base: W stands for W₀ − s·B·A of the beginning while it is enabled. */
export interface Beginning {
  readonly A: Tensor;
  readonly B: Tensor;
  /** W₀ − s·B·A */
  readonly residual: Tensor;
  /** W₀ */
  readonly original: Linear["weight"];
}

/** Layers on one input, of one rank and scale, and their A's [ΣR,K] as one. */
export interface Group {
  readonly names: readonly string[];
  readonly A: Tensor;
}

/** All that an adapter consists of, by module name. */
export interface AdapterParts {
  readonly pairs: ReadonlyMap<string, LoraPair>;
  readonly groups: readonly Group[];
  readonly saved: ReadonlyMap<string, SavedLayer>;
  readonly tables: ReadonlyMap<string, TablePair>;
  readonly tokens: ReadonlyMap<string, TokenRows>;
}
