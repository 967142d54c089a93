import { describe, expect, test } from "vitest";
import { doraNorms, gain, gainBackward } from "../../src/kernels/dora.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { doraLinear, rowSquares } from "../../src/lora/dora-linear.ts";
import type { LoraDropout } from "../../src/lora/lora-linear.ts";
import type { Linear } from "../../src/nn/linear.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { dropoutTwin } from "../reference/dropout.ts";
import { matmulTwin } from "../reference/matmul.ts";

const sumOf = (a: Nd, b: Nd, factor = 1): Nd =>
  nd(
    a.shape,
    a.data.map((v, i) => v + factor * (b.data[i % b.data.length] ?? Number.NaN)),
  );

/** ‖W + s·B·A‖ of every row, the whole sum made. */
function normsTwin(W: Nd, A: Nd, B: Nd, s: number): Float64Array {
  const [N = 0, K = 0] = W.shape;
  const whole = sumOf(W, matmulTwin(B, A, "nn", s));
  return Float64Array.from({ length: N }, (_, j) => Math.hypot(...whole.data.subarray(j * K, (j + 1) * K)));
}

/** Each column of z times m/n. */
const scaled = (z: Nd, m: Nd, n: Float64Array): Nd =>
  nd(
    z.shape,
    z.data.map((v, i) => (v * (m.data[i % n.length] ?? Number.NaN)) / (n[i % n.length] ?? Number.NaN)),
  );

/** PEFT's DoRA as its formula stands: y = x·Wᵀ + b + (m/n − 1)∘(x̂·Wᵀ) + (m/n)∘s·(x̂·Aᵀ)·Bᵀ. */
function doraTwin(inputs: readonly Nd[], s: number, n: Float64Array, dropped: (x: Nd) => Nd): Nd {
  const [x, W, A, B, m, bias] = inputs as [Nd, Nd, Nd, Nd, Nd, Nd | undefined];
  const base = matmulTwin(x, W, "nt");
  const ofDropped = matmulTwin(dropped(x), W, "nt");
  const low = matmulTwin(matmulTwin(dropped(x), A, "nt"), B, "nt", s);
  const y = sumOf(sumOf(base, ofDropped, -1), scaled(sumOf(ofDropped, low), m, n));
  return bias ? sumOf(y, bias) : y;
}

describe.each([
  ["without dropout", undefined],
  ["with dropout", { p: 0.4, key: { seed: 5, step: 2, stream: 3 } }],
] as const)("doraLinear %s", (_, drop) => {
  test.each([
    [5, 8, 12, 4, true],
    [3, 5, 7, 2, false],
    [67, 16, 4, 1, true],
  ])("of %i rows, %i×%i and rank %i equals its f64 twin, gradients too", async (M, N, K, R, hasBias) => {
    let norms: Float64Array | undefined; // no gradient goes through them
    await checkOp({
      inputs: [[M, K], [N, K], [R, K], [N, R], [N], ...(hasBias ? [[N]] : [])],
      frozen: [1],
      op: (...ts) => {
        const [x, W, A, B, m, bias] = ts as [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | undefined];
        return doraLinear(x, { W, A, B, bias }, { m, squares: rowSquares(W) }, 0.5, drop as LoraDropout | undefined);
      },
      twin: (...ts) => {
        const [, W, A, B] = ts as [Nd, Nd, Nd, Nd];
        norms ??= normsTwin(W, A, B, 0.5);
        return doraTwin(ts, 0.5, norms, (x) => (drop ? dropoutTwin(x, drop.p, { ...drop.key }) : x));
      },
      gradientTolerance: 2e-4,
    });
  });
});

test.each([
  [8, 12, 4],
  [65, 33, 3],
  [256, 64, 16],
])("norms of the rows of a %i×%i weight and an update of rank %i equal those of their sum", async (N, K, R) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [W, A, B] = [randomNd([N, K], random), randomNd([R, K], random), randomNd([N, R], random)];
  const m = randomNd([N], random);
  const on = (t: Nd): Tensor => upload(gpu, t);
  const squares = rowSquares(on(W));
  const expected = normsTwin(W, A, B, 1.5);
  const plain = doraNorms(on(W), on(A), on(B), squares, 1.5);
  const withM = doraNorms(on(W), on(A), on(B), squares, 1.5, on(m));
  expectClose(await read(plain.gain), expected, 1e-5, "norms");
  expectClose(
    await read(plain.inverse),
    expected.map((n) => 1 / n),
    1e-5,
    "inverse",
  );
  expectClose(
    await read(withM.gain),
    expected.map((n, j) => (m.data[j] ?? 0) / n),
    1e-5,
    "gain",
  );
});

