import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { compileErrors } from "../../bench/compile.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { assemble, definePart } from "../../src/gpu/kernel.ts";
import { unroll } from "../../src/gpu/unroll.ts";
import { defaultLoraDyPlan, type LoraDyPlan, loraDy, loraDyPlans } from "../../src/kernels/lora-dy.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, readAll, slice, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, type Nd, randomNd, testGpu, upload } from "../harness.ts";
import { findRaces, type RaceCheck } from "../race.ts";
import { loraDyTwin } from "../reference/lora-dy.ts";

const source = readFileSync("src/kernels/lora-dy.wgsl", "utf8");
const ragged = definePart("ragged-dy", readFileSync("src/kernels/parts/ragged-dy.wgsl", "utf8"));

/** Strips of several tiles, of one, and of all. */
const PLANS: LoraDyPlan[] = [
  { name: "apart" },
  { name: "fused, 64 rows, few strips", rows: 64, workgroups: 2 },
  { name: "fused, 64 rows, many strips", rows: 64, workgroups: 100 },
  { name: "fused, 128 rows, few strips", rows: 128, workgroups: 3 },
  { name: "fused, 128 rows, many strips", rows: 128, workgroups: 100 },
];
const RANKS = [1, 3, 4, 12, 16, 33, 64];
/** 1, tile, tile ± 1, 2·tile + 1 (tiles are 64×32, 128×16, and 64×16 at rank 64), primes. */
const SIZES: [M: number, N: number][] = [
  [1, 1],
  [64, 32],
  [63, 31],
  [65, 33],
  [128, 16],
  [127, 15],
  [129, 68],
  [257, 37],
  [131, 101],
];

async function checkPlan(plan: LoraDyPlan, M: number, N: number, R: number): Promise<void> {
  const seed = freshSeed();
  const random = new Random(seed);
  const gpu = await testGpu();
  const dy = randomNd([M, N], random);
  const B = randomNd([N, R], random);
  const u = randomNd([M, R], random);
  const expected = loraDyTwin(dy, B, u, 0.5);
  const { v, dB } = gpu.scope(() => loraDy(upload(gpu, dy), upload(gpu, B), upload(gpu, u), 0.5, plan));
  expect([v.shape, dB.shape]).toEqual([
    [M, R],
    [N, R],
  ]);
  const [vValues, dBValues] = await readAll([v, dB]);
  // Sums of up to 257 products of any sign may cancel.
  expectClose(vValues ?? [], expected.v.data, 3e-5, `v ${[M, N, R]} (seed ${seed})`);
  expectClose(dBValues ?? [], expected.dB.data, 3e-5, `dB ${[M, N, R]} (seed ${seed})`);
  gpu.release(v, dB);
}

test.each(
  PLANS.flatMap((plan) =>
    (plan.name === "apart" ? [3, 16, 65] : RANKS).map((R): [string, number, LoraDyPlan] => [plan.name, R, plan]),
  ),
)("loraDy %s at rank %i equals its f64 twin at every size", async (_, R, plan) => {
  for (const [M, N] of SIZES) await checkPlan(plan, M, N, R);
});

test("loraDy takes leading axes of dy and u as rows and gives them to v", async () => {
  const gpu = await testGpu();
  const random = new Random(3);
  const [dy, B, u] = [randomNd([6, 8], random), randomNd([8, 4], random), randomNd([6, 4], random)];
  const flat = gpu.scope(() => loraDy(upload(gpu, dy), upload(gpu, B), upload(gpu, u), 2));
  for (const plan of PLANS) {
    for (const lead of [[2, 3], [6]]) {
      const got = gpu.scope(() =>
        loraDy(
          upload(gpu, { ...dy, shape: [2, 3, 8] }),
          upload(gpu, B),
          upload(gpu, { ...u, shape: [...lead, 4] }),
          2,
          plan,
        ),
      );
      expect([got.v.shape, got.dB.shape]).toEqual([
        [2, 3, 4],
        [8, 4],
      ]);
      expectClose(await read(got.v), await read(flat.v), 1e-5, "v");
      expectClose(await read(got.dB), await read(flat.dB), 1e-5, "dB");
    }
  }
});

test("loraDy gives the same bits twice", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const dy = upload(gpu, randomNd([150, 70], random));
  const B = upload(gpu, randomNd([70, 16], random));
  const u = upload(gpu, randomNd([150, 16], random));
  for (const plan of PLANS) {
    const [first, second] = [loraDy(dy, B, u, 0.5, plan), loraDy(dy, B, u, 0.5, plan)];
    expect(await readAll([first.v, first.dB])).toEqual(await readAll([second.v, second.dB]));
  }
});

