import { expect, test } from "vitest";
import { TOP, topLogits } from "../../src/kernels/top-logits.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, testGpu } from "../harness.ts";

interface List {
  readonly ids: number[];
  readonly logits: number[];
  readonly rests: number[];
}

function twin(row: Float32Array, temperature: number): List {
  const values = Array.from(row, (x) => (Number.isNaN(x) ? Number.NEGATIVE_INFINITY : x));
  const order = [...values.keys()].sort((a, b) =>
    values[a] === values[b] ? a - b : Number(values[b]) - Number(values[a]),
  );
  const ids = order.slice(0, TOP);
  const most = values[order[0] as number] as number;
  const weight = (x: number, t: number): number => (x === most ? (x > -Infinity ? 1 : 0) : Math.exp((x - most) / t));
  const rest = (t: number): number => order.slice(TOP).reduce((sum, id) => sum + weight(values[id] as number, t), 0);
  return { ids, logits: ids.map((id) => values[id] as number), rests: [rest(1), rest(temperature)] };
}

async function check(rows: readonly Float32Array[], temperatures: readonly number[], what = ""): Promise<void> {
  const gpu = await testGpu();
  const V = rows[0]?.length ?? 0;
  const all = new Float32Array(rows.length * V);
  for (const [i, row] of rows.entries()) all.set(row, i * V);
  const [x, t] = [tensor(gpu, all, [rows.length, V]), tensor(gpu, temperatures, [rows.length])];
  const y = topLogits(x, t);
  expect(y.shape).toEqual([rows.length, 2 * TOP + 2]);
  const [bytes = new ArrayBuffer(0)] = await gpu.read([y]);
  gpu.release(x, t, y);
  for (const [i, row] of rows.entries()) {
    const expected = twin(row, temperatures[i] as number);
    const words = new Int32Array(bytes, 4 * i * (2 * TOP + 2), TOP);
    const numbers = new Float32Array(bytes, 4 * (i * (2 * TOP + 2) + TOP), TOP + 2);
    const count = expected.ids.length;
    expect([...words], `ids of row ${i} ${what}`).toEqual([...expected.ids, ...new Array(TOP - count).fill(-1)]);
    expect([...numbers.subarray(0, count)], `logits of row ${i} ${what}`).toEqual(expected.logits.map((v) => v + 0));
    expectClose(numbers.subarray(TOP), expected.rests, 3e-6, `rests of row ${i} ${what}`);
  }
}

test.each([1, 2, 63, 64, 65, 1000, 1023, 1024, 1025, 1089, 16_384, 16_385, 32_003])(
  "rows of %i list their likeliest and the weight of the others as the f64 twin does",
  async (V) => {
    const seed = freshSeed();
    const random = new Random(seed);
    const rows = Array.from({ length: 3 }, () => Float32Array.from({ length: V }, () => random.normal(0, 3)));
    await check(rows, [1, 0.3, 2.5], `(seed ${seed})`);
  },
);

test("a row of 300 thousand takes its four passes", async () => {
  const seed = freshSeed();
  const random = new Random(seed);
  await check([Float32Array.from({ length: 300_001 }, () => random.uniform(-8, 8))], [0.7], `(seed ${seed})`);
}, 60_000);

test("equals are listed by id: few levels, all the same, either zero", async () => {
  const random = new Random(5);
  for (const V of [37, 64, 3001]) {
    await check(
      [
        Float32Array.from({ length: V }, () => random.below(3) - 1),
        new Float32Array(V).fill(-7.25),
        Float32Array.from({ length: V }, (_, i) => (i % 2 === 0 ? -0 : 0)),
        Float32Array.from({ length: V }, (_, i) => i), // rising and falling
        Float32Array.from({ length: V }, (_, i) => -i),
      ],
      [1, 2, 0.5, 1, 1],
    );
  }
});

test("infinities and NaN are in their places", async () => {
  const random = new Random(6);
  const [inf, nan] = [Number.POSITIVE_INFINITY, Number.NaN];
  for (const V of [9, 200, 2077]) {
    const one = (): Float32Array => Float32Array.from({ length: V }, () => random.normal(0, 3));
    const strewn = (...values: number[]): Float32Array =>
      one().map((x, i) => (i % 3 === 0 ? (values[(i / 3) % values.length] as number) : x));
    const single = new Float32Array(V).fill(-inf);
    single[V - 2] = 3;
    const top = one();
    top[V - 1] = inf;
    const rows = [strewn(-inf, nan), strewn(-nan), new Float32Array(V).fill(-inf), single, top, strewn(inf, -inf, nan)];
    await check(
      [...rows, new Float32Array(V).fill(nan), one().map((x) => 1e38 * x)],
      rows.map(() => 0.8).concat([1, 1]),
    );
  }
});

test("a low temperature leaves the rest no weight, a high one all of it", async () => {
  const random = new Random(7);
  const row = Float32Array.from({ length: 5003 }, () => random.normal(0, 3));
  await check([row, row, row], [1e-7, 0.05, 1e4]);
});

test("topLogits names the shapes that do not fit", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3], "x");
  expect(() => topLogits(x, empty(gpu, [3], "t"))).toThrow(
    new ShapeError("topLogits: temperatures must be [N] = [2], got [3]"),
  );
  expect(() => topLogits(x, empty(gpu, [2], "t", "i32"))).toThrow(
    new ShapeError("topLogits: temperatures must be f32, got i32"),
  );
  expect(() => topLogits(empty(gpu, [2, 0], "x"), empty(gpu, [2], "t"))).toThrow(
    new ShapeError("topLogits: logits must have at least one column, got 0"),
  );
});
