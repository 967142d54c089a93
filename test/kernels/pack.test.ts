import { expect, test } from "vitest";
import { decodeFloats } from "../../src/io/dtype.ts";
import { type Layout, matmul } from "../../src/kernels/matmul.ts";
import type { MatmulPlan } from "../../src/kernels/matmul-plans.ts";
import { type PackOptions, packMatrix } from "../../src/kernels/pack.ts";
import { unpackMatrix, withPlainScales } from "../../src/kernels/unpack.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import type { PackedFormat, PackedMatrix } from "../../src/tensor/packed.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, slice, type Tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, randomNd, testGpu, upload } from "../harness.ts";
import { matmulTwin } from "../reference/matmul.ts";
import { unpackTwin } from "../reference/pack.ts";

type Case = [string, PackedFormat, PackOptions];
const CASES: Case[] = [
  ["f16", "f16", {}],
  ["bf16", "bf16", {}],
  ["int8 by rows", "int8", {}],
  ["int8 by groups", "int8", { group: 4 }],
  ["nf4", "nf4", {}],
  ["nf4 with double quantisation", "nf4", { doubleQuant: true }],
];

/** Half the widest gaps: between NF4's two lowest levels, and in the highest decade of the dynamic map. */
const NF4_ERROR = 0.1519036;
const MAP_ERROR = 0.0070313;

/** Levels of the dynamic map, as bits, that f32 arithmetic in the published order leaves beside the nearest; as PyTorch 2.13 does. */
const KNOWN_MAP = [
  [128, 0x3513a3b7],
  [129, 0x365a1a94],
  [138, 0x3a016f01],
  [176, 0x3d728f5d],
  [191, 0x3ddb3334],
  [234, 0x3f363334],
] as const;

/** The bounds that bitsandbytes decides NF4 by. */
const NF4_BOUNDS = [
  -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
  -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
  0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
];

const bytesOf = async ({ gpu, words }: PackedMatrix): Promise<ArrayBuffer> =>
  (await gpu.read([words]))[0] ?? new ArrayBuffer();

const scalesOf = async ({ gpu, scales }: PackedMatrix): Promise<ArrayBuffer> =>
  (await gpu.read(scales ? [scales] : []))[0] ?? new ArrayBuffer();

/** The f32 one unit of the last place above. */
function nextUp(value: number): number {
  const f32 = Float32Array.of(value);
  const bits = new Int32Array(f32.buffer);
  bits[0] = (bits[0] ?? 0) + (value > 0 ? 1 : -1);
  return f32[0] ?? Number.NaN;
}

const padded = (values: readonly number[], length: number): Float32Array => {
  const all = new Float32Array(length);
  all.set(values);
  return all;
};

const released = ({ gpu, words, scales }: PackedMatrix): void => gpu.release(words, ...(scales ? [scales] : []));

test.each(["f16", "bf16"] as const)("%s keeps and unpacks every value it can hold", async (format) => {
  const gpu = await testGpu();
  const finite = format === "f16" ? (h: number) => (h & 0x7c00) < 0x7c00 : (h: number) => (h & 0x7f80) < 0x7f80;
  const halves = Uint16Array.from({ length: 65_536 }, (_, h) => h).filter(finite);
  const values = decodeFloats(format === "f16" ? "F16" : "BF16", new Uint8Array(halves.buffer));
  const w = packMatrix(gpu, values, [values.length / 4, 4], format);
  expect(new Uint16Array(await bytesOf(w))).toEqual(halves);
  expect([...(await unpackTwin(w)).data]).toEqual([...values]);
  // WGSL lets a device take numbers below the least normal one for zero.
  const least = format === "f16" ? 2 ** -14 : 2 ** -126;
  const y = await read(unpackMatrix(w));
  const wrong = values.findIndex((value, i) => y[i] !== value && !(y[i] === 0 && Math.abs(value) < least));
  expect(wrong, `${values[wrong]} became ${y[wrong]}`).toBe(-1);
});

test("f16 and bf16 round to nearest, ties to even, two to a word", async () => {
  const gpu = await testGpu();
  const ties = Float32Array.of(1 + 2 ** -11, 1 + 3 * 2 ** -11, 65_519, 65_520);
  expect([...new Uint16Array(await bytesOf(packMatrix(gpu, ties, [1, 4], "f16")))]).toEqual(
    [0x3c00, 0x3c02, 0x7bff, 0x7c00], // biome-ignore format: one line
  );
  const upper = Float32Array.of(1 + 2 ** -8, 1 + 3 * 2 ** -8, -2, 3.4e38);
  expect([...new Uint16Array(await bytesOf(packMatrix(gpu, upper, [1, 4], "bf16")))]).toEqual(
    [0x3f80, 0x3f82, 0xc000, 0x7f80], // biome-ignore format: one line
  );
});

