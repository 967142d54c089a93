// Keys and values in pages: what is written where, and attention over them against the twin of a plain row.
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { copyTo } from "../../src/kernels/copy-rows.ts";
import { type PagedAttentionOptions, pagedAttention, pagedPlan, pagedWrite } from "../../src/kernels/paged.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { attentionTwin } from "../reference/model-ops.ts";

interface Case extends PagedAttentionOptions {
  readonly page: number;
  readonly H: number;
  readonly G: number;
  readonly D: number;
  /** Of each sequence: tokens that are in the cache before, and those of this batch. */
  readonly sequences: readonly (readonly [before: number, now: number])[];
  readonly half?: boolean;
}

const shuffled = (n: number, random: Random): number[] => {
  const all = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [all[i], all[j]] = [all[j] as number, all[i] as number];
  }
  return all;
};

const toHalf = (x: number): number => Math.fround(Math.round(x * 64) / 64);

/** Writes in two batches, pages in random places, a token of no sequence between; each sequence against the twin of it alone. */
async function check({ page, H, G, D, sequences, half = false, ...options }: Case): Promise<void> {
  const gpu = await testGpu();
  const seed = freshSeed();
  const random = new Random(seed);
  const scale = options.scale ?? 1 / Math.sqrt(D);
  const most = Math.max(...sequences.map(([before, now]) => Math.ceil((before + now) / page)));
  const P = sequences.length * most + 1;
  const free = shuffled(P, random);
  const tables = Int32Array.from({ length: sequences.length * most }, (_, i) => free[i] ?? 0);
  // In f16 the values are such that it holds them exactly.
  const values = (shape: readonly number[]): Nd => {
    const made = randomNd(shape, random);
    return half ? nd(shape, made.data.map(toHalf)) : made;
  };
  const rows = sequences.map(([before, now]) => ({
    before,
    now,
    q: values([1, now, H, D]),
    k: values([1, before + now, G, D]),
    v: values([1, before + now, G, D]),
  }));
  const [k, v] = [0, 1].map(() =>
    half ? empty(gpu, [P, page, G, D / 2], "test", "i32") : empty(gpu, [P, page, G, D], "test"),
  );
  if (!k || !v) throw new Error("unreachable");
  const ints = (list: readonly number[]) => tensor(gpu, Int32Array.from(list), [list.length]);
  const batch = (part: "before" | "now") => {
    const tokens = rows.flatMap((row, s) => {
      const start = part === "before" ? 0 : row.before;
      return Array.from({ length: row[part] }, (_, i) => ({ s, at: start + i }));
    });
    const all = [...tokens, { s: -1, at: 0 }];
    const take = (name: "k" | "v"): Nd => {
      const data = all.flatMap(({ s, at }) =>
        Array.from({ length: G * D }, (_, e) => (s < 0 ? 9 : (rows[s]?.[name].data[at * G * D + e] ?? 0))),
      );
      return nd([all.length, G, D], data);
    };
    const places = {
      sequences: ints(all.map(({ s }) => s)),
      positions: ints(all.map(({ at }) => at)),
      tables: tensor(gpu, tables, [sequences.length, most]),
    };
    pagedWrite(upload(gpu, take("k")), upload(gpu, take("v")), { k, v }, places);
    return places;
  };
  batch("before");
  const places = batch("now");
  const q = nd(
    [rows.reduce((sum, { now }) => sum + now, 1), H, D],
    [...rows.flatMap((row) => [...row.q.data]), ...Array.from({ length: H * D }, () => 1)],
  );
  const o = await read(pagedAttention(upload(gpu, q), { k, v }, places, { ...options, scale }));
  const expected = rows.flatMap((row) => [
    ...attentionTwin(row.q, row.k, row.v, scale, row.before + row.now, {
      ...(options.window !== undefined && { window: options.window }),
      ...(options.softCap !== undefined && { softCap: options.softCap }),
    }).data,
  ]);
  expectClose(o, [...expected, ...Array.from({ length: H * D }, () => 0)], 1e-5, `o (seed ${seed})`);
}

const BATCHES: readonly Case["sequences"][] = [
  [[0, 1]],
  [[7, 1]],
  [
    [0, 5],
    [16, 1],
    [3, 9],
  ],
  [
    [31, 1],
    [0, 33],
    [1, 1],
    [129, 2],
  ],
];

