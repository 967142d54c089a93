import { expect, test } from "vitest";
import { GpuError } from "../../src/gpu/errors.ts";
import { type Layout, type MatmulOptions, matmul } from "../../src/kernels/matmul.ts";
import type { MatmulPlan } from "../../src/kernels/matmul-plans.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { geluTwin, siluTwin } from "../reference/elementwise.ts";
import { matmulTwin } from "../reference/matmul.ts";
import { Recorder } from "./recorder.ts";

const shapes = (layout: Layout, M: number, N: number, K: number): [number[], number[]] => [
  layout === "tn" ? [K, M] : [M, K],
  layout === "nt" ? [N, K] : [K, N],
];

const LAYOUTS = ["nn", "nt", "tn"] as const;
/** 1, tile, tile ± 1, 2·tile + 1 (the tiles below are 16 and 32), primes, ragged in one axis or all, K below and above a stage. */
const SIZES: [M: number, N: number, K: number][] = [
  [1, 1, 1],
  [16, 16, 16],
  [15, 17, 15],
  [17, 15, 33],
  [33, 31, 7],
  [32, 64, 8],
  [37, 53, 29],
  [20, 28, 32],
  [31, 64, 68],
  [64, 3, 40],
];

const PLANS: MatmulPlan[] = [
  { name: "tiled 16×16", family: "tiled", tuned: { BK: 8, TM: 4, TN: 4, WX: 4, WY: 4 }, splits: 1 },
  { name: "tiled 16×32, deeper stages", family: "tiled", tuned: { BK: 16, TM: 4, TN: 8, WX: 4, WY: 4 }, splits: 1 },
  { name: "tiled 16×16, k split", family: "tiled", tuned: { BK: 8, TM: 4, TN: 4, WX: 4, WY: 4 }, splits: 3 },
  { name: "registers 4×4", family: "registers", tuned: { TM: 4, TN: 4, WG: 8 }, splits: 1 },
  { name: "registers 8×4, by quads", family: "registers", tuned: { TM: 8, TN: 4, WG: 4 }, splits: 1, subgroups: true },
];
/** For "nt" alone. */
const NT: MatmulPlan[] = [
  { name: "rows", family: "rows", tuned: { TM: 4, TN: 2, WG: 32 }, splits: 1 },
  { name: "rows, one at a time", family: "rows", tuned: { TM: 1, TN: 4, WG: 64 }, splits: 1 },
  { name: "rows, by subgroups", family: "rows", tuned: { TM: 2, TN: 4, WG: 64 }, splits: 1, subgroups: true },
];
const CASES: [string, Layout, MatmulPlan | undefined][] = [
  ...LAYOUTS.map((layout): [string, Layout, undefined] => ["the default plan", layout, undefined]),
  ...PLANS.flatMap((plan) => LAYOUTS.map((layout): [string, Layout, MatmulPlan] => [plan.name, layout, plan])),
  ...NT.map((plan): [string, Layout, MatmulPlan] => [plan.name, "nt", plan]),
];

/** Runs one product on fresh inputs and compares all of y with the twin. */
async function check(
  layout: Layout,
  [M, N, K]: readonly number[],
  R: number,
  options: MatmulOptions,
  batch = 1,
  tolerance = 1e-5,
): Promise<void> {
  const seed = freshSeed();
  const random = new Random(seed);
  const gpu = await testGpu();
  const [xs, ws] = shapes(layout, M ?? 0, N ?? 0, K ?? 0);
  const lead = batch > 1 ? [batch] : [];
  const x = randomNd([...lead, ...xs], random);
  const w = randomNd([...lead, ...ws], random);
  const u = randomNd([M ?? 0, R], random);
  const b = randomNd(layout === "nt" ? [N ?? 0, R] : [R, N ?? 0], random);
  const expected = matmulTwin(x, w, layout, options.scale, R > 0 ? { u, b, c: 2 } : undefined);
  const y = gpu.scope(() =>
    matmul(upload(gpu, x), upload(gpu, w), layout, {
      ...options,
      ...(R > 0 && { lowRank: { u: upload(gpu, u), b: upload(gpu, b), scale: 2 } }),
    }),
  );
  expect(y.shape).toEqual(expected.shape);
  expectClose(await read(y), expected.data, tolerance, `${layout} ${[M, N, K, R, batch]} (seed ${seed})`);
  gpu.release(y);
}

test.each(CASES)("matmul by %s, %s, equals its f64 twin at every size", async (_, layout, plan) => {
  for (const size of SIZES) await check(layout, size, 0, { scale: 0.5, ...(plan && { plan }) });
});

