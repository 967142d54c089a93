/** One adapter out of several on the same model, by PEFT's methods: A and B as they are, on the host. */

import { ShapeError } from "../tensor/errors.ts";
import { matrix, multiply, qr, svd, transpose } from "../tensor/linalg.ts";
import { Random } from "../tensor/random.ts";
import { type LoraConfig, settingsOf } from "./config.ts";
import type { Matrix, PlainAdapter, PlainModule } from "./plain-adapter.ts";

/**
 * "cat" puts A's and B's side by side: the weighted sum of the updates, exactly, of the sum of the ranks. "svd" is the nearest to that sum of
 * a smaller rank. The others mix A's with A's and B's with B's, of one rank, which is not the sum of the updates: "linear" adds,
 * "magnitude_prune" keeps the largest elements, "ties" those that agree in sign too (arXiv:2306.01708), "dare_linear" and "dare_ties"
 * keep elements at random (arXiv:2311.03099).
 */
export const COMBINATIONS = ["cat", "svd", "linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"] as const;
export type Combination = (typeof COMBINATIONS)[number];

export interface CombineOptions {
  readonly method: Combination;
  /** "svd": the rank; the largest of the adapters' unless given. */
  readonly rank?: number | undefined;
  /** Share of the elements that "ties", "magnitude_prune" and "dare_…" keep. */
  readonly density?: number | undefined;
  /** Of "dare_…"; 0 unless given. */
  readonly seed?: number;
}

export interface Weighted {
  readonly adapter: PlainAdapter;
  readonly weight: number;
}

/** A and B of a module in one of the adapters, and w·s. */
interface Factor {
  readonly A: Matrix;
  readonly B: Matrix;
  readonly factor: number;
}

/**
 * The weighted sum Σ wᵢ·sᵢ·Bᵢ·Aᵢ of adapters, or what the method makes of it, as an adapter with s = 1.
 *
 * Throws ShapeError for weights, ranks and densities that do not fit the method, and for adapters with more than A and B.
 */
export function combineAdapters(adapters: readonly Weighted[], options: CombineOptions): PlainAdapter {
  const { method, rank, density } = options;
  check(adapters, options);
  const random = new Random(options.seed ?? 0);
  const names = [...new Set(adapters.flatMap(({ adapter }) => [...adapter.modules.keys()]))];
  const modules = new Map<string, PlainModule>();
  for (const name of names) {
    const factors = adapters.flatMap(({ adapter, weight }): Factor[] => {
      const module = adapter.modules.get(name);
      return module ? [{ A: module.A, B: module.B, factor: weight * settingsOf(adapter.config, name).scale }] : [];
    });
    modules.set(name, combine(name, factors, { method, rank, density, random }));
  }
  const [first] = adapters as [Weighted];
  const config = configOf(adapters, modules);
  const sizeBytes = [...modules.values()].reduce((all, { A, B }) => all + 4 * (A.values.length + B.values.length), 0);
  return { format: "peft", config, baseModel: first.adapter.baseModel, modules, dtypes: new Set(["F32"]), sizeBytes };
}

function check(adapters: readonly Weighted[], { method, rank, density }: CombineOptions): void {
  const fail = (rule: string, got: unknown, way: string): never => {
    throw new ShapeError(`combine: ${rule}, got ${got}. ${way}`);
  };
  if (adapters.length < 2) fail("there must be at least two adapters", adapters.length, "Give more");
  for (const { adapter, weight } of adapters) {
    if (!Number.isFinite(weight) || weight === 0)
      fail("weights must be numbers other than 0", weight, "Leave such an adapter out");
    const { useDora, loraBias, bias = "none" } = adapter.config;
    const [strange] = [...(adapter.embeddings ?? []), ...(adapter.others?.keys() ?? [])];
    if (useDora || loraBias || bias !== "none" || strange !== undefined)
      fail(
        "adapters must be A and B alone",
        useDora ? "DoRA" : (strange ?? "a bias"),
        "Merge it into the model instead",
      );
  }
  const isPruned = !["cat", "svd", "linear"].includes(method);
  if (isPruned && !(density !== undefined && density > 0 && density <= 1))
    fail(`${method} needs a density above 0 and at most 1`, density ?? "none", "0.5 is usual");
  if (!isPruned && density !== undefined) fail(`${method} takes no density`, density, "Leave it out");
  if (rank !== undefined && method !== "svd") fail(`${method} takes no rank`, rank, "Use svd, or leave it out");
  if (rank !== undefined && !(Number.isInteger(rank) && rank > 0))
    fail("the rank must be a whole number above 0", rank, "Leave it out for the largest of the adapters'");
}

interface Combining extends Omit<CombineOptions, "seed"> {
  readonly random: Random;
}

function combine(
  name: string,
  factors: readonly Factor[],
  { method, rank, density = 1, random }: Combining,
): PlainModule {
  const [first, ...others] = factors as [Factor, ...Factor[]];
  const sameSize = others.every(({ A, B }) => A.columns === first.A.columns && B.rows === first.B.rows);
  if (!sameSize)
    throw new ShapeError(`combine: ${name} must have one size in all adapters, got several. Are they of one model?`);
  if (method === "cat") return concatenated(factors);
  if (method === "svd") {
    const joined = concatenated(factors);
    const most = Math.min(joined.A.rows, joined.A.columns, joined.B.rows);
    return truncated(joined, Math.min(rank ?? Math.max(...factors.map(({ A }) => A.rows)), most));
  }
  if (others.some(({ A }) => A.rows !== first.A.rows))
    throw new ShapeError(
      `combine: ${method} needs adapters of one rank, got ${factors.map(({ A }) => A.rows)} for ${name}. Use cat or svd`,
    );
  const prune = method.startsWith("dare")
    ? keepAtRandom(density, random)
    : keepLargest(method === "linear" ? 1 : density);
  const mixed = (of: (factor: Factor) => Matrix, weightOf: (factor: number) => number): Matrix => {
    const tasks = factors.map((factor) => prune(of(factor).values));
    const weights = factors.map(({ factor }) => weightOf(factor));
    const { rows, columns } = of(first);
    return { rows, columns, values: method.endsWith("ties") ? agreeing(tasks, weights) : sum(tasks, weights) };
  };
  return {
    A: mixed(
      ({ A }) => A,
      (f) => Math.sign(f) * Math.sqrt(Math.abs(f)),
    ), // the sign goes to one side, or it would be lost
    B: mixed(
      ({ B }) => B,
      (f) => Math.sqrt(Math.abs(f)),
    ),
  };
}

