/** Batches whose rows have adapters of their own: the linear layers of one block of a Llama, weights in f16, a token to a row. */
import type { Gpu } from "../../src/gpu/gpu.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { AdapterPool, type PoolOptions } from "../../src/lora/adapter-pool.ts";
import type { PlainAdapter, PlainModule } from "../../src/lora/plain-adapter.ts";
import { type Linear, linear, linears } from "../../src/nn/linear.ts";
import type { PackedMatrix } from "../../src/tensor/packed.ts";
import { Random } from "../../src/tensor/random.ts";
import { type Tensor, tensor } from "../../src/tensor/tensor.ts";
import type { Case } from "../harness.ts";
import { type Matrix, matrixOf, type SizedContest, split, sum } from "./inputs.ts";

export interface BlockSizes {
  readonly hidden: number;
  /** Columns of k and v together are hidden / 2. */
  readonly inside: number;
  /** Of the batch. */
  readonly rows: number;
  readonly r: number;
}

/** What reads what: four inputs. */
const GROUPS = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]] as const;
type Name = (typeof GROUPS)[number][number];
const NAMES = GROUPS.flat() as readonly Name[];
const SCALE = 2;

const sizesOf = ({ hidden: C, inside: I }: BlockSizes): Readonly<Record<Name, readonly [N: number, K: number]>> => ({
  ...{ q: [C, C], k: [C / 4, C], v: [C / 4, C], o: [C, C] },
  ...{ gate: [I, C], up: [I, C], down: [C, I] },
});

const total = (sizes: BlockSizes, of: (N: number, K: number) => number): number =>
  NAMES.reduce((bytes, name) => bytes + of(...sizesOf(sizes)[name]), 0);

/** A period of normal values of a matrix of its own: where it begins depends on the seed, and no row repeats another. */
function values(count: number, seed: number, std: number): Float32Array {
  const period = PERIOD;
  const made = new Float32Array(count);
  for (let i = 0; i < count; i++) made[i] = std * (period[(i + seed * 7919) % period.length] as number);
  return made;
}
const drawn = new Random(3);
const PERIOD = Float32Array.from({ length: 65_537 }, () => drawn.normal());

/** Adapter number n, of all linear layers. */
function adapterOf(sizes: BlockSizes, n: number): PlainAdapter {
  const { r } = sizes;
  const modules = NAMES.map((name, i): [string, PlainModule] => {
    const [N, K] = sizesOf(sizes)[name];
    const A = { rows: r, columns: K, values: values(r * K, 14 * n + 2 * i, 1 / Math.sqrt(K)) };
    return [name, { A, B: { rows: N, columns: r, values: values(N * r, 14 * n + 2 * i + 1, 1 / Math.sqrt(r)) } }];
  });
  const config = { r, alpha: SCALE * r, targetModules: [...NAMES] };
  return { format: "peft", config, baseModel: "", modules: new Map(modules), dtypes: new Set(["F32"]), sizeBytes: 0 };
}

