import { describe, expect, test } from "vitest";
import { addNoise } from "../../src/autograd/model-ops.ts";
import { defineKernel, definePart } from "../../src/gpu/kernel.ts";
import { addNoise as addNoiseKernel, type DropoutKey, dropout } from "../../src/kernels/dropout.ts";
import source from "../../src/kernels/dropout.wgsl";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { dropoutTwin, noiseTwin, philoxTwin } from "../reference/dropout.ts";

/** counter, key, words: "philox4x32 10" of the known answers that Random123 is published with. */
const KNOWN: [counter: number[], key: number[], words: number[]][] = [
  [
    [0, 0, 0, 0],
    [0, 0],
    [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
  ],
  [
    [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
    [0xffffffff, 0xffffffff],
    [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
  ],
  [
    [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
    [0xa4093822, 0x299f31d0],
    [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
  ],
];

test.each(KNOWN)("the twin of Philox gives the published words for %j under %j", (counter, key, words) => {
  expect(philoxTwin(counter, key)).toEqual(words);
});

/** Writes the words of each counter and key [a,b,c,d,k,l,0,0] to y. */
const PHILOX = `// y = philox(x)
//   x [2n], y [n] fours of words
struct Dims { n: u32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<vec4u>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4u>;

@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x < d.n) { y[id.x] = philox(x[2u * id.x], x[2u * id.x + 1u].xy); }
}
`;

test("Philox on the device gives the published words, and the twin's for any counter", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const word = (): number => Math.floor(random.uniform() * 2 ** 32);
  const more = Array.from({ length: 100 }, () => [
    [word(), word(), word(), word()],
    [word(), word()],
  ]);
  const inputs = [...KNOWN.map(([counter, key]) => [counter, key]), ...more] as [number[], number[]][];
  const x = tensor(gpu, Int32Array.from(inputs.flatMap(([counter, key]) => [...counter, ...key, 0, 0])), [
    8 * inputs.length,
  ]);
  const y = empty(gpu, [4 * inputs.length], "philox", "i32");
  const philox = definePart("philox", source, ["ROUNDS", "wide", "philox"]);
  defineKernel("philox", PHILOX)(gpu, { n: inputs.length }, { x, y }, [inputs.length], {}, [philox]);
  const [bytes = new ArrayBuffer(0)] = await gpu.read([y]);
  expect([...new Uint32Array(bytes)]).toEqual(inputs.flatMap(([counter, key]) => philoxTwin(counter, key)));
});

const KEY = { seed: 2 ** 40 + 12345, step: 7, stream: 3 };

describe.each([0, 0.1, 0.5, 0.999])("dropout of p = %d", (p) => {
  test.each([[[1]], [[3]], [[4]], [[5, 7]], [[64, 4]], [[13, 20]]])("of %j equals its f64 twin", async (shape) => {
    await checkOp({
      inputs: [shape, shape],
      op: (...[x, acc]) => dropout(x as Tensor, p, KEY, acc),
      twin: (...[x, acc]) => dropoutTwin(x as Nd, p, KEY, acc),
      gradients: false,
    });
    await checkOp({
      inputs: [shape],
      op: (x) => dropout(x, p, KEY),
      twin: (x) => dropoutTwin(x, p, KEY),
      gradients: false,
    });
  });
});

test("dropout makes the same mask from equal keys, in fours or one by one, and others from any other", async () => {
  const gpu = await testGpu();
  const mask = async (key: DropoutKey, size = 4096): Promise<number[]> => {
    const ones = tensor(gpu, new Float32Array(size).fill(1), [size]);
    return [...(await read(dropout(ones, 0.5, key)))];
  };
  const first = await mask(KEY);
  expect(await mask(KEY)).toEqual(first);
  expect(await mask({ ...KEY, step: () => 7 }), "a varying step").toEqual(first);
  expect(await mask(KEY, 4095)).toEqual(first.slice(0, 4095));
  const others = [{ seed: 12345 }, { seed: KEY.seed + 1 }, { step: 8 }, { stream: 4 }, { step: 3, stream: 7 }];
  for (const other of others) {
    const second = await mask({ ...KEY, ...other });
    const equal = second.filter((value, i) => value === first[i]).length;
    expect(Math.abs(equal - 2048), JSON.stringify(other)).toBeLessThan(5 * 32); // five standard deviations
  }
});

test.each([0.05, 0.3, 0.9])("dropout of p = %d drops that share, neighbours independently", async (p) => {
  const gpu = await testGpu();
  const n = 2 ** 18;
  const ones = tensor(gpu, new Float32Array(n).fill(1), [n]);
  const y = await read(dropout(ones, p, { seed: freshSeed(), step: 0, stream: 0 }));
  const kept = [...y].map((value) => (value === 0 ? 0 : 1));
  const share = (values: number[]): number => values.reduce((a, b) => a + b, 0) / values.length;
  const sigma = Math.sqrt((p * (1 - p)) / n);
  expect(Math.abs(share(kept) - (1 - p))).toBeLessThan(6 * sigma);
  expect(new Set(y)).toEqual(new Set([0, Math.fround(1 / (1 - p))]));
  for (const lag of [1, 2, 3, 4, 64, 256]) {
    const pairs = kept.slice(lag).map((value, i) => (value - (1 - p)) * ((kept[i] ?? 0) - (1 - p)));
    expect(Math.abs(share(pairs)), `lag ${lag}`).toBeLessThan((6 * p * (1 - p)) / Math.sqrt(n - lag));
  }
});

test("dropout is its own gradient: Σ dy·drop(x) = Σ drop(dy)·x, and acc is added", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [x, dy, acc] = [randomNd([33, 12], random), randomNd([33, 12], random), randomNd([33, 12], random)];
  const [y, dx] = [dropout(upload(gpu, x), 0.25, KEY), dropout(upload(gpu, dy), 0.25, KEY, upload(gpu, acc))];
  const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
    Array.from(a).reduce((sum, value, i) => sum + value * (b[i] ?? 0), 0);
  const without = [...(await read(dx))].map((value, i) => value - (acc.data[i] ?? 0));
  expectClose([dot(await read(y), dy.data)], [dot(without, x.data)], 1e-4);
});

test("dropout drops what is not a number too, and p = 0 changes no bit", async () => {
  const gpu = await testGpu();
  const bad = await read(dropout(tensor(gpu, new Float32Array(64).fill(Number.NaN), [64]), 0.5, KEY));
  const expected = dropoutTwin(nd([64], new Float64Array(64).fill(1)), 0.5, KEY).data;
  expect([...bad].map((value) => (Number.isNaN(value) ? 2 : value))).toEqual([...expected]);
  const x = randomNd([67], new Random(freshSeed()));
  expect([...(await read(dropout(upload(gpu, x), 0, KEY)))]).toEqual([...x.data]);
});

test("dropout names what it cannot take", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3], "x");
  for (const p of [1, -0.1, Number.NaN])
    expect(() => dropout(x, p, KEY)).toThrow(new ShapeError(`dropout: p must be at least 0 and below 1, got ${p}`));
  expect(() => dropout(x, 0.5, KEY, empty(gpu, [3, 2], "acc"))).toThrow(
    new ShapeError("dropout: acc must have the shape of x = [2,3], got [3,2]"),
  );
});

