// Products run by an interpreter that reports data races, as `matmul` would send them to a device.
import { expect, test } from "vitest";
import type { HasBuffer } from "../../src/gpu/gpu.ts";
import { type LowRankRows, loraShrinkRows, rowUnits } from "../../src/kernels/lora-rows.ts";
import { type Layout, type MatmulOptions, matmul } from "../../src/kernels/matmul.ts";
import type { MatmulPlan } from "../../src/kernels/matmul-plans.ts";
import { pagedAttention } from "../../src/kernels/paged.ts";
import { topLogits } from "../../src/kernels/top-logits.ts";
import { Random } from "../../src/tensor/random.ts";
import { type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, type Nd, nd, randomNd } from "../harness.ts";
import { findRaces } from "../race.ts";
import { expandTwin, type RowAdapter, shrinkTwin } from "../reference/lora-rows.ts";
import { matmulTwin } from "../reference/matmul.ts";
import { attentionTwin } from "../reference/model-ops.ts";
import { type Recorded, Recorder, type RecorderSettings } from "./recorder.ts";

/** A Gpu that runs what it is sent in the interpreter and notes what races. */
class Interpreter extends Recorder {
  readonly races: string[] = [];
  readonly #edit: (source: string) => string;
  readonly #data = new Map<GPUBuffer, Float32Array>();

  constructor(edit: (source: string) => string, settings: RecorderSettings) {
    super(settings);
    this.#edit = edit;
  }

  override allocate(size: number): GPUBuffer {
    const buffer = super.allocate(size);
    this.#data.set(buffer, new Float32Array(size / 4).fill(Number.NaN));
    return buffer;
  }

  override write({ buffer }: HasBuffer, data: ArrayBufferView): void {
    this.#data.set(
      buffer,
      new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength) as ArrayBuffer),
    );
  }

  protected override record(dispatch: Recorded): void {
    const { sent, uniforms, buffers, groups } = dispatch;
    const ids = Object.entries(buffers);
    const found = findRaces({
      name: sent.key,
      source: this.#edit(sent.source),
      constants: sent.constants,
      groups,
      uniforms,
      buffers: Object.fromEntries(ids.map(([id, buffer]) => [id, this.values(buffer)])),
    });
    this.races.push(...found.races, ...found.divergences);
    for (const [id, buffer] of ids) if (found.outputs[id]) this.#data.set(buffer, found.outputs[id]);
  }

  values(buffer: GPUBuffer): Float32Array {
    return this.#data.get(buffer) ?? new Float32Array();
  }
}

interface Product {
  readonly layout: Layout;
  /** Without one: a CPU adapter's default. */
  readonly plan?: MatmulPlan;
  readonly sizes: readonly [M: number, N: number, K: number, R?: number];
  readonly finish?: boolean;
  /** Each row by an adapter of its own, or none. */
  readonly byRows?: boolean;
}

/** Two workgroups either way, their tiles cut at the ends; two stages of k and a half. */
const tile = { BK: 4, TM: 4, TN: 4, WX: 2, WY: 1 };
const TILED: MatmulPlan = { name: "tiled", family: "tiled", tuned: tile, splits: 1 };
const ROWS: MatmulPlan = { name: "rows", family: "rows", tuned: { TM: 2, TN: 1, WG: 4 }, splits: 1 };
const REGISTERS: MatmulPlan = {
  name: "registers",
  family: "registers",
  tuned: { TM: 4, TN: 4, WG: 4 },
  splits: 1,
};