/** A block, its inputs, and what each of its products must be. */
function block(gpu: Gpu, sizes: BlockSizes) {
  const inputs = GROUPS.map(([first]) => matrixOf(gpu, sizes.rows, sizesOf(sizes)[first][1], 1));
  const xOf = (name: Name): Matrix => inputs[GROUPS.findIndex((names) => names.includes(name as never))] as Matrix;
  const weights = new Map(
    NAMES.map((name) => {
      const [N, K] = sizesOf(sizes)[name];
      // −c, 0 and c, c a power of two: exact in f16.
      const c = 2 ** -Math.round(Math.log2(K) / 2);
      const host = values(N * K, N + K, 1).map((v) => c * Math.sign(Math.trunc(2 * v)));
      return [name, { host, packed: packMatrix(gpu, host, [N, K], "f16") }];
    }),
  );
  /** The layers once more, on the same weights, for a pool of their own. */
  const layers = (): Map<Name, Linear> =>
    new Map([...weights].map(([name, { packed }]) => [name, { weight: packed as PackedMatrix }]));
  const run = (of: ReadonlyMap<Name, Linear>): Record<string, Tensor> =>
    Object.fromEntries(
      GROUPS.flatMap((names, i) => {
        const x = (inputs[i] as Matrix).t;
        const [only, ...more] = names.map((name) => of.get(name) as Linear) as [Linear, ...Linear[]];
        const ys = more.length > 0 ? linears([only, ...more], x) : [linear(only, x)];
        return names.map((name, g) => [name, ys[g] as Tensor]);
      }),
    );
  const check =
    (adapterAt: (row: number) => PlainAdapter | undefined): Case["check"] =>
    (result, element) => {
      const name = result as Name;
      const [N, K] = sizesOf(sizes)[name];
      const [row, column] = split(element, N);
      const x = xOf(name);
      const w = weights.get(name)?.host ?? new Float32Array();
      const base = sum(K, (k) => x.at(row, k) * (w[column * K + k] ?? Number.NaN));
      const own = adapterAt(row)?.modules.get(name);
      if (!own) return base;
      const u = (j: number): number => sum(K, (k) => x.at(row, k) * (own.A.values[j * K + k] ?? Number.NaN));
      return base + SCALE * sum(sizes.r, (j) => u(j) * (own.B.values[column * sizes.r + j] ?? Number.NaN));
    };
  const held = [...inputs.map(({ t }) => t), ...[...weights.values()].map(({ packed }) => packed.words)];
  return { layers, run, check, held };
}

const operationsOf = (sizes: BlockSizes, r: number): number =>
  2 * sizes.rows * total(sizes, (N, K) => N * K + r * (N + K));

/** Weights in f16, inputs and results. */
const baseBytes = (sizes: BlockSizes): number => total(sizes, (N, K) => 2 * N * K + 4 * sizes.rows * (N + K));

/** Pages that so many adapters of rank r have. */
const pageBytes = ({ r, ...sizes }: BlockSizes, adapters: number, bytes: number): number =>
  adapters * r * bytes * total({ r, ...sizes }, (N, K) => N + K);

const poolOn = (
  layers: Map<Name, Linear>,
  options: PoolOptions,
  adapters: readonly PlainAdapter[],
): { pool: AdapterPool; slots: number[] } => {
  const pool = new AdapterPool({ linears: layers, groups: GROUPS }, options);
  // Without DoRA an adapter is there when the call returns.
  for (const [n, adapter] of adapters.entries()) void pool.register(`${n}`, adapter);
  pool.enable();
  return { pool, slots: pool.names.slice(0, options.slots).map((name) => pool.acquire(name) as number) };
};

/** The base alone, and a batch over 4 adapters, or over as many as rows. By bytes: base / (base + adapters touched). */
export function mixedBatch(sizes: BlockSizes): SizedContest {
  const { rows, hidden, inside, r } = sizes;
  return {
    name: `mixed batch, ${rows} rows, hidden ${hidden}, r=${r}`,
    group: "mixed-batch",
    sizes: { M: rows, hidden, inside, r },
    flops: operationsOf(sizes, r),
    largestBytes: 4 * r * rows * inside * 2,
    setup: (gpu) => {
      const { layers, run, check, held } = block(gpu, sizes);
      const adapters = Array.from({ length: rows }, (_, n) => adapterOf(sizes, n));
      const plain = layers();
      const pools = (["f32", "f16"] as const).map((dtype) => {
        const on = layers();
        return { on, dtype, ...poolOn(on, { pages: rows * r, maxRank: r, slots: rows, dtype }, adapters) };
      });
      const ofRows = (count: number, slots: readonly number[]): Tensor =>
        tensor(
          gpu,
          Int32Array.from({ length: rows }, (_, t) => (count > 0 ? (slots[t % count] as number) : -1)),
          [rows],
        );
      const inputs: Tensor[] = [];
      const of = (count: number, { on, dtype, pool, slots }: (typeof pools)[number]): Case => {
        const chosen = ofRows(count, slots);
        inputs.push(chosen);
        const bytes = baseBytes(sizes) + pageBytes(sizes, count, dtype === "f16" ? 2 : 4);
        const share = (baseBytes(sizes) / bytes).toFixed(2);
        return {
          name: `${count} adapters${dtype === "f16" ? ", pages in f16" : ""} (${share} by bytes)`,
          flops: operationsOf(sizes, count > 0 ? r : 0),
          bytes,
          run: () => pool.during(chosen, () => run(on)),
          check: check((row) => (count > 0 ? adapters[row % count] : undefined)),
          ...(dtype === "f16" && { tolerance: 2e-3 }), // A and B rounded, each by up to 2⁻¹¹
        };
      };
      const [wide, half] = pools as [(typeof pools)[number], (typeof pools)[number]];
      const base: Case = {
        name: "base alone",
        flops: operationsOf(sizes, 0),
        bytes: baseBytes(sizes),
        run: () => run(plain),
        check: check(() => undefined),
      };
      return {
        inputs: [...held, ...inputs],
        cases: [base, of(0, wide), of(4, wide), of(rows, wide), of(rows, half)],
        dispose: () => {
          for (const { pool } of pools) pool.destroy();
        },
      };
    },
  };
}