test("loraDy fused takes two dispatches and keeps only its results", async () => {
  const gpu = await testGpu();
  const [dy, B, u] = [empty(gpu, [70, 40], "dy"), empty(gpu, [40, 16], "B"), empty(gpu, [70, 16], "u")];
  const { buffersLive } = gpu.counters();
  gpu.resetCounters();
  const { v, dB } = loraDy(dy, B, u, 1, { name: "fused", rows: 64, workgroups: 4 });
  expect([...gpu.counters().dispatches]).toEqual([
    ["lora-dy", 1],
    ["lora-dy-sums", 1],
  ]);
  expect(gpu.counters().buffersLive).toBe(buffersLive + 2);
  gpu.release(dy, B, u, v, dB);
});

test("loraDy puts v where it is told to", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [dy, B, u] = [
    [70, 12],
    [12, 4],
    [70, 4],
  ].map((shape) => randomNd(shape, random)) as [Nd, Nd, Nd];
  const expected = loraDyTwin(dy, B, u, 0.5);
  for (const plan of PLANS) {
    const all = tensor(gpu, new Float32Array(1024).fill(7), [1024]);
    const out = slice(all, 64, [70, 4]);
    const { v, dB } = gpu.scope(() => loraDy(upload(gpu, dy), upload(gpu, B), upload(gpu, u), 0.5, plan, out));
    expect(v).toBe(out);
    const values = await read(all);
    expectClose(values.slice(64, 344), expected.v.data);
    expect([...values.slice(0, 64), ...values.slice(344)].every((value) => value === 7)).toBe(true);
    expectClose(await read(dB), expected.dB.data);
    gpu.release(all, dB);
  }
  const t = (...shape: number[]): Tensor => empty(gpu, shape, "t");
  expect(() => loraDy(t(3, 4), t(4, 2), t(3, 2), 1, undefined, t(2, 3))).toThrow(
    new ShapeError("loraDy: out must be [...,R] = [3,2], got [2,3]"),
  );
});

test("loraDy over no rows or no columns is zero, and at rank 0 empty", async () => {
  const gpu = await testGpu();
  for (const plan of PLANS)
    for (const [M, N, R] of [
      [0, 5, 3],
      [5, 0, 3],
      [2, 3, 0],
    ] as const) {
      const { v, dB } = loraDy(empty(gpu, [M, N], "dy"), empty(gpu, [N, R], "B"), empty(gpu, [M, R], "u"), 1, plan);
      expect([v.shape, dB.shape]).toEqual([
        [M, R],
        [N, R],
      ]);
      expect([...(await read(v)), ...(await read(dB))]).toEqual(Array((M + N) * R).fill(0));
    }
});

test("loraDy computes ranks above 64 apart", async () => {
  for (const plan of PLANS) await checkPlan(plan, 65, 33, 65);
});

test("loraDy names the shapes that do not fit", async () => {
  const gpu = await testGpu();
  const t = (...shape: number[]) => empty(gpu, shape, "t");
  expect(() => loraDy(t(4), t(4, 2), t(1, 2), 1)).toThrow(
    new ShapeError("loraDy: dy must have at least two axes, got [4]"),
  );
  expect(() => loraDy(t(3, 4), t(8), t(3, 2), 1)).toThrow(
    new ShapeError("loraDy: B must have at least two axes, got [8]"),
  );
  expect(() => loraDy(t(3, 4), t(5, 2), t(3, 2), 1)).toThrow(
    new ShapeError("loraDy: B must be [N,R] = [4,2], got [5,2]"),
  );
  expect(() => loraDy(t(3, 4), t(2, 2, 2), t(3, 2), 1)).toThrow(
    new ShapeError("loraDy: B must be [N,R] = [4,2], got [2,2,2]"),
  );
  expect(() => loraDy(t(3, 4), t(4, 2), t(4, 2), 1)).toThrow(
    new ShapeError("loraDy: u must be [M,R] = [3,2], got [4,2]"),
  );
  expect(() => loraDy(t(2, 3, 4), t(4, 2), t(3, 2, 2), 1)).toThrow(
    new ShapeError("loraDy: u must be [...,R] = [2,3,2], got [3,2,2]"),
  );
  expect(() => loraDy(empty(gpu, [3, 4], "dy", "i32"), t(4, 2), t(3, 2), 1)).toThrow(
    new ShapeError("loraDy: dy must be f32, got i32"),
  );
});