/** Tiles that are cut at the first token, in between, and not at all; ends at a split's, one before, one after, and before the last splits begin. */
const LONG: readonly Case["sequences"][] = [
  [[0, 1]],
  [
    [127, 1],
    [0, 1],
    [128, 1],
    [383, 1],
    [50, 7],
  ],
  [
    [639, 2],
    [0, 9],
    [126, 5],
  ],
];
const PLANS = [
  [1, 1, 5],
  [6, 1, 3],
  [1, 8, 1],
  [3, 3, 7],
] as const;

test("a plan has tiles of up to 8 rows, and splits where a GPU would have little to do", () => {
  const planOf = (...sizes: [T: number, H: number, G: number, longest: number]) => {
    const { heads, tokens, splits } = pagedPlan(false, ...sizes);
    return [heads, tokens, splits];
  };
  expect(planOf(1, 32, 8, 4096)).toEqual([4, 1, 32]);
  expect(planOf(1, 32, 8, 131_072)).toEqual([4, 1, 128]);
  expect(planOf(1, 32, 8, 100)).toEqual([4, 1, 1]);
  expect(planOf(32, 32, 8, 4096)).toEqual([4, 1, 4]);
  expect(planOf(256, 32, 8, 4096)).toEqual([4, 2, 1]);
  expect(planOf(64, 9, 3, 8192)).toEqual([3, 2, 10]);
  expect(planOf(64, 14, 2, 100)).toEqual([7, 1, 1]);
  expect(planOf(64, 8, 8, 100)).toEqual([1, 8, 1]);
  expect(planOf(1, 22, 2, 100)).toEqual([1, 1, 1]);
  expect(pagedPlan(true, 1, 9, 3, 4096)).toEqual({ heads: 3, tokens: 1, splits: 5 });
  expect(pagedPlan(true, 8, 9, 3, 4096).splits).toBe(1);
});

describe.each([true, false])("as where isSoftware is %s", (isSoftware) => {
  let before: boolean;
  beforeEach(async () => {
    const gpu = await testGpu();
    before = gpu.isSoftware;
    Object.assign(gpu, { isSoftware });
  });
  afterEach(async () => {
    Object.assign(await testGpu(), { isSoftware: before });
  });

  test("attention over pages equals attention over each sequence alone, for prefill and decoding in one batch", async () => {
    for (const page of [1, 4, 16])
      for (const sequences of BATCHES)
        for (const [H, G, D] of [
          [1, 1, 4],
          [4, 2, 8],
          [3, 1, 20],
        ] as const)
          await check({ page, H, G, D, sequences });
  });

  test("tiles and splits of any kind give the same, wherever a sequence ends or has no keys for a split", async () => {
    for (const [heads, tokens, splits] of PLANS)
      for (const sequences of LONG)
        for (const [page, options] of [
          [1, { window: 100 }],
          [32, { window: 300, softCap: 2, scale: 0.7 }],
          [16, {}],
        ] as const) {
          const [G, D] = page === 1 ? [2, 4] : [1, 12];
          const plan = { heads, tokens, splits };
          await check({ page, H: 6 * G, G, D, sequences, half: page === 32, plan, ...options });
        }
  });

  test("with many tokens, and with long tables, the plan of their sizes is right too", async () => {
    const sequences = [[5, 1], [0, 1], [200, 71], [0, 17]] as const; // biome-ignore format: a line
    for (const [H, G] of [
      [2, 2],
      [7, 1],
      [10, 1],
      [32, 2],
    ] as const)
      await check({ page: 16, H, G, D: 4, sequences });
    await check({ page: 16, H: 4, G: 1, D: 8, sequences: [[1023, 1], [0, 1], [130, 1]] }); // biome-ignore format: a line
  });

  test("a traced call with splits is right for a sequence of any length", async () => {
    const gpu = await testGpu();
    const random = new Random(freshSeed());
    const [keys, H, D, page] = [600, 2, 8, 16];
    const [q, k, v] = [
      randomNd([1, 1, H, D], random),
      randomNd([1, keys, 1, D], random),
      randomNd([1, keys, 1, D], random),
    ];
    const most = Math.ceil(keys / page);
    const tables = tensor(
      gpu,
      Int32Array.from({ length: most }, (_, i) => most - 1 - i),
      [1, most],
    );
    const ints = (list: Int32Array) => tensor(gpu, list, [list.length]);
    const all = {
      sequences: ints(new Int32Array(keys)),
      positions: ints(Int32Array.from({ length: keys }, (_, i) => i)),
      tables,
    };
    const pages = { k: empty(gpu, [most, page, 1, D], "test"), v: empty(gpu, [most, page, 1, D], "test") };
    const upTo = ({ data }: Nd, n: number): Nd => nd([1, n, 1, D], data.slice(0, n * D));
    pagedWrite(upload(gpu, nd([keys, 1, D], k.data)), upload(gpu, nd([keys, 1, D], v.data)), pages, all);
    const one = { sequences: ints(Int32Array.of(0)), positions: ints(Int32Array.of(0)), tables };
    const [asked, o] = [upload(gpu, nd([1, H, D], q.data)), empty(gpu, [1, H, D], "test")];
    const workspace: GPUBuffer[] = [];
    const options = { scale: 1, plan: { heads: 2, tokens: 1, splits: 4 } };
    const plan = gpu.trace(() => copyTo(pagedAttention(asked, pages, one, options), o), workspace);
    for (const length of [600, 1, 128, 129, 511, 513, 2]) {
      gpu.write(one.positions, Int32Array.of(length - 1));
      plan.run();
      const expected = attentionTwin(q, upTo(k, length), upTo(v, length), 1, length);
      expectClose(await read(o), expected.data, 1e-5, `o of ${length}`);
    }
    plan.destroy();
    gpu.release(...workspace.map((buffer) => ({ buffer })));
  });

  test("a window, a cap and a scale do what they do to a plain row", async () => {
    for (const sequences of BATCHES)
      for (const options of [{ window: 1 }, { window: 6 }, { softCap: 2 }, { window: 5, softCap: 3, scale: 0.7 }])
        await check({ page: 4, H: 2, G: 1, D: 8, sequences, ...options });
  });

  test("pages in f16 give what f16 holds", async () => {
    for (const sequences of BATCHES) await check({ page: 8, H: 4, G: 2, D: 8, sequences, half: true });
  });
});

