import { expect, test } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { encodeFloats } from "../../src/io/dtype.ts";
import { loraShrinkRows, pageWords, rowUnits, SHRINKS, type ShrinkPlan } from "../../src/kernels/lora-rows.ts";
import { type MatmulOptions, matmul } from "../../src/kernels/matmul.ts";
import type { MatmulPlan } from "../../src/kernels/matmul-plans.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { siluTwin } from "../reference/elementwise.ts";
import { expandTwin, type RowAdapter, shrinkTwin } from "../reference/lora-rows.ts";
import { matmulTwin } from "../reference/matmul.ts";
import { Recorder } from "./recorder.ts";
import { REGISTERS, ROWS, SPLIT, SUBGROUP_ROWS, TILED } from "./variants.ts";

const QUADS: MatmulPlan = { ...REGISTERS, name: "registers, by quads", subgroups: true };

/** Each with what it rounds. */
const PLANS: [string, MatmulPlan | undefined, tolerance: number][] = [
  ["the default plan", undefined, 2e-5],
  ...[TILED, SPLIT, REGISTERS, QUADS, ROWS, SUBGROUP_ROWS].map((plan): [string, MatmulPlan, number] => [
    plan.name,
    plan,
    2e-5,
  ]),
];

type Dtype = "f32" | "f16";

/** Adapters of these ranks, of which some have a gain, in pages that lie anywhere; all pages nobody has are NaN. */
function paged(
  gpu: Gpu,
  ranks: readonly number[],
  [G, N, K]: readonly [number, number, number],
  R: number,
  dtype: Dtype,
  random: Random,
) {
  const stored = (m: Nd): Nd => (dtype === "f32" ? m : nd(m.shape, decodedF16(m.data)));
  const adapters = ranks.map(
    (r, i): RowAdapter => ({
      A: stored(randomNd([G, r, K], random)),
      B: stored(randomNd([G, r, N], random, 0.5)),
      ...(i % 2 === 1 && { gain: stored(randomNd([G, N], random, 0.2)) }),
    }),
  );
  const count = ranks.reduce((sum, r) => sum + r + 2, 3);
  const free = Array.from({ length: count }, (_, page) => page);
  const take = (): number => free.splice(Math.floor(random.uniform() * free.length), 1)[0] ?? 0;
  const four = (n: number): number => 4 * Math.ceil(n / 4);
  const a = new Float32Array(count * G * four(K)).fill(Number.NaN);
  const bs = Array.from({ length: G }, () => new Float32Array(count * four(N)).fill(Number.NaN));
  const put = (to: Float32Array, first: number, from: Nd, start: number, length: number): void => {
    to.fill(0, first, first + four(length));
    to.set(from.data.subarray(start, start + length), first);
  };
  const table = new Int32Array(ranks.length * (R + 2)).fill(-1_000_000);
  adapters.forEach(({ A, B, gain }, slot) => {
    const r = ranks[slot] ?? 0;
    const pages = Array.from({ length: r }, take);
    const gainPage = gain ? take() : -1;
    table.set([r, gainPage, ...pages], slot * (R + 2));
    for (let g = 0; g < G; g++) {
      pages.forEach((page, j) => {
        put(a, (page * G + g) * four(K), A, (g * r + j) * K, K);
        put(bs[g] as Float32Array, page * four(N), B, (g * r + j) * N, N);
      });
      if (gain) put(bs[g] as Float32Array, gainPage * four(N), gain, g * N, N);
    }
  });
  const onGpu = (values: Float32Array, shape: number[]): Tensor =>
    dtype === "f32"
      ? tensor(gpu, values, shape)
      : tensor(gpu, new Int32Array(encodeFloats("F16", values).buffer), shape);
  return {
    adapters,
    a: onGpu(a, [count, G, pageWords(K, dtype)]),
    bs: bs.map((b) => onGpu(b, [count, pageWords(N, dtype)])),
    table: tensor(gpu, table, [ranks.length, R + 2]),
  };
}