test.each(CASES)("matmul by %s, %s, with LoRA columns equals its f64 twin", async (_, layout, plan) => {
  for (const [M, N, K, R] of [
    [10, 8, 12, 1],
    [9, 16, 8, 3],
    [17, 20, 24, 8],
    [35, 33, 31, 16],
    [13, 5, 7, 40],
    [12, 4, 0, 2],
  ] as const)
    await check(layout, [M, N, K], R, { scale: -0.5, ...(plan && { plan }) });
  await check(layout, [10, 5, 4], 3, { scale: 0, ...(plan && { plan }) });
});

test.each(["nn", "nt"] as const)(
  "a product that would take long, %s, is cut into dispatches by rows",
  async (layout) => {
    const [M, N, K, R] = [200, 4400, 640, 4];
    const recorder = new Recorder({ isSoftware: true });
    const t = (...shape: number[]): Tensor => empty(recorder, shape, "t");
    const [[xs, ws], bs] = [shapes(layout, M, N, K), layout === "nt" ? [N, R] : [R, N]];
    matmul(t(...xs), t(...ws), layout, { lowRank: { u: t(M, R), b: t(...bs), scale: 1 }, residual: t(M, N) });
    expect(recorder.dispatches.map(({ uniforms }) => uniforms.M)).toEqual([128, 72]);
    await check(layout, [M, N, K], R, { scale: 0.5 }, 1, 1e-4); // sums of 640 products in f32
  },
);

test.each(CASES)("matmul by %s, %s, multiplies batches pairwise", async (_, layout, plan) => {
  if (plan?.family === "rows") return;
  for (const size of [
    [12, 8, 16],
    [17, 19, 5],
  ])
    await check(layout, size, 0, plan ? { plan } : {}, 3);
});

test.each(CASES)("matmul by %s, %s, adds a bias, activates and adds a residual", async (_, layout, plan) => {
  const [M, N, K] = [18, 21, 9];
  const kinds =
    plan?.name === PLANS[0]?.name && layout === "nn" ? (["silu", "gelu", "geluTanh"] as const) : (["gelu"] as const);
  for (const activation of kinds)
    await checkOp({
      inputs: [...shapes(layout, M, N, K), [N], [M, N]],
      op: (...[x, w, bias, residual]) =>
        matmul(x as Tensor, w as Tensor, layout, {
          ...{ bias: bias as Tensor, residual: residual as Tensor, activation },
          ...(plan && { plan }),
        }),
      twin: (...[x, w, bias, residual]) => {
        const y = matmulTwin(x as Nd, w as Nd, layout);
        const sum = nd(
          y.shape,
          y.data.map((value, at) => value + (bias?.data[at % N] ?? 0)),
        );
        const act = activation === "silu" ? siluTwin(sum) : geluTwin(sum, activation === "gelu" ? "none" : "tanh");
        return nd(
          y.shape,
          act.data.map((value, at) => value + (residual?.data[at] ?? 0)),
        );
      },
      gradients: false,
    });
});

test("all tiles of a product give the same bits", async () => {
  const gpu = await testGpu();
  const random = new Random(7);
  const x = upload(gpu, randomNd([40, 52], random));
  const w = upload(gpu, randomNd([36, 52], random));
  const results = [];
  for (const plan of PLANS.slice(0, 2)) results.push(await read(matmul(x, w, "nt", { plan })));
  expect(results[0]).toEqual(results[1]);
});

test("matmul over no k is zero, and with empty operands empty", async () => {
  const gpu = await testGpu();
  for (const plan of [undefined, ...PLANS]) {
    const options = plan ? { plan } : {};
    const y = matmul(empty(gpu, [3, 0], "x"), empty(gpu, [0, 5], "w"), "nn", options);
    expect([...(await read(y))]).toEqual(Array(15).fill(0));
    expect(matmul(empty(gpu, [0, 4], "x"), empty(gpu, [4, 5], "w"), "nn", options).shape).toEqual([0, 5]);
    expect(matmul(empty(gpu, [2, 4], "x"), empty(gpu, [0, 4], "w"), "nt", options).shape).toEqual([2, 0]);
  }
});

test("matmul folds the leading axes of x into rows when w is one matrix", async () => {
  const gpu = await testGpu();
  const y = matmul(empty(gpu, [2, 3, 8], "x"), empty(gpu, [5, 8], "w"), "nt");
  expect(y.shape).toEqual([2, 3, 5]);
});