const PRODUCTS: Product[] = [
  { layout: "nn", plan: TILED, sizes: [6, 12, 12] },
  { layout: "nt", plan: TILED, sizes: [6, 12, 12] },
  { layout: "tn", plan: TILED, sizes: [8, 12, 10] },
  { layout: "nn", plan: TILED, sizes: [5, 11, 7] },
  { layout: "nt", plan: TILED, sizes: [5, 11, 7, 3] },
  { layout: "nt", plan: { ...TILED, tuned: { ...tile, TM: 8, BK: 8 } }, sizes: [9, 11, 20], finish: true },
  { layout: "nn", plan: { ...TILED, splits: 2 }, sizes: [4, 8, 20], finish: true },
  { layout: "nt", plan: REGISTERS, sizes: [5, 11, 7, 3] },
  { layout: "nt", plan: ROWS, sizes: [3, 2, 20] },
  { layout: "nt", plan: ROWS, sizes: [2, 3, 18, 3], finish: true },
  { layout: "nn", plan: REGISTERS, sizes: [5, 11, 5, 2] },
  ...[TILED, { ...TILED, splits: 2 }, ROWS, REGISTERS].flatMap((plan): Product[] => [
    { layout: "nt", plan, sizes: [4, 8, 20], byRows: true },
    { layout: "nt", plan, sizes: [3, 7, 18], byRows: true, finish: true },
  ]),
  { layout: "nt", sizes: [9, 68, 8], byRows: true },
  { layout: "nt", sizes: [2, 136, 8], byRows: true, finish: true },
];
const cases = PRODUCTS.map((product): [string, Product] => {
  const { layout, plan, sizes, finish, byRows } = product;
  return [
    `${plan?.name ?? "software"}${(plan?.splits ?? 1) > 1 ? " with k split" : ""}, ${layout} ${sizes}${byRows ? ", by rows" : ""}${finish ? ", finished" : ""}`,
    product,
  ];
});

/** The adapters in pages, one after the other from the last on, and what `loraShrinkRows` makes of x. */
function rowsOf(
  gpu: Interpreter,
  x: Tensor,
  adapters: readonly RowAdapter[],
  slots: readonly number[],
  N: number,
): LowRankRows {
  const [, K = 0] = x.shape;
  const [R, pages] = [6, 12];
  const [fourK, fourN] = [4 * Math.ceil(K / 4), 4 * Math.ceil(N / 4)];
  const [a, b] = [new Float32Array(pages * fourK), new Float32Array(pages * fourN)];
  const table = new Int32Array(adapters.length * (R + 2));
  let next = pages;
  adapters.forEach(({ A, B, gain }, slot) => {
    const [, r = 0] = A.shape;
    table.set([r, gain ? --next : -1], slot * (R + 2));
    if (gain) b.set(gain.data, next * fourN);
    for (let j = 0; j < r; j++) {
      table[slot * (R + 2) + 2 + j] = --next;
      a.set(A.data.subarray(j * K, (j + 1) * K), next * fourK);
      b.set(B.data.subarray(j * N, (j + 1) * N), next * fourN);
    }
  });
  const chosen = tensor(gpu, Int32Array.from(slots), [slots.length]);
  const units = gpu.isSoftware ? rowUnits(chosen) : undefined;
  const [u] = loraShrinkRows(
    x,
    tensor(gpu, a, [pages, 1, fourK]),
    tensor(gpu, table, [adapters.length, R + 2]),
    chosen,
    units,
    { TJ: 4, WG: 4 },
  );
  return { u: u as Tensor, b: tensor(gpu, b, [pages, fourN]), units };
}

/** Runs a product in the interpreter, each text edited. */
function interpret(
  { layout, plan, sizes: [M, N, K, R = 0], finish, byRows }: Product,
  seed: number,
  edit: (source: string) => string = (source) => source,
): { gpu: Interpreter; actual: Float32Array; expected: Nd } {
  const gpu = new Interpreter(edit, { isSoftware: !plan });
  const random = new Random(seed);
  const x = randomNd(layout === "tn" ? [K, M] : [M, K], random);
  const w = randomNd(layout === "nt" ? [N, K] : [K, N], random);
  const u = randomNd([M, R], random);
  const b = randomNd(layout === "nt" ? [N, R] : [R, N], random);
  const [bias, residual] = [randomNd([N], random), randomNd([M, N], random)];
  const upload = ({ shape, data }: Nd) => tensor(gpu, Float32Array.from(data), shape);
  // Ranks below, at and above what a workgroup makes of a row.
  const adapters = [1, 4, 6].map(
    (r): RowAdapter => ({
      A: randomNd([1, r, K], random),
      B: randomNd([1, r, N], random),
      ...(r === 4 && { gain: randomNd([1, N], random) }),
    }),
  );
  const slots = Array.from({ length: M }, (_, t) => ((t + 2) % 4) - 1);
  const options: MatmulOptions = {
    ...{ scale: 0.5, ...(plan && { plan }) },
    ...(R > 0 && { lowRank: { u: upload(u), b: upload(b), scale: 2 } }),
    ...(byRows && { lowRankRows: rowsOf(gpu, upload(x), adapters, slots, N) }),
    ...(finish && { bias: upload(bias), residual: upload(residual) }),
  };
  const y = matmul(upload(x), upload(w), layout, options);
  const base = matmulTwin(x, w, layout, 0.5, R > 0 ? { u, b, c: 2 } : undefined);
  const own = slots.map((slot) => adapters[slot]);
  const product = byRows ? expandTwin(base, shrinkTwin(x, own, 0), own, 0) : base;
  const expected = product.data.map(
    (value, i) => value + (finish ? (bias.data[i % N] ?? 0) + (residual.data[i] ?? 0) : 0),
  );
  return { gpu, actual: gpu.values(y.buffer).slice(0, y.size), expected: nd(y.shape, expected) };
}