const REGISTERED = 2000;
const RESIDENT = 8;
const IN_USE = 5;
/** Passes between two requests: with 5 at a time each has 5 times as many tokens. */
const PASSES = 4;

/**
 * Many adapters, few places: 8 are resident, 5 in use, and every fourth pass a request ends and another comes, whose adapter is drawn by Zipf's
 * law (the n-th as often as 1/n) and loaded if it has gone. The baseline has the same 5 all the time.
 */
export function fewPlaces(sizes: BlockSizes, registered: number = REGISTERED): SizedContest {
  const { rows, hidden, inside, r } = sizes;
  return {
    name: `mixed batch, ${registered} adapters in ${RESIDENT} places, hidden ${hidden}, r=${r}`,
    group: "mixed-places",
    sizes: { M: rows, hidden, inside, r, registered },
    flops: operationsOf(sizes, r),
    largestBytes: 4 * r * RESIDENT * inside,
    setup: (gpu) => {
      const { layers, run, check, held } = block(gpu, sizes);
      const adapters = Array.from({ length: registered }, (_, n) => adapterOf(sizes, n));
      const on = layers();
      const { pool, slots } = poolOn(on, { pages: RESIDENT * r, maxRank: r, slots: RESIDENT }, adapters);
      for (const slot of slots) pool.release(slot);
      const chosen = tensor(gpu, new Int32Array(rows), [rows]);
      const random = new Random(11);
      const used: { n: number; slot: number }[] = [];
      const take = (n: number): void => void used.push({ n, slot: pool.acquire(`${n}`) as number });
      const mark = (): void =>
        gpu.write(
          chosen,
          Int32Array.from({ length: rows }, (_, t) => used[t % IN_USE]?.slot as number),
        );
      const begin = (): void => {
        for (const { slot } of used.splice(0)) pool.release(slot);
        for (let n = 0; n < IN_USE; n++) take(n);
        mark();
      };
      const zipf = drawZipf(registered, random);
      const costs = {
        flops: operationsOf(sizes, r),
        bytes: baseBytes(sizes) + pageBytes(sizes, IN_USE, 4),
        check: check((row) => adapters[used[row % IN_USE]?.n ?? -1]),
      };
      let passes = 0;
      let isSame = false;
      return {
        inputs: [...held, chosen],
        cases: [
          {
            ...costs,
            name: `the same ${IN_USE} adapters`,
            run: () => {
              if (!isSame) begin();
              isSame = true;
              return pool.during(chosen, () => run(on));
            },
          },
          {
            ...costs,
            name: `a new request every ${PASSES} passes`,
            run: () => {
              if (isSame || used.length === 0) begin();
              isSame = false;
              if (passes++ % PASSES === 0) {
                pool.release((used.shift() as { slot: number }).slot);
                take(zipf());
                mark();
              }
              return pool.during(chosen, () => run(on));
            },
          },
        ],
        dispose: () => pool.destroy(),
      };
    },
  };
}

/** Numbers from 0 on, n as often as 1/(n + 1). */
function drawZipf(count: number, random: Random): () => number {
  const sums = new Float64Array(count);
  let all = 0;
  for (let n = 0; n < count; n++) sums[n] = all += 1 / (n + 1);
  return () => {
    const at = random.uniform(0, all);
    return Math.min(
      count - 1,
      sums.findIndex((upTo) => upTo > at),
    );
  };
}