test("f16 pages round to nearest, ties to even", async () => {
  const gpu = await testGpu();
  const keys = tensor(gpu, [1 + 2 ** -11, 1 + 3 * 2 ** -11, 65519, -1e-8], [1, 1, 4]);
  const [k, v] = [empty(gpu, [1, 1, 1, 2], "test", "i32"), empty(gpu, [1, 1, 1, 2], "test", "i32")];
  const zero = tensor(gpu, Int32Array.of(0), [1]);
  pagedWrite(keys, keys, { k, v }, { sequences: zero, positions: zero, tables: tensor(gpu, Int32Array.of(0), [1, 1]) });
  const [bytes = new ArrayBuffer(0)] = await gpu.read([k]);
  const words = [...new Uint32Array(bytes)].map((word) => word.toString(16).padStart(8, "0"));
  expect(words).toEqual(["3c023c00", "80007bff"]);
});

test("shapes that do not fit are refused, with the rule and what came", async () => {
  const gpu = await testGpu();
  const ids = tensor(gpu, Int32Array.of(0), [1]);
  const tokens = { sequences: ids, positions: ids, tables: tensor(gpu, Int32Array.of(0), [1, 1]) };
  const pages = (page: number, D = 4) => {
    const k = empty(gpu, [1, page, 1, D], "test");
    return { k, v: k };
  };
  const refused = (run: () => unknown, message: string): void => expect(run).toThrow(new ShapeError(message));
  const q = empty(gpu, [1, 1, 4], "test");
  refused(
    () => pagedAttention(empty(gpu, [1, 1, 6], "test"), pages(4, 6), tokens),
    "pagedAttention: D must be a multiple of 4, got 6",
  );
  refused(
    () => pagedAttention(q, pages(3), tokens),
    "pagedAttention: a page must hold a power of two of tokens, got 3",
  );
  refused(
    () => pagedWrite(q, q, pages(4), { ...tokens, sequences: tensor(gpu, Int32Array.of(0, 0), [2]) }),
    "pagedWrite: sequences must be [T] = [1], got [2]",
  );
  refused(() => pagedWrite(q, q, pages(4), { ...tokens, tables: ids }), "pagedWrite: tables must be [S,most], got [1]");
  refused(
    () => pagedAttention(q, pages(4), tokens, { window: 0 }),
    "pagedAttention: window must be a whole number of keys from 1 on, got 0",
  );
  refused(() => pagedAttention(q, pages(4), tokens, { softCap: 0 }), "pagedAttention: softCap must be above 0, got 0");
  refused(
    () => pagedAttention(q, pages(4), tokens, { plan: { heads: 2, tokens: 1, splits: 1 } }),
    "pagedAttention: plan.heads must divide 1 heads of a key head, got 2",
  );
  const two = empty(gpu, [1, 4, 2, 4], "test");
  refused(
    () => pagedAttention(empty(gpu, [1, 3, 4], "test"), { k: two, v: two }, tokens),
    "pagedAttention: query heads must be a multiple of key heads, got 3 and 2",
  );
});