test.each(cases)("no threads race and all of y is right: %s", (_, product) => {
  const seed = freshSeed();
  const { gpu, actual, expected } = interpret(product, seed);
  expect(gpu.races).toEqual([]);
  expectClose(actual, expected.data, 1e-5, `y (seed ${seed})`);
});

/** Products of vectors and matrices as the interpreter gets them right. */
const byColumns = (source: string): string =>
  source
    .replace(
      /(q\[[^\]]+\] \+ i\]|q\[\w+ \+ i\]) \* key\b/g,
      "vec4f(dot($1, key[0]), dot($1, key[1]), dot($1, key[2]), dot($1, key[3]))",
    )
    .replace(/value \* (shared_at\(.*\));/g, "value[0] * $1.x + value[1] * $1.y + value[2] * $1.z + value[3] * $1.w;");

/** Attention of tokens at 129 and 130 of one sequence, of one at 2 of another, and of none, edited. */
function attend(edit: (source: string) => string = (source) => source) {
  const gpu = new Interpreter((source) => edit(byColumns(source)), {});
  const random = new Random(freshSeed());
  const [keys, H, D] = [131, 2, 8];
  const [q, k, v] = [
    randomNd([1, 4, H, D], random),
    randomNd([1, 192, 1, D], random),
    randomNd([1, 192, 1, D], random),
  ];
  const upload = ({ data }: Nd, shape: readonly number[]) => tensor(gpu, Float32Array.from(data), shape);
  const ints = (list: readonly number[], shape = [list.length]) => tensor(gpu, Int32Array.from(list), shape);
  const pages = { k: upload(k, [3, 64, 1, D]), v: upload(v, [3, 64, 1, D]) };
  const tables = ints([0, 1, 2, 2, 0, 0], [2, 3]);
  const tokens = { sequences: ints([0, 0, 1, -1]), positions: ints([129, 130, 2, 0]), tables };
  const plan = { heads: 2, tokens: 2, splits: 2 };
  const o = pagedAttention(upload(q, [4, H, D]), pages, tokens, { scale: 1, plan });
  const of = (from: number, to: number, { data }: Nd, row: number): Nd =>
    nd([1, to - from, row / D, D], data.slice(from * row, to * row));
  const expected = [
    ...attentionTwin(of(0, 2, q, H * D), k, v, 1, keys).data,
    ...attentionTwin(of(2, 3, q, H * D), of(128, 131, k, D), of(128, 131, v, D), 1, 3).data,
    ...new Array<number>(H * D).fill(0),
  ];
  return { gpu, actual: gpu.values(o.buffer).slice(0, o.size), expected };
}

test("no threads race in attention over pages, and all of it is right", () => {
  const { gpu, actual, expected } = attend();
  expect(gpu.races).toEqual([]);
  expectClose(actual, expected, 1e-5, "o");
});

test.each([0, 1, 2])("without barrier %i attention over pages races", (n) => {
  let calls = 0;
  const { gpu } = attend((source) => source.replace(/^( +)meet\(\);/gm, (call) => (calls++ === n ? "" : call)));
  expect(calls % 3).toBe(0);
  expect(gpu.races.join("\n")).toMatch(/Data race on '(tile|rows)'/);
});