test("int8 has a scale for each row, or group of a row, and rounds ties to even", async () => {
  const gpu = await testGpu();
  const values = Float32Array.of(127, 0.5, 1.5, -2.5, -254, 2, 1, 3, 0, 0, 0, 0, 1, -1, 0, 0.5);
  const rows = packMatrix(gpu, values, [2, 8], "int8");
  expect([rows.group, rows.doubleQuant, rows.shape, rows.scales?.dtype]).toEqual([8, false, [2, 8], "f32"]);
  expect([...new Int8Array(await bytesOf(rows))]).toEqual([64, 0, 1, -1, -127, 1, 0, 2, 0, 0, 0, 0, 127, -127, 0, 64]);
  expect(new Float32Array(await scalesOf(rows))).toEqual(Float32Array.of(2, 1 / 127));
  const odd = packMatrix(gpu, Float32Array.of(...values.slice(0, 12)), [1, 12], "int8");
  expect([odd.group, ...new Float32Array(await scalesOf(odd))]).toEqual([4, 2, 2, 2]);
  const groups = packMatrix(gpu, values, [2, 8], "int8", { group: 4 });
  expect([...new Int8Array(await bytesOf(groups))].slice(0, 12)).toEqual([127, 0, 2, -2, -127, 1, 0, 2, 0, 0, 0, 0]);
  expect(new Float32Array(await scalesOf(groups))).toEqual(Float32Array.of(1, 2, 0, 1 / 127));
  expect([...(await read(unpackMatrix(groups)))].slice(8, 12)).toEqual([0, 0, 0, 0]);
});

test("nf4 decides at the bounds of bitsandbytes, and puts the first of a pair into the high half", async () => {
  const gpu = await testGpu();
  const at = NF4_BOUNDS.flatMap((bound) => [Math.fround(bound), nextUp(bound)]);
  const w = packMatrix(gpu, padded([...at, -1, 1], 64), [4, 16], "nf4");
  const codes = [...new Uint8Array(await bytesOf(w))].flatMap((pair) => [pair >> 4, pair & 15]);
  expect(codes).toEqual([...NF4_BOUNDS.flatMap((_, i) => [i, i + 1]), 0, 15, ...Array(32).fill(7)]);
  expect([...new Float32Array(await scalesOf(w))]).toEqual([1]);
});

test("nf4 keeps its own levels in every block, the last one short, and zeros stay zeros, by level 0 or, with a scale of 0, by the lowest", async () => {
  const gpu = await testGpu();
  const codes = Uint8Array.from({ length: 22 * 8 }, (_, i) => (i < 64 ? i % 16 : i < 128 ? 7 : 15 - (i % 16)));
  const pairs = Uint8Array.from(
    { length: codes.length / 2 },
    (_, i) => 16 * (codes[2 * i] ?? 0) + (codes[2 * i + 1] ?? 0),
  );
  const w = packMatrix(gpu, new Float32Array(codes.length).fill(1), [22, 8], "nf4");
  gpu.write(w.words, pairs);
  gpu.write(w.scales ?? w.words, Float32Array.of(0.5, 0, 3));
  const values = await read(unpackMatrix(w));
  for (const doubleQuant of [false, true]) {
    const again = packMatrix(gpu, values, [22, 8], "nf4", { doubleQuant });
    expect(new Uint8Array(await bytesOf(again))).toEqual(
      doubleQuant ? pairs : pairs.map((pair, i) => (i >= 32 && i < 64 ? 0 : pair)),
    );
    expect(await read(unpackMatrix(again)).then((y) => y.subarray(64, 128).every((value) => value === 0))).toBe(true);
  }
});

test("double quantisation keeps the map, the mean, and a scale for each 256 blocks", async () => {
  const gpu = await testGpu();
  const seed = freshSeed();
  const random = new Random(seed);
  const blocks = 300;
  const absmax = Float32Array.from({ length: blocks }, () => random.uniform(0.5, 1));
  const values = new Float32Array(64 * blocks).map((_, i) => (i % 64 === 5 ? -(absmax[Math.floor(i / 64)] ?? 0) : 0));
  const w = packMatrix(gpu, values, [blocks, 64], "nf4", { doubleQuant: true });
  const bytes = await scalesOf(w);
  expect([w.scales?.dtype, bytes.byteLength]).toEqual(["i32", 4 * (256 + 1 + 2 * 65)]);
  const floats = new Float32Array(bytes);

  const levels = [0, 1];
  for (let i = 0; i < 7; i++)
    for (let j = 0; j < 2 ** i; j++)
      for (const sign of [-1, 1]) levels.push(sign * 10 ** (i - 6) * (0.1 + (0.9 * (j + 0.5)) / 2 ** i));
  levels.sort((a, b) => a - b);
  expect(levels.findIndex((level, i) => !(Math.abs((floats[i] ?? 0) - level) <= 1.8e-7 * Math.abs(level)))).toBe(-1);
  const bits = new Uint32Array(bytes);
  expect(KNOWN_MAP.map(([i]) => bits[i])).toEqual(KNOWN_MAP.map(([, known]) => known));

  const mean = absmax.reduce((sum, scale) => sum + scale, 0) / blocks;
  expect(Math.abs((floats[256] ?? 0) - mean) <= 1e-7, `offset (seed ${seed})`).toBe(true);
  for (const [at, from, to] of [
    [257, 0, 256],
    [322, 256, 300],
  ] as const) {
    const outer = Math.max(...absmax.subarray(from, to).map((scale) => Math.abs(scale - (floats[256] ?? 0))));
    expect(floats[at], `outer scale (seed ${seed})`).toBe(Math.fround(outer));
  }
});