test.each([[[4]], [[1, 3, 4]], [[5, 7, 12]], [[67, 4]]])(
  "noise on %j equals its f64 twin, its gradient that of x",
  async (shape) => {
    await checkOp({
      inputs: [shape],
      op: (x) => addNoise(x as Tensor, 0.7, KEY),
      twin: (x) => noiseTwin(x as Nd, 0.7, KEY),
      tolerance: 1e-6,
    });
  },
);

test("noise is uniform between its bounds, and another for another key", async () => {
  const gpu = await testGpu();
  const n = 2 ** 16;
  const zeros = tensor(gpu, new Float32Array(n), [n]);
  const of = async (key: DropoutKey): Promise<Float32Array> => read(addNoiseKernel(zeros, 2, key));
  const seed = freshSeed();
  const y = await of({ seed, step: 3, stream: 1 });
  const bins = new Array<number>(8).fill(0);
  for (const value of y) bins[Math.floor((value + 2) * 2)] = (bins[Math.floor((value + 2) * 2)] ?? 0) + 1;
  expect(bins).toHaveLength(8);
  for (const count of bins) expect(Math.abs(count - n / 8), `seed ${seed}`).toBeLessThan(6 * Math.sqrt(n / 8));
  expect(await of({ seed, step: () => 3, stream: 1 })).toEqual(y);
  const other = await of({ seed, step: 4, stream: 1 });
  const dot = other.reduce((sum, value, i) => sum + (value * (y[i] ?? 0)) / (4 / 3), 0);
  expect(Math.abs(dot / n), `seed ${seed}`).toBeLessThan(6 / Math.sqrt(n));
});

test("noise names a size that it cannot take", async () => {
  const gpu = await testGpu();
  expect(() => addNoiseKernel(empty(gpu, [3, 2], "x"), 1, KEY)).toThrow(
    new ShapeError("addNoise: x must have a multiple of 4 elements, got [3,2]"),
  );
});