test("matmul names the shapes that do not fit", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3], "x");
  const w = empty(gpu, [4, 5], "w");
  expect(() => matmul(x, w)).toThrow(
    new ShapeError('matmul: the inner sizes of "nn" must be equal, got x [2,3] with 3 and w [4,5] with 4'),
  );
  expect(() => matmul(empty(gpu, [3], "x"), w)).toThrow(
    new ShapeError("matmul: x and w must have at least two axes, got [3] and [4,5]"),
  );
  expect(() => matmul(empty(gpu, [2, 2, 4], "x"), empty(gpu, [3, 4, 5], "w"))).toThrow(
    new ShapeError("matmul: the leading axes of x and w must be equal, got x [2,2,4] and w [3,4,5]"),
  );
  const v = empty(gpu, [3, 5], "w");
  expect(() => matmul(x, v, "nn", { lowRank: { u: w, b: w, scale: 1 } })).toThrow(
    new ShapeError("matmul: u must be [M,R] = [2,5], got [4,5]"),
  );
  expect(() => matmul(x, v, "nn", { bias: x })).toThrow(new ShapeError("matmul: bias must be [N] = [5], got [2,3]"));
  expect(() => matmul(x, v, "nn", { residual: x })).toThrow(
    new ShapeError("matmul: residual must have the shape of y = [2,5], got [2,3]"),
  );
  expect(() => matmul(empty(gpu, [2, 3], "x", "i32"), v)).toThrow(new ShapeError("matmul: x must be f32, got i32"));
});

test("a product with more workgroups than WebGPU dispatches names the numbers", async () => {
  const gpu = await testGpu();
  const plan: MatmulPlan = { name: "t", family: "tiled", tuned: { BK: 4, TM: 4, TN: 4, WX: 1, WY: 1 }, splits: 1 };
  expect(() => matmul(empty(gpu, [262_141, 1], "x"), empty(gpu, [1, 1], "w"), "nn", { plan })).toThrow(
    new GpuError("matmul-tiled: at most 65535 workgroups per axis, got 1×65536×1. Use a smaller batch"),
  );
});

/** Blocks of columns, which hold more rows than there are: the rows of matrix m [R,G·C] in G matrices [P,C], what is left 7. */
function inBlocks({ shape: [R = 0, columns = 0], data }: Nd, G: number, P: number): Nd {
  const C = columns / G;
  const blocks = nd([G, P, C], new Float64Array(G * P * C).fill(7));
  data.forEach((value, at) => {
    const [row, column] = [Math.floor(at / columns), at % columns];
    blocks.data[(Math.floor(column / C) * P + row) * C + (column % C)] = value;
  });
  expect(data.length).toBe(R * columns);
  return blocks;
}

/** G blocks of C columns in the axis that is blocked; P rows are held. */
const BLOCKED: [rows: number, G: number, C: number, other: number, P: number][] = [
  [5, 3, 8, 20, 8],
  [17, 2, 16, 12, 17],
  [1, 3, 4, 16, 16],
  [9, 3, 3, 7, 64],
  [6, 1, 12, 8, 6],
];

test.each(CASES)("matmul by %s, %s, equals its f64 twin with its columns in blocks", async (_, layout, plan) => {
  for (const [rows, G, C, other, P] of BLOCKED) {
    const seed = freshSeed();
    const random = new Random(seed);
    const gpu = await testGpu();
    const options = { scale: 0.5, blocked: true, ...(plan && { plan }) };
    const [M, N, K] = layout === "tn" ? [G * C, other, rows] : [rows, G * C, other];
    const [xs, ws] = shapes(layout, M, N, K);
    const [x, w] = [randomNd(xs, random), randomNd(ws, random)];
    const expected = matmulTwin(x, w, layout, 0.5);
    const y = gpu.scope(() => {
      if (layout === "tn") return matmul(upload(gpu, inBlocks(x, G, P)), upload(gpu, w), layout, options);
      const out = upload(gpu, nd([G, P, C], new Float64Array(G * P * C).fill(7)));
      return matmul(upload(gpu, x), upload(gpu, w), layout, { ...options, out });
    });
    const want = layout === "tn" ? expected : inBlocks(expected, G, P);
    expect(y.shape).toEqual(want.shape);
    expectClose(await read(y), want.data, 1e-5, `${layout} ${[rows, G, C, other, P]} (seed ${seed})`);
    gpu.release(y);
  }
});

test("matmul names the shapes of blocks that do not fit", async () => {
  const gpu = await testGpu();
  const t = (...shape: number[]): Tensor => empty(gpu, shape, "t");
  expect(() => matmul(t(5, 8), t(12, 8), "nt", { blocked: true })).toThrow(
    new ShapeError("matmul: blocked columns of y need an out, got none"),
  );
  expect(() => matmul(t(5, 8), t(12, 8), "nt", { blocked: true, out: t(3, 4, 4) })).toThrow(
    new ShapeError("matmul: out must be [G,P,N/G], P at least M, = [3,5,4], got [3,4,4]"),
  );
  expect(() => matmul(t(3, 4, 4), t(5, 8), "tn", { blocked: true })).toThrow(
    new ShapeError("matmul: x must be [G,P,M/G], P at least K, = [3,5,4], got [3,4,4]"),
  );
});