/** Where every barrier of a text parts something. */
const GUARDED: [string, number, Product][] = [
  ["matmul-tiled", 2, { layout: "nn", plan: TILED, sizes: [4, 8, 12] }],
  ["matmul-rows", 2, { layout: "nt", plan: ROWS, sizes: [2, 1, 20] }],
  ["lora-shrink-rows", 2, { layout: "nt", plan: REGISTERS, sizes: [3, 4, 20], byRows: true }],
];

test.each(
  GUARDED.flatMap(([name, count, product]) => Array.from({ length: count }, (_, n) => ({ name, count, n, product }))),
)("without its barrier $n threads of $name race", ({ name, count, n, product }) => {
  let barriers = 0;
  const { gpu } = interpret(product, freshSeed(), (source) =>
    source.replace(/workgroupBarrier\(\);/g, (barrier) => (barriers++ === n ? "" : barrier)),
  );
  expect(barriers, `barriers of ${name}`).toBe(count);
  expect(gpu.races.join("\n")).toMatch(/Data race on '(stage|sums)'/);
});

test("a barrier in a function of the kernel's own parts what it should, at the start of a block too", () => {
  const source = `
    @group(0) @binding(0) var<storage, read_write> y: array<f32>;
    var<workgroup> shared: array<f32, 4>;
    fn wait(with_barrier: u32) {
      for (var round = 0u; round < 1u; round += 1u) { workgroupBarrier(); }
    }
    @compute @workgroup_size(4) fn main(@builtin(local_invocation_index) thread: u32) {
      shared[thread] = f32(thread);
      wait(thread + 1u);
      y[thread] = shared[3u - thread];
    }`.replace(/^ {4}/gm, "");
  const check = { name: "wait", groups: [1], uniforms: {}, buffers: { y: new Float32Array(4) } } as const;
  const { races, outputs } = findRaces({ ...check, source });
  expect(races).toEqual([]);
  expect([...(outputs.y ?? [])]).toEqual([3, 2, 1, 0]);
  expect(findRaces({ ...check, source: source.replace("workgroupBarrier();", "") }).races.length).toBeGreaterThan(0);
});

/** The likeliest of a row as a list of 4, of chunks of 16 in two passes, edited. */
function likeliest(edit: (source: string) => string = (source) => source) {
  const gpu = new Interpreter(edit, {});
  const random = new Random(freshSeed());
  const row = Float32Array.from({ length: 30 }, () => random.normal());
  const y = topLogits(tensor(gpu, row, [1, row.length]), tensor(gpu, [0.5], [1]), { TOP: 4, CHUNK: 16, WG: 4 });
  const values = gpu.values(y.buffer);
  const order = [...row.keys()].sort((a, b) => (row[b] as number) - (row[a] as number));
  const logits = order.map((id) => row[id] as number);
  const rest = (temperature: number): number =>
    logits.slice(4).reduce((sum, x) => sum + Math.exp((x - (logits[0] as number)) / temperature), 0);
  return {
    gpu,
    ids: [...new Int32Array(values.buffer, 0, 4)],
    values: values.slice(4, 10),
    expected: { ids: order.slice(0, 4), values: [...logits.slice(0, 4), rest(1), rest(0.5)] },
  };
}

test("no threads race in listing the likeliest of a row, and all of the list is right", () => {
  const { gpu, ids, values, expected } = likeliest();
  expect(gpu.races).toEqual([]);
  expect(ids).toEqual(expected.ids);
  expectClose(values, expected.values, 1e-6, "logits and sums");
});

test.each([0, 1, 2, 3, 4])("without its barrier %i listing the likeliest races", (n) => {
  let calls = 0;
  const { gpu } = likeliest((source) =>
    source.replaceAll("workgroupBarrier();", (call) => (calls++ % 5 === n ? "" : call)),
  );
  expect(calls).toBe(10);
  expect(gpu.races.join("\n")).toMatch(/Data race on '(keys|ids|sums)'/);
});