test("rows of nothing but zeros have no gain that is not a number", async () => {
  const gpu = await testGpu();
  const zero = (...shape: number[]): Tensor => tensor(gpu, new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);
  const { gain: g } = doraNorms(zero(4, 8), zero(2, 8), zero(4, 2), zero(4), 1, zero(4));
  expect([...(await read(g))]).toEqual([0, 0, 0, 0]);
});

test.each(["nf4", "f16"] as const)("norms of a weight packed as %s are those of what it holds", async (format) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const packed = packMatrix(gpu, Float32Array.from(randomNd([12, 64], random).data), [12, 64], format);
  const W = nd([12, 64], Float64Array.from(await read(unpackMatrix(packed))));
  const [A, B] = [randomNd([4, 64], random), randomNd([12, 4], random)];
  const { gain: norms } = doraNorms(packed, upload(gpu, A), upload(gpu, B), rowSquares(packed), 0.7);
  expectClose(await read(norms), normsTwin(W, A, B, 0.7), 1e-5, "norms");
});

test.each([
  [1, 1],
  [65, 6],
  [130, 32],
])("columns of %i×%i by their own factor, and what goes back", async (M, N) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [z, dy] = [randomNd([M, N], random), randomNd([M, N], random)];
  const [g, b, h] = [randomNd([N], random), randomNd([N], random), randomNd([N], random)];
  const y = await read(gain(upload(gpu, z), upload(gpu, g), upload(gpu, b)));
  const of = (t: Nd, i: number): number => t.data[i % N] ?? Number.NaN;
  expectClose(
    y,
    z.data.map((v, i) => v * of(g, i) + of(b, i)),
    1e-6,
    "y",
  );
  const back = gainBackward(upload(gpu, dy), upload(gpu, z), upload(gpu, g), upload(gpu, h));
  expectClose(
    await read(back.dz),
    dy.data.map((v, i) => v * of(g, i)),
    1e-6,
    "dz",
  );
  const dm = new Float64Array(N);
  for (const [i, v] of dy.data.entries()) dm[i % N] = (dm[i % N] ?? 0) + of(h, i) * v * (z.data[i] ?? 0);
  expectClose(await read(back.dm), dm, 1e-5, "dm");
});

test("a fresh DoRA adapter changes nothing but the last bits, and its magnitudes are the norms of the rows", async () => {
  const gpu = await testGpu();
  const W = randomNd([8, 12], new Random(freshSeed()));
  const layer: Linear = { weight: upload(gpu, W) };
  const model = { linears: new Map([["q_proj", layer]]) };
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", useDora: true });
  const x = randomNd([3, 12], new Random(freshSeed()));
  const y = layer.adapters?.[0]?.apply(upload(gpu, x), layer.weight) ?? expect.fail("an adapter");
  expectClose(await read(y), matmulTwin(x, W, "nt").data, 1e-5, "y");
  const { magnitude } = adapter.pairs.get("q_proj") ?? {};
  const norms = normsTwin(W, nd([1, 12], new Float64Array(12)), nd([8, 1], new Float64Array(8)), 1);
  expectClose(await read(magnitude ?? expect.fail("a magnitude")), norms, 1e-5, "m");
  adapter.detach();
});

test("what does not fit is refused", async () => {
  const gpu = await testGpu();
  const of = (...shape: number[]): Tensor => empty(gpu, shape, "test");
  expect(() => doraNorms(of(8, 12), of(2, 12), of(8, 2), of(7), 1)).toThrow(
    new ShapeError("doraNorms: squares must be [N] = [8], got [7]"),
  );
  expect(() => doraNorms(of(8, 12), of(2, 12), of(8, 2), of(8), 1, of(9))).toThrow(
    new ShapeError("doraNorms: m must be [N] = [8], got [9]"),
  );
  expect(() => gain(of(3, 8), of(7))).toThrow(new ShapeError("gain: g must be [N] = [8], got [7]"));
  expect(() => gain(of(3, 8), of(8), of(7))).toThrow(new ShapeError("gain: bias must be [N] = [8], got [7]"));
});