test.each(CASES)("%s unpacks to what its bytes say, near to what was packed", async (_, format, options) => {
  const gpu = await testGpu();
  const seed = freshSeed();
  const random = new Random(seed);
  for (const shape of [
    [1, 4],
    [3, 12],
    [5, 60],
    [7, 68],
    [130, 132],
  ] as const) {
    const { data } = randomNd(shape, random, 0.05);
    const w = packMatrix(gpu, Float32Array.from(data), shape, format, options);
    const twin = await unpackTwin(w);
    const y = unpackMatrix(w);
    expect(y.shape).toEqual([...shape]);
    const values = await read(y);
    const span = format === "int8" ? (options.group ?? shape[1]) : 64;
    const most = blocksOf(data, span);
    const spread = Math.max(...most) - Math.min(...most);
    const wrong = values.findIndex((value, i) => {
      const [expected = Number.NaN, original = Number.NaN] = [twin.data[i], data[i]];
      // A scale times a code is rounded once; a fused multiply-add may round a scale itself otherwise.
      const unit = { f16: 0, bf16: 0, int8: 2 ** -23, nf4: 2 ** -23 }[format];
      const largest = most[Math.floor(i / span)] ?? 0;
      const allowed = {
        f16: Math.max(2 ** -11 * Math.abs(original), 2 ** -25),
        bf16: 2 ** -8 * Math.abs(original),
        int8: (0.50002 * largest) / 127,
        nf4: NF4_ERROR * largest + (w.doubleQuant ? MAP_ERROR * spread + 1e-7 : 0),
      }[format];
      const isAsStored = Math.abs(value - expected) <= unit * (w.doubleQuant ? largest : Math.abs(expected));
      return !(isAsStored && Math.abs(value - original) <= allowed);
    });
    const where = `[${shape}] at ${wrong}: ${data[wrong]} became ${values[wrong]}, its bytes say ${twin.data[wrong]}`;
    expect(wrong, `${where} (seed ${seed})`).toBe(-1);
    released(w);
    gpu.release(y);
  }
});

/** The largest magnitude of each stretch. */
function blocksOf(data: Float64Array, size: number): number[] {
  return Array.from({ length: Math.ceil(data.length / size) }, (_, i) =>
    Math.max(...data.subarray(i * size, (i + 1) * size).map(Math.abs)),
  );
}

const PLANS: [string, MatmulPlan | undefined][] = [
  ["the default plan", undefined], // on a CPU adapter a direct one
  ["tiled", { name: "tiled", family: "tiled", tuned: { BK: 8, TM: 4, TN: 4, WX: 8, WY: 8 }, splits: 1 }],
  ["rows", { name: "rows", family: "rows", tuned: { TM: 1, TN: 4, WG: 64 }, splits: 1 }],
];
const SIZES: Record<"nn" | "nt", [M: number, N: number, K: number][]> = {
  nt: [
    [1, 5, 4],
    [1, 36, 68],
    [7, 13, 20],
    [7, 132, 132],
  ],
  nn: [
    [1, 4, 5],
    [1, 36, 68],
    [7, 36, 21],
    [7, 132, 132],
  ],
};
const PRODUCTS = CASES.flatMap(([name, format, options]) =>
  PLANS.flatMap(([by, plan]) =>
    (plan?.family === "rows" ? (["nt"] as const) : (["nt", "nn"] as const)).map(
      (layout) => [name, layout, by, format, options, plan] as const,
    ),
  ),
);

