/** An adapter out of two checkpoints: what a full fine-tune changed, as far as a rank holds it. */
import { type Checkpoint, readMatrix, storedName } from "../nn/checkpoint.ts";
import { ShapeError } from "../tensor/errors.ts";
import { type Matrix as Dense, matrix, randomizedSvd } from "../tensor/linalg.ts";
import { Random } from "../tensor/random.ts";
import type { LoraConfig } from "./config.ts";
import type { Matrix, PlainAdapter, PlainModule } from "./plain-adapter.ts";
import { matchesModule } from "./target-modules.ts";

export interface ExtractOptions {
  readonly rank: number;
  readonly targetModules: LoraConfig["targetModules"];
  /** N and K of every linear layer of the model, by module name. */
  readonly linears: ReadonlyMap<string, readonly [N: number, K: number]>;
  /** Whether the files have this weight as [K,N]. */
  readonly isTransposed: (name: string) => boolean;
  readonly baseModel: string;
  readonly seed?: number;
}

export interface Extracted {
  readonly adapter: PlainAdapter;
  /** ‖ΔW − B·A‖ / ‖ΔW‖ over all modules together, Frobenius. */
  readonly error: number;
  /** Modules whose weights are the same in both. */
  readonly unchanged: readonly string[];
}

/** Power iterations: more do not bring the error down by a hundredth. */
const ITERATIONS = 4;

/**
 * B·A of this rank, nearest to W′ − W of each module by a randomised SVD (`randomizedSvd`), with s = 1. Weights are read on the host, a module
 * at a time. Modules that did not change are left out.
 *
 * Throws FormatError for a weight that is missing or of another size in one of the checkpoints, ShapeError for a rank that is no
 * whole number above 0 and where nothing changed.
 */
export async function extractAdapter(base: Checkpoint, tuned: Checkpoint, options: ExtractOptions): Promise<Extracted> {
  const { rank, targetModules, linears, isTransposed, baseModel, seed = 0 } = options;
  if (!Number.isInteger(rank) || rank < 1)
    throw new ShapeError(`extract: the rank must be a whole number of at least 1, got ${rank}`);
  const random = new Random(seed);
  const modules = new Map<string, PlainModule>();
  const unchanged: string[] = [];
  let [changed, kept] = [0, 0];
  for (const [name, [N, K]] of linears) {
    if (!matchesModule(targetModules, name)) continue;
    const key = `${name}.weight`;
    const of = (checkpoint: Checkpoint): Promise<Float32Array> =>
      readMatrix(checkpoint, storedName(checkpoint, key), [N, K], isTransposed(key));
    const [before, after] = [await of(base), await of(tuned)];
    const delta = matrix(
      N,
      K,
      Float64Array.from(after, (v, i) => v - (before[i] ?? 0)),
    );
    const total = delta.data.reduce((sum, v) => sum + v * v, 0);
    if (total === 0) {
      unchanged.push(name);
      continue;
    }
    const r = Math.min(rank, N, K);
    const { U, s, Vt } = await randomizedSvd(delta, r, { random, iterations: ITERATIONS });
    const root = (i: number): number => Math.sqrt(s[i] ?? 0);
    modules.set(name, {
      A: filled(rank, K, (i, k) => root(i) * at(Vt, i, k), r),
      B: turned(filled(rank, N, (i, n) => root(i) * at(U, n, i), r)),
    });
    changed += total;
    kept += s.subarray(0, r).reduce((sum, v) => sum + v * v, 0);
  }
  if (modules.size === 0)
    throw new ShapeError(
      `extract: a module must have changed, got the same weights in ${unchanged.length} of ${unchanged.length}. Are they two models?`,
    );
  const fanInFanOut = [...modules.keys()].some((name) => isTransposed(`${name}.weight`));
  const config: LoraConfig = { r: rank, alpha: rank, targetModules: [...modules.keys()], fanInFanOut };
  const sizeBytes = [...modules.values()].reduce((sum, { A, B }) => sum + 4 * (A.values.length + B.values.length), 0);
  const adapter: PlainAdapter = { format: "peft", config, baseModel, modules, dtypes: new Set(["F32"]), sizeBytes };
  return { adapter, error: Math.sqrt(Math.max(0, 1 - kept / changed)), unchanged };
}

const at = ({ data, columns }: Dense, i: number, j: number): number => data[i * columns + j] ?? 0;

/** Of the first `count` rows; the others are zero: a matrix that is smaller than the rank. */
function filled(rows: number, columns: number, of: (i: number, j: number) => number, count: number): Matrix {
  const values = new Float32Array(rows * columns);
  for (let i = 0; i < count; i++) for (let j = 0; j < columns; j++) values[i * columns + j] = of(i, j);
  return { rows, columns, values };
}

function turned({ rows, columns, values }: Matrix): Matrix {
  const y = Float32Array.from(values, (_, i) => values[(i % rows) * columns + Math.floor(i / rows)] ?? 0);
  return { rows: columns, columns: rows, values: y };
}