describe("the plan", () => {
  const device = (isSoftware: boolean): Gpu =>
    ({ isSoftware, features: new Set(), limits: { maxComputeWorkgroupStorageSize: 16384 } }) as unknown as Gpu;

  test.each([
    // Few workgroups and four dispatches apart.
    [512, 1024, 16, "fused 128 /128"],
    // 64 MiB of dy saved for 18 MiB and more of partial sums written and read.
    [2048, 8192, 16, "fused 128 /512"],
    [48, 1024, 8, "fused 64 /128"],
    // As many bytes in partial sums as in dy.
    [2048, 8192, 64, "apart"],
    [2048, 8192, 65, "apart"],
    [0, 8192, 16, "apart"],
  ])("of a GPU for %i×%i at rank %i is %s", (M, N, R, name) => {
    expect(defaultLoraDyPlan(device(false), { M, N, R }).name).toBe(name);
    expect(loraDyPlans(device(false), { M, N, R })[0]?.name).toBe(name);
  });

  test("of a CPU adapter is apart", () => {
    expect(defaultLoraDyPlan(device(true), { M: 2048, N: 8192, R: 16 }).name).toBe("apart");
  });

  test("of a GPU can be tuned among five, of a CPU adapter not", () => {
    const shape = { M: 512, N: 1024, R: 16 };
    expect(loraDyPlans(device(false), shape).map(({ name }) => name)).toEqual([
      "fused 128 /128",
      "apart",
      "fused 128 /512",
      "fused 64 /128",
      "fused 64 /512",
    ]);
    expect(loraDyPlans(device(true), shape)).toEqual([{ name: "apart" }]);
    expect(loraDyPlans(device(false), { ...shape, R: 65 })).toEqual([{ name: "apart" }]);
  });
});

describe("lora-dy.wgsl", () => {
  const ramp = (n: number): Float32Array => Float32Array.from({ length: n }, (_, i) => ((i * 7) % 11) / 4 - 1);

  test("as it is sent, with and without the part for ragged rows, compiles without a warning", async () => {
    const { device } = await testGpu();
    const shaders = [source, assemble(source, [ragged])].map((text) => ({ name: "lora-dy", source: unroll(text) }));
    expect(await compileErrors(device, shaders)).toEqual([]);
  });

  // BM / (WG / R4) rows of v to a thread, WG / (BN4 · R4) threads to a block of dB; two strips, the last tile cut.
  const CASES: [string, Record<string, number>, [M: number, N: number, R: number], string][] = [
    ["one thread to a block", { BM: 8, BN4: 2, R4: 2, WG: 4 }, [9, 20, 8], source],
    ["two threads to a block", { BM: 8, BN4: 2, R4: 1, WG: 4 }, [5, 32, 4], source],
    ["ragged", { BM: 8, BN4: 1, R4: 2, WG: 4 }, [9, 15, 7], assemble(source, [ragged])],
  ];
  const race = (constants: Record<string, number>, [M, N, R]: readonly [number, number, number], text: string) => {
    const across = Math.ceil(N / (4 * (constants.BN4 ?? 1)));
    const [strips, blocks] = [2, Math.ceil(M / (constants.BM ?? 1))];
    const pitch = Math.ceil(R / 4) * 4;
    const check: RaceCheck = {
      name: "lora-dy",
      source: text,
      constants,
      groups: [strips, blocks],
      uniforms: { M, N, R, strips, tiles: Math.ceil(across / strips) },
      buffers: {
        dy: ramp(M * N),
        B: ramp(N * R),
        u: ramp(M * R),
        parts: new Float32Array(pitch * (strips * M + blocks * N)).fill(Number.NaN),
      },
    };
    return { check, strips, blocks, pitch };
  };

  test.each(CASES)("has no race, %s", (_, constants, sizes, text) => {
    const { check: grid, strips, blocks, pitch } = race(constants, sizes, text);
    const [M, N, R] = sizes;
    const { races, divergences, outputs } = findRaces(grid);
    expect(races).toEqual([]);
    expect(divergences).toEqual([]);
    const parts = outputs.parts ?? new Float32Array();
    const total = (first: number, count: number, step: number): number =>
      Array.from({ length: count }, (__, p) => parts[first + p * step] ?? Number.NaN).reduce((a, b) => a + b, 0);
    const values = (n: number): Float64Array => Float64Array.from(ramp(n));
    const twin = loraDyTwin(
      { shape: [M, N], data: values(M * N) },
      { shape: [N, R], data: values(N * R) },
      { shape: [M, R], data: values(M * R) },
      1,
    );
    const vs = Array.from({ length: M * R }, (__, i) => total(Math.floor(i / R) * pitch + (i % R), strips, M * pitch));
    const dBs = Array.from({ length: N * R }, (__, i) =>
      total((strips * M + Math.floor(i / R)) * pitch + (i % R), blocks, N * pitch),
    );
    expectClose(vs, twin.v.data, 1e-5, "v");
    expectClose(dBs, twin.dB.data, 1e-5, "dB");
  });

  for (const barrier of [0, 1, 2, 3])
    test.each(CASES.slice(1))(`has one without barrier ${barrier}, %s`, (_, constants, sizes, text) => {
      let n = 0;
      const broken = text.replace(/workgroupBarrier\(\);/g, (call) => (n++ === barrier ? "" : call));
      expect(n, "barriers in the file").toBe(4);
      const { check: grid } = race(constants, sizes, broken);
      expect(findRaces(grid).races.join("\n")).toMatch(/Data race on 'tile'/);
    });
});