function decodedF16(values: Float64Array): Float32Array {
  const bytes = encodeFloats("F16", Float32Array.from(values));
  const halves = new Uint16Array(bytes.buffer);
  return Float32Array.from(halves, (h) => {
    const [sign, exponent, fraction] = [h >> 15 ? -1 : 1, (h >> 10) & 31, h & 1023];
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}

const RANKS = [1, 3, 4, 8, 16, 17];

interface Check {
  readonly sizes: readonly [M: number, N: number, K: number];
  readonly G?: number;
  readonly shrink?: ShrinkPlan;
  readonly dtype?: Dtype;
  readonly options?: MatmulOptions;
  readonly finish?: boolean;
  readonly tolerance?: number;
  /** Rows of one adapter together. */
  readonly together?: boolean;
}

/** A mixed batch through G modules: all of it against the twin. */
async function check({
  sizes: [M, N, K],
  G = 2,
  dtype = "f32",
  options = {},
  finish = false,
  shrink,
  tolerance = 2e-5,
  together = false,
}: Check): Promise<void> {
  const seed = freshSeed();
  const random = new Random(seed);
  const gpu = await testGpu();
  const x = randomNd([M, K], random, 1 / Math.sqrt(K));
  const bias = randomNd([N], random);
  const residual = randomNd([M, N], random);
  const slotOf = Array.from({ length: M }, () => Math.floor(random.uniform() * (RANKS.length + 1)) - 1);
  const ws = Array.from({ length: G }, () => randomNd([N, K], random));
  const { adapters, ys } = gpu.scope(() => {
    const pool = paged(gpu, RANKS, [G, N, K], 17, dtype, random);
    const input = upload(gpu, x);
    const slots = tensor(gpu, Int32Array.from(slotOf), [M]);
    const units = together ? rowUnits(slots) : undefined;
    const us = loraShrinkRows(input, pool.a, pool.table, slots, units, shrink);
    return {
      adapters: slotOf.map((slot) => pool.adapters[slot]),
      ys: us.map((u, g) =>
        matmul(input, upload(gpu, ws[g] as Nd), "nt", {
          ...options,
          lowRankRows: { u, b: pool.bs[g] as Tensor, units },
          ...(finish && { bias: upload(gpu, bias), residual: upload(gpu, residual), activation: "silu" }),
        }),
      ),
    };
  });
  for (const [g, y] of ys.entries()) {
    const z = expandTwin(matmulTwin(x, ws[g] as Nd, "nt", options.scale), shrinkTwin(x, adapters, g), adapters, g);
    const sum = nd(
      z.shape,
      z.data.map((value, i) => value + (bias.data[i % N] ?? 0)),
    );
    const finished = nd(
      z.shape,
      siluTwin(sum).data.map((value, i) => value + (residual.data[i] ?? 0)),
    );
    expectClose(
      await read(y),
      (finish ? finished : z).data,
      tolerance,
      `module ${g} of ${[M, N, K]}, ${slotOf} (seed ${seed})`,
    );
  }
  gpu.release(...ys);
}

/** Rows 1, below and above a tile; columns and k ragged or not, columns and k above and below what a workgroup takes at a time. */
const SIZES: [number, number, number][] = [
  [1, 8, 12],
  [3, 5, 7],
  [7, 12, 16],
  [17, 13, 68],
  [9, 20, 301],
  [5, 268, 20],
];

test.each(PLANS)("rows by their own adapters, by %s, equal the f64 twin at every size", async (_, plan, tolerance) => {
  for (const sizes of SIZES) await check({ sizes, tolerance, options: plan ? { plan, scale: 0.5 } : {} });
});

test.each(PLANS)("bias, activation and residual come after a row's own terms, by %s", async (_, plan, tolerance) => {
  for (const N of [13, 132]) await check({ sizes: [9, N, 20], finish: true, tolerance, options: plan ? { plan } : {} });
});

test.each(PLANS)("pages in f16 give what their rounded values do, by %s", async (_, plan, tolerance) => {
  for (const sizes of [
    [7, 12, 16],
    [9, 13, 301],
  ] as const)
    await check({ sizes, dtype: "f16", tolerance, options: plan ? { plan } : {} });
});

test.each(["hardware", "software"] as const)(
  "one module, and three, are shrunk from one reading on %s",
  async (kind) => {
    for (const G of [1, 3]) for (const K of [20, 301]) await check({ sizes: [6, 9, K], G, shrink: SHRINKS[kind] });
  },
);

/** Units of one row and of several, as `row-units.wgsl` finds them. */
function unitsTwin(slots: readonly number[]): [single: number[][], several: number[][]] {
  const open = new Map<string, number[]>();
  const units: number[][] = [];
  for (const [t, slot] of slots.entries()) {
    const key = `${Math.floor(t / 32)} ${slot}`;
    const unit = open.get(key);
    if (unit && unit.length < 4) unit.push(t);
    else {
      const made = [t];
      open.set(key, made);
      units.push(made);
    }
  }
  return [units.filter(({ length }) => length === 1), units.filter(({ length }) => length > 1)];
}

test.each([1, 2, 31, 32, 33, 70])("rows of one slot, four at most of 32, are a unit: %d rows", async (M) => {
  const gpu = await testGpu();
  const seed = freshSeed();
  const random = new Random(seed);
  for (const slotCount of [1, 3, 40]) {
    const slots = Array.from({ length: M }, () => Math.floor(random.uniform() * slotCount) - 1);
    const units = gpu.scope(() => rowUnits(tensor(gpu, Int32Array.from(slots), [M])));
    const values = [...((await read(units)) as unknown as Int32Array)];
    const found = Array.from({ length: M + 1 }, (_, i) => values.slice(4 * i, 4 * i + 4));
    const [single, several] = unitsTwin(slots);
    const padded = (rows: readonly number[]): number[] => [...rows, -1, -1, -1].slice(0, 4);
    expect(found[0], `of ${slots} (seed ${seed})`).toEqual([single.length, several.length, 0, 0]);
    expect(found.slice(1, 1 + single.length)).toEqual(single.map(padded));
    expect(found.slice(M + 1 - several.length)).toEqual(several.map(padded).toReversed());
    gpu.release(units);
  }
});

test("rows of one adapter that are computed together equal the f64 twin at every size", async () => {
  for (const sizes of [...SIZES, [70, 132, 20]] as const) await check({ sizes, together: true });
  for (const dtype of ["f32", "f16"] as const)
    await check({ sizes: [37, 140, 44], G: 3, finish: true, dtype, together: true });
});

test.each(["f32", "f16"] as const)(
  "a row has the same bits alone and beside others of its adapter, %s",
  async (dtype) => {
    const gpu = await testGpu();
    const random = new Random(freshSeed());
    const [M, N, K] = [70, 132, 20];
    const slotOf = Array.from({ length: M }, () => Math.floor(random.uniform() * (RANKS.length + 1)) - 1);
    const [together, alone] = gpu.scope(() => {
      const pool = paged(gpu, RANKS, [1, N, K], 17, dtype, random);
      const [x, w] = [upload(gpu, randomNd([M, K], random)), upload(gpu, randomNd([N, K], random))];
      const slots = tensor(gpu, Int32Array.from(slotOf), [M]);
      const [one, other] = [rowUnits(slots), undefined].map((units) => {
        const [u] = loraShrinkRows(x, pool.a, pool.table, slots, units);
        return matmul(x, w, "nt", { lowRankRows: { u: u as Tensor, b: pool.bs[0] as Tensor, units } });
      }) as [Tensor, Tensor];
      return [one, other] as const;
    });
    expect(await read(together)).toEqual(await read(alone));
    gpu.release(together, alone);
  },
);

test("a product that is cut by rows takes each row's own adapter", async () => {
  await check({ sizes: [200, 4400, 640], G: 1, tolerance: 1e-4 });
});

test.each(["f16", "bf16", "int8", "nf4"] as const)("weights in %s take rows, by every plan", async (format) => {
  const gpu = await testGpu();
  const seed = freshSeed();
  for (const [, plan, tolerance] of [...PLANS, ["widened first", undefined, 2e-5] as const]) {
    const random = new Random(seed);
    const [M, N, K] = plan ? [7, 13, 64] : [130, 13, 64]; // from 128 rows on NF4 may be widened first
    const x = randomNd([M, K], random, 0.1);
    const slotOf = Array.from({ length: M }, (_, t) => (t % (RANKS.length + 1)) - 1);
    const { wide, adapters, y } = gpu.scope(() => {
      const w = packMatrix(gpu, Float32Array.from(randomNd([N, K], random).data), [N, K], format);
      const pool = paged(gpu, RANKS, [1, N, K], 17, "f32", random);
      const input = upload(gpu, x);
      const [u] = loraShrinkRows(input, pool.a, pool.table, tensor(gpu, Int32Array.from(slotOf), [M]));
      const rows = { u: u as Tensor, b: pool.bs[0] as Tensor };
      return {
        wide: unpackMatrix(w),
        adapters: slotOf.map((slot) => pool.adapters[slot]),
        y: matmul(input, w, "nt", { lowRankRows: rows, ...(plan && { plan }) }),
      };
    });
    const product = matmulTwin(x, nd([N, K], await read(wide)), "nt");
    const expected = expandTwin(product, shrinkTwin(x, adapters, 0), adapters, 0);
    expectClose(await read(y), expected.data, tolerance, `${plan?.name} (seed ${seed})`);
    gpu.release(wide, y);
  }
});

test.each(PLANS)("a row without an adapter has the bits it has in a product without any, by %s", async (_, plan) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  for (const [M, N, K] of SIZES) {
    const slotOf = Array.from({ length: M }, (_row, t) => (t % 2 === 0 ? -1 : t % RANKS.length));
    const [mixed, base] = gpu.scope(() => {
      const pool = paged(gpu, RANKS, [1, N, K], 17, "f32", random);
      const [x, w, bias] = [randomNd([M, K], random), randomNd([N, K], random), randomNd([N], random)].map((m) =>
        upload(gpu, m),
      ) as [Tensor, Tensor, Tensor];
      const [u] = loraShrinkRows(x, pool.a, pool.table, tensor(gpu, Int32Array.from(slotOf), [M]));
      const options = { bias, ...(plan && { plan }) };
      return [
        matmul(x, w, "nt", { ...options, lowRankRows: { u: u as Tensor, b: pool.bs[0] as Tensor } }),
        matmul(x, w, "nt", options),
      ] as const;
    });
    const [own, plain] = [await read(mixed), await read(base)];
    for (let t = 0; t < M; t += 2) expect(own.subarray(t * N, (t + 1) * N)).toEqual(plain.subarray(t * N, (t + 1) * N));
    if (M > 1) expect(own).not.toEqual(plain);
    gpu.release(mixed, base);
  }
});

test("on matrix units a row's own terms are added by a second pass", () => {
  const recorder = new Recorder();
  const t = (...shape: number[]): Tensor => empty(recorder, shape, "t");
  const tuned = { UM: 16, UN: 16, UK: 16, TM: 2, TN: 2, WX: 2, WY: 2, BK: 32, BUFFERS: 2, WG: 128 };
  const plan: MatmulPlan = { name: "units", family: "units", tuned, splits: 1 };
  const [u, b] = [t(64, 10), t(9, 64)];
  matmul(t(64, 32), t(64, 32), "nt", { plan, lowRankRows: { u, b } });
  const [product, finish] = recorder.dispatches.slice(-2);
  expect([product?.sent.key.split(" ")[0], finish?.sent.key]).toEqual(["matmul-units", "matmul-splits +lora-rows"]);
  expect(finish?.buffers.parts).toBe(product?.buffers.y);
  expect([finish?.buffers.u, finish?.buffers.b]).toEqual([u.buffer, b.buffer]);
  expect(finish?.uniforms).toMatchObject({ n: 64 * 64, P: 1, low: 5 });
});

test("shapes that do not fit are refused", async () => {
  const gpu = await testGpu();
  gpu.scope(() => {
    const t = (shape: number[], dtype: "f32" | "i32" = "f32"): Tensor => empty(gpu, shape, "t", dtype);
    const [x, w, a, table, slots] = [t([3, 8]), t([5, 8]), t([9, 2, 8]), t([4, 6], "i32"), t([3], "i32")];
    const shrinks =
      (...[x_, a_, table_, slots_]: [Tensor, Tensor, Tensor, Tensor]) =>
      () =>
        loraShrinkRows(x_, a_, table_, slots_);
    expect(shrinks(x, t([9, 2, 7]), table, slots)).toThrow(
      new ShapeError("loraShrinkRows: a must be [pages,G,words of K] = [9,2,8], got [9,2,7]"),
    );
    expect(shrinks(x, a, t([4, 2], "i32"), slots)).toThrow(
      new ShapeError("loraShrinkRows: table must be [slots,R+2], R at least 1, got [4,2]"),
    );
    expect(shrinks(x, a, table, t([2], "i32"))).toThrow(
      new ShapeError("loraShrinkRows: slots must be [M] = [3], got [2]"),
    );
    expect(() => loraShrinkRows(x, a, table, slots, t([3, 4], "i32"))).toThrow(
      new ShapeError("loraShrinkRows: units must be [M+1,4] = [4,4], got [3,4]"),
    );
    expect(shrinks(x, a, table, t([3]))).toThrow(new ShapeError("loraShrinkRows: slots must be i32, got f32"));
    const rows = { u: t([3, 10]), b: t([9, 8]) };
    expect(() => matmul(x, w, "nt", { lowRankRows: { ...rows, b: t([9, 5]) } })).toThrow(
      new ShapeError("matmul: b of rows must be [pages,words of N] = [9,8], got [9,5]"),
    );
    expect(() => matmul(x, w, "nt", { lowRankRows: { ...rows, u: t([2, 10]) } })).toThrow(
      new ShapeError("matmul: u of rows must be [M,2·(1+R)] = [3,10], got [2,10]"),
    );
    expect(() => matmul(x, w, "nt", { lowRankRows: rows, lowRank: { u: t([3, 2]), b: t([5, 2]), scale: 1 } })).toThrow(
      new ShapeError(
        "matmul: low-rank terms by rows need one product without another such term, got x [3,8] and w [5,8] with one",
      ),
    );
  });
});