/** A = [f₁A₁; f₂A₂ …], B = [B₁ B₂ …] */
export function concatenated(factors: readonly Factor[]): PlainModule {
  const R = factors.reduce((ranks, factor) => ranks + factor.A.rows, 0);
  const [
    {
      A: { columns: K },
      B: { rows: N },
    },
  ] = factors as [Factor];
  const A = new Float32Array(R * K);
  const B = new Float32Array(N * R);
  let at = 0;
  for (const { A: a, B: b, factor } of factors) {
    A.set(
      a.values.map((v) => factor * v),
      at * K,
    );
    for (let i = 0; i < N; i++) B.set(b.values.subarray(i * b.columns, (i + 1) * b.columns), i * R + at);
    at += a.rows;
  }
  return { A: { rows: R, columns: K, values: A }, B: { rows: N, columns: R, values: B } };
}

/** The nearest of rank r to B·A: B = U·S, A = Vᵀ of its singular values, by way of QR of both, so that the product is never made. */
function truncated({ A, B }: PlainModule, r: number): PlainModule {
  const left = qr(matrix(B.rows, B.columns, B.values));
  const right = qr(transpose(matrix(A.rows, A.columns, A.values)));
  const { U, s, Vt } = svd(multiply(left.R, transpose(right.R)));
  const US = matrix(
    U.rows,
    U.columns,
    U.data.map((v, i) => v * (s[i % U.columns] ?? 0)),
  );
  const wholeB = multiply(left.Q, US);
  const wholeA = multiply(Vt, transpose(right.Q));
  const values = Float32Array.from(
    { length: B.rows * r },
    (_, i) => wholeB.data[Math.floor(i / r) * wholeB.columns + (i % r)] ?? 0,
  );
  return {
    A: { rows: r, columns: A.columns, values: Float32Array.from(wholeA.data.subarray(0, r * A.columns)) },
    B: { rows: B.rows, columns: r, values },
  };
}

type Prune = (values: Float32Array) => Float32Array;

/** The share of the elements that are largest; of equal ones the first. */
function keepLargest(density: number): Prune {
  return (values) => {
    const order = Uint32Array.from(values.keys()).sort(
      (a, b) => Math.abs(values[b] ?? 0) - Math.abs(values[a] ?? 0) || a - b,
    );
    const kept = new Float32Array(values.length);
    for (const i of order.subarray(0, Math.floor(density * values.length))) kept[i] = values[i] ?? 0;
    return kept;
  };
}

/** Each element with probability `density`, and divided by it. */
const keepAtRandom =
  (density: number, random: Random): Prune =>
  (values) =>
    values.map((v) => (random.uniform(0, 1) < density ? v / density : 0));

const sum = (tasks: readonly Float32Array[], weights: readonly number[]): Float32Array =>
  Float32Array.from(tasks[0] ?? [], (_, i) =>
    tasks.reduce((total, task, t) => total + (weights[t] ?? 0) * (task[i] ?? 0), 0),
  );

/** The mean of those elements that have the sign of the sum of all, each times its weight. */
function agreeing(tasks: readonly Float32Array[], weights: readonly number[]): Float32Array {
  return Float32Array.from(tasks[0] ?? [], (_, i) => {
    const elected = tasks.reduce((all, task) => all + (task[i] ?? 0), 0) >= 0 ? 1 : -1;
    let [total, count] = [0, 0];
    for (const [t, task] of tasks.entries()) {
      if (Math.sign(task[i] ?? 0) !== elected) continue;
      total += (weights[t] ?? 0) * (task[i] ?? 0);
      count++;
    }
    return total / Math.max(1, count);
  });
}

/** s = 1 everywhere: alpha is the rank, and patterns say where that is another one. */
function configOf(adapters: readonly Weighted[], modules: ReadonlyMap<string, PlainModule>): LoraConfig {
  const ranks = [...modules].map(([name, { A }]) => [name, A.rows] as const);
  const r = Math.max(...ranks.map(([, rank]) => rank));
  const others = Object.fromEntries(
    ranks.filter(([, rank]) => rank !== r).map(([name, rank]) => [escaped(name), rank]),
  );
  const isPlain = adapters.every(({ adapter: { config } }) => {
    const { targetModules, excludeModules, layersToTransform } = config;
    return typeof targetModules !== "string" && !excludeModules && !layersToTransform;
  });
  const lists = adapters.flatMap(({ adapter: { config } }) => config.targetModules as readonly string[]);
  return {
    ...{ r, alpha: r, rankPattern: others, alphaPattern: others },
    targetModules: isPlain ? [...new Set(lists)] : [...modules.keys()],
    fanInFanOut: adapters.some(({ adapter: { config } }) => config.fanInFanOut),
  };
}

/** A name as a regular expression that matches it alone. */
const escaped = (name: string): string => name.replaceAll(".", "\\.");
