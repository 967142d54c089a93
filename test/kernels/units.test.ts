// Products on matrix units. What a runner without them can check: that Dawn compiles the kernel (its null backend has the feature
// and computes nothing), and that the kernel's indexing is right (the matrix functions written out in plain WGSL).
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { type Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { defineKernel, type Tuned } from "../../src/gpu/kernel.ts";
import { decodeFloats, encodeFloats } from "../../src/io/dtype.ts";
import { narrow16 } from "../../src/kernels/cast.ts";
import { type Layout, matmul } from "../../src/kernels/matmul.ts";
import { type MatmulPlan, type MatmulShape, plans, suits, unitsTile } from "../../src/kernels/matmul-plans.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { matmulTwin } from "../reference/matmul.ts";

const FEATURE = "chromium-experimental-subgroup-matrix";
const source = readFileSync("src/kernels/matmul-units.wgsl", "utf8");
const LAYOUTS = ["nn", "nt", "tn"] as const;

const rounded = ({ shape, data }: Nd): Nd =>
  nd(shape, decodeFloats("F16", encodeFloats("F16", Float32Array.from(data))));
const absolute = ({ shape, data }: Nd): Nd => nd(shape, data.map(Math.abs));

interface Operands {
  readonly x: Nd;
  readonly w: Nd;
  readonly low?: { readonly u: Nd; readonly b: Nd; readonly c: number };
}

function operands(layout: Layout, [M, N, K, R]: readonly [number, number, number, number], random: Random): Operands {
  const x = randomNd(layout === "tn" ? [K, M] : [M, K], random);
  const w = randomNd(layout === "nt" ? [N, K] : [K, N], random);
  const u = randomNd([M, R], random);
  const b = randomNd(layout === "nt" ? [N, R] : [R, N], random);
  return { x, w, ...(R > 0 && { low: { u, b, c: -2 } }) };
}

const mapped = (f: (a: Nd) => Nd, { x, w, low }: Operands): Operands => ({
  ...{ x: f(x), w: f(w) },
  ...(low && { low: { u: f(low.u), b: f(low.b), c: low.c } }),
});

const twin = ({ x, w, low }: Operands, layout: Layout, scale: number): Nd => matmulTwin(x, w, layout, scale, low);

/** Σ|x·w| over k, with the factors: what errors are relative to. */
function magnitudes({ low, ...rest }: Operands, layout: Layout, scale: number): Nd {
  const all = mapped(absolute, { ...rest, ...(low && { low: { ...low, c: Math.abs(low.c) } }) });
  return twin(all, layout, Math.abs(scale));
}

/** Fails unless every |actual − expected| ≤ bound·(1 + magnitude). */
function expectWithin(actual: ArrayLike<number>, expected: Nd, magnitude: Nd, bound: number, what: string): void {
  expect(actual.length, `${what}: count`).toBe(expected.data.length);
  const worst = expected.data.reduce((most, e, i) => {
    const error = Math.abs((actual[i] ?? Number.NaN) - e) / (1 + (magnitude.data[i] ?? 0));
    return Math.max(error, most);
  }, 0);
  expect(worst <= bound, `${what}: error ${worst} > ${bound}, relative to 1 + Σ|x·w|`).toBe(true);
}

// ---- the kernel's indexing, on any adapter

/**
 * The kernel with a subgroup of UM × UN invocations, one to an element of a result. Left and right matrices are where they lie:
 * (array, 1 if column-major, place, stride).
 */
function emulated(stages: number): string {
  const arrays = stages > 0 ? ["stage"] : ["x", "w", "u", "b"]; // where matrices are loaded from
  const text = source
    .replace(/^enable .*$/gm, "")
    .replace(/^alias (Left|Right) = .*$/gm, "alias $1 = vec4u;")
    .replace(/^alias Sum = .*$/m, "alias Sum = f32;")
    .replace(
      ", @builtin(subgroup_id) subgroup: u32) {",
      ") {\n  let subgroup = thread / (UM * UN);\n  lane = thread % (UM * UN);",
    )
    .replace(
      /subgroupMatrixLoad<\w+, (\w+)>\(&(\w+), /g,
      (_, order, array) => `vec4u(${Math.max(0, arrays.indexOf(array))}u, ${order === "col_major" ? 1 : 0}u, `,
    )
    .replace("subgroupMatrixMultiplyAccumulate(", "emulated_product(")
    .replace("subgroupMatrixScalarMultiply(sum, factor)", "sum * factor")
    .replace("subgroupMatrixStore<row_major>(&y, ", "emulated_store(");
  expect(text).not.toContain("subgroupMatrix");
  return `${text}
var<private> lane: u32;
fn element(m: vec4u, row: u32, column: u32) -> f32 {
  let at = select(vec2u(row, column), vec2u(column, row), m.y == 1u);
  let n = m.z + at.x * m.w + at.y / 8u;
  var eight: vec4u;
  ${arrays.map((array, i) => `if (m.x == ${i}u) { eight = ${array}[n]; }`).join(" else ")}
  return unpack2x16float(eight[at.y % 8u / 2u])[at.y % 2u];
}
fn emulated_product(left: vec4u, right: vec4u, sum: f32) -> f32 {
  var total = sum;
  for (var k = 0u; k < UK; k += 1u) { total += element(left, lane / UN, k) * element(right, k, lane % UN); }
  return total;
}
fn emulated_store(at: u32, sum: f32, stride: u32) { y[at + lane / UN * stride + lane % UN] = sum; }
`;
}

/** No two axes of a unit, nor of a tile, that could pass for each other throughout. */
const SHAPES: [string, Tuned][] = [
  ["two subgroups of 8×16×32", { UM: 8, UN: 16, UK: 32, TM: 2, TN: 2, WX: 1, WY: 2, WG: 256, BK: 64 }],
  ["four subgroups of 8×8×32", { UM: 8, UN: 8, UK: 32, TM: 2, TN: 2, WX: 2, WY: 2, WG: 256, BK: 64 }],
];

test.each(
  SHAPES.flatMap(([name, tuned]) => [0, 1, 2].map((BUFFERS): [string, number, Tuned] => [name, BUFFERS, tuned])),
)(
  "the indexing of matmul-units, %s, %i stages held, is right with its matrices emulated",
  async (_, BUFFERS, tuned) => {
    const gpu = await testGpu();
    const kernel = defineKernel("matmul-units-emulated", emulated(BUFFERS));
    const tile = unitsTile(tuned);
    const { BK = 0, WG = 1 } = tuned;
    for (const layout of LAYOUTS)
      for (const R of layout === "tn" ? [0] : BUFFERS === 0 ? [0, 2 * BK] : [0, 8, BK + 8]) {
        const [M, N, K] = [2 * tile.M, tile.N, 3 * BK];
        const seed = freshSeed();
        const halves = mapped(rounded, operands(layout, [M, N, K, R], new Random(seed)));
        const y = gpu.scope(() => {
          const [x, w, u, b] = [halves.x, halves.w, halves.low?.u, halves.low?.b].map((a) =>
            narrow16(upload(gpu, a ?? nd([8], new Float64Array(8))), "f16"),
          ) as [Tensor, Tensor, Tensor, Tensor];
          const out = empty(gpu, [M, N], "y");
          const sizes = { M, N, K, R, s: 0.5, c: -2 / 0.5 };
          const flags = { X_T: layout === "tn" ? 1 : 0, W_T: layout === "nt" ? 1 : 0, BUFFERS };
          kernel(gpu, sizes, { x, w, u, b, y: out }, [(N / tile.N) * WG, M / tile.M], { ...tuned, ...flags });
          return out;
        });
        const what = `${layout} ${[M, N, K, R]} (seed ${seed})`;
        expectWithin(await read(y), twin(halves, layout, 0.5), magnitudes(halves, layout, 0.5), 1e-6, what);
        gpu.release(y);
      }
  },
);

// ---- the kernel as it is

interface DawnModule {
  create(options: string[]): GPU;
}

let nullInstance: GPU | undefined; // Dawn crashes if its instance is collected

/** A device without hardware that has every feature: it compiles, and computes nothing. */
async function nullGpu(): Promise<Gpu> {
  const name = "webgpu";
  const dawn = (await import(name)) as DawnModule;
  nullInstance ??= dawn.create(["backend=null", "enable-dawn-features=allow_unsafe_apis"]);
  return openGpu({ gpu: nullInstance, matrixUnits: true });
}

const plan = (tuned: Tuned): MatmulPlan => ({ name: "units", family: "units", tuned, splits: 1 });

test("Dawn compiles matmul-units in every layout (null backend: nothing is computed)", async () => {
  const gpu = await nullGpu();
  expect(gpu.features.has(FEATURE)).toBe(true);
  const lanes = gpu.info.subgroupMaxSize;
  for (const [UM, UN, UK] of [[16, 16, 16], [8, 16, 16], [8, 8, 8]] as const) // biome-ignore format: one line
    for (const layout of LAYOUTS)
      for (const BUFFERS of [0, 1, 2]) {
        const size = { UM, UN, UK, TM: 32 / UM, TN: 64 / UN, WX: 1, WY: 2, BK: 32, BUFFERS };
        const chosen = plan({
          ...size,
          WG: 2 * lanes,
          ...(BUFFERS === 2 && { BK: 16, TN: 32 / UN, WG: lanes, WY: 1 }),
        });
        const { M, N } = unitsTile(chosen.tuned);
        const K = 2 * (chosen.tuned.BK ?? 0);
        const [x, w, u, b] = [
          layout === "tn" ? [K, M] : [M, K],
          layout === "nt" ? [N, K] : [K, N],
          [M, 32],
          layout === "nt" ? [N, 32] : [32, N],
        ].map((shape) => empty(gpu, shape, "x")) as [Tensor, Tensor, Tensor, Tensor];
        const lowRank = layout === "tn" ? {} : { lowRank: { u, b, scale: 2 } };
        await read(matmul(x, w, layout, { plan: chosen, ...lowRank }));
        expect(gpu.counters().dispatches.get("matmul-units")).toBe(1);
        gpu.resetCounters();
      }
});

test("matrix units take whole tiles of one product", () => {
  const shape: MatmulShape = { layout: "nn", M: 128, N: 256, K: 64, R: 8, batch: 1, format: "f16" };
  const units = plan({ UM: 16, UN: 16, UK: 16, TM: 4, TN: 4, WX: 2, WY: 2, WG: 128, BK: 32, BUFFERS: 2 });
  expect(suits(units, shape)).toBe(true);
  for (const other of [
    ...[{ M: 64 }, { N: 192 }, { K: 48 }, { R: 4 }, { batch: 2 }],
    ...[{ format: "nf4" as const }, { layout: "tn" as const }],
  ])
    expect(suits(units, { ...shape, ...other }), JSON.stringify(other)).toBe(false);
  expect(suits(units, { ...shape, layout: "tn", R: 0 })).toBe(true);
  expect(suits({ ...units, tuned: { ...units.tuned, BUFFERS: 0 } }, shape)).toBe(false);
});

test("a product that matrix units cannot take names its sizes", async () => {
  const gpu = await testGpu();
  const units = plan({ UM: 16, UN: 16, UK: 16, TM: 1, TN: 1, WX: 1, WY: 1, WG: 32, BK: 16, BUFFERS: 2 });
  expect(() => matmul(empty(gpu, [16, 16], "x"), empty(gpu, [16, 17], "w"), "nn", { plan: units })).toThrow(
    new ShapeError(
      'matmul: the plan "units" takes whole tiles of one product with f32 or f16 weights, got "nn" 16×17×16 of rank 0, 1 in all, f32. Leave the plan out',
    ),
  );
});

// ---- on a device that has them

const device = await openGpu({ matrixUnits: true, poison: true });
const offered = plans(device, { layout: "nn", M: 256, N: 512, K: 192, R: 0, batch: 1, format: "f32" }).filter(
  ({ family }) => family === "units",
);
const where = device.info.description || device.info.vendor;

test(
  offered.length > 0
    ? `on the matrix units of ${where}, products equal their f64 twins of operands rounded to f16`
    : `NOT RUN: ${where} has no matrix units; none are offered and products stay f32`,
  async () => {
    if (offered.length === 0) {
      const operand = operands("nn", [16, 16, 16, 0], new Random(1));
      const y = matmul(upload(device, operand.x), upload(device, operand.w));
      expectClose(await read(y), twin(operand, "nn", 1).data);
      return;
    }
    for (const chosen of offered)
      for (const layout of LAYOUTS)
        for (const R of layout === "tn" ? [0] : chosen.tuned.BUFFERS === 0 ? [0, 64] : [0, 16])
          for (const format of ["f32", ...(layout === "tn" ? [] : (["f16"] as const))] as const) {
            const seed = freshSeed();
            const exact = operands(layout, [256, 512, 192, R], new Random(seed));
            const { x, w, low } = exact;
            const bias = randomNd([512], new Random(seed + 1));
            const y = device.scope(() =>
              matmul(
                upload(device, x),
                format === "f32"
                  ? upload(device, w)
                  : packMatrix(device, Float32Array.from(w.data), w.shape as [number, number], format),
                layout,
                {
                  ...{ plan: chosen, scale: 0.5, bias: upload(device, bias) },
                  ...(low && { lowRank: { u: upload(device, low.u), b: upload(device, low.b), scale: low.c } }),
                },
              ),
            );
            const got = (await read(y)).map((value, i) => value - (bias.data[i % 512] ?? 0));
            device.release(y);
            const what = `${chosen.name} ${layout} ${format} rank ${R} (seed ${seed})`;
            const size = magnitudes(exact, layout, 0.5);
            expectWithin(got, twin(mapped(rounded, exact), layout, 0.5), size, 1e-5, what);
            expectWithin(got, twin(exact, layout, 0.5), size, 2 ** -10 + 1e-5, `${what}, operands not rounded`);
          }
  },
);