test.each(PRODUCTS)("%s: %s products by %s equal the twin on its widened elements", async (...given) => {
  const [, layout, , format, options, plan] = given;
  const gpu = await testGpu();
  const seed = freshSeed();
  const random = new Random(seed);
  for (const [M, N, K] of SIZES[layout])
    for (const R of [0, 5]) {
      const shape = layout === "nt" ? ([N, K] as const) : ([K, N] as const);
      const w = packMatrix(gpu, Float32Array.from(randomNd(shape, random).data), shape, format, options);
      const x = randomNd([M, K], random);
      const u = randomNd([M, R], random);
      const b = randomNd(layout === "nt" ? [N, R] : [R, N], random);
      const expected = matmulTwin(
        x,
        await unpackTwin(w),
        layout satisfies Layout,
        0.5,
        R > 0 ? { u, b, c: 2 } : undefined,
      );
      const y = gpu.scope(() =>
        matmul(upload(gpu, x), w, layout, {
          scale: 0.5,
          ...(R > 0 && { lowRank: { u: upload(gpu, u), b: upload(gpu, b), scale: 2 } }),
          ...(plan && { plan }),
        }),
      );
      expectClose(await read(y), expected.data, 1e-5, `${[M, N, K, R]} (seed ${seed})`);
      gpu.release(y);
      released(w);
    }
});

test("scales that are quantised too are made f32 for products of many rows", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const w = packMatrix(gpu, Float32Array.from(randomNd([132, 132], random).data), [132, 132], "nf4", {
    doubleQuant: true,
  }); // 273 blocks: more than one outer scale
  const plain = withPlainScales(w);
  expect([plain.doubleQuant, plain.scales?.shape, plain.scales?.dtype]).toEqual([false, [273], "f32"]);
  expectClose(await read(unpackMatrix(plain)), await read(unpackMatrix(w)), 1e-6, "elements");
  expect(withPlainScales(plain)).toBe(plain);
  const x = upload(gpu, randomNd([17, 132], random));
  const [y, expected] = [matmul(x, w, "nt"), matmul(x, plain, "nt")];
  const before = gpu.counters().dispatches.get("unpack-scales") ?? 0;
  expectClose(await read(y), await read(expected), 1e-6, "y");
  matmul(slice(x, 0, [16, 132]), w, "nt");
  expect(gpu.counters().dispatches.get("unpack-scales") ?? 0).toBe(before);
});

test("a software adapter makes NF4 weights f32 once for products of many rows, with the same values", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const w = packMatrix(gpu, Float32Array.from(randomNd([68, 132], random).data), [68, 132], "nf4", {
    doubleQuant: true,
  });
  const x = upload(gpu, randomNd([128, 132], random));
  const [u, b] = [upload(gpu, randomNd([128, 4], random)), upload(gpu, randomNd([68, 4], random))];
  const unpacked = (): number => gpu.counters().dispatches.get("unpack") ?? 0;
  const product = (rows: number): Tensor =>
    matmul(slice(x, 0, [rows, 132]), w, "nt", { lowRank: { u: slice(u, 0, [rows, 4]), b, scale: 0.5 } });
  const before = unpacked();
  const [few, many] = [product(112), product(128)];
  expect(unpacked() - before).toBe(gpu.isSoftware ? 1 : 0);
  expectClose((await read(many)).slice(0, 112 * 68), await read(few), 1e-5, "y");
});

test("packMatrix names what does not fit", async () => {
  const gpu = await testGpu();
  const pack = (count: number, shape: [number, number], format: PackedFormat, options?: PackOptions) => () =>
    packMatrix(gpu, new Float32Array(count), shape, format, options);
  expect(pack(11, [3, 4], "f16")).toThrow(new ShapeError("packMatrix: shape [3,4] holds 12 values, got 11"));
  expect(pack(18, [3, 6], "nf4")).toThrow(
    new ShapeError("packMatrix: columns must be a multiple of 4, got [3,6]. Keep such a matrix in f32"),
  );
  for (const group of [8, 6, 0, 24, -4, 2.5])
    expect(pack(24, [2, 12], "int8", { group })).toThrow(
      new ShapeError(`packMatrix: group must be a power of two from 4 that divides the 12 columns, got ${group}`),
    );
  expect(pack(24, [2, 12], "nf4", { group: 4 })).toThrow(
    new ShapeError("packMatrix: only int8 takes a group, got nf4"),
  );
  expect(pack(24, [2, 12], "int8", { doubleQuant: true })).toThrow(
    new ShapeError("packMatrix: only nf4 can have its scales quantised (doubleQuant), got int8"),
  );
  const values = Float32Array.of(0, 0, 0, 0, 0, Number.NaN, 0, Number.NEGATIVE_INFINITY);
  expect(() => packMatrix(gpu, values, [2, 4], "int8")).toThrow(
    new ShapeError("packMatrix: int8 needs finite values, got NaN at [1,1]"),
  );
  values[5] = 0;
  expect(() => packMatrix(gpu, values, [2, 4], "nf4")).toThrow(
    new ShapeError("packMatrix: nf4 needs finite values, got -Infinity at [1,3]"),
  );
});
