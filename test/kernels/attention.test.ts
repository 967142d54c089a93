// Attention and its positions with every option, as a CPU adapter runs them and as a GPU does, against f64 twins.
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { backward } from "../../src/autograd/engine.ts";
import { type AttentionOptions, attention, rope } from "../../src/autograd/model-ops.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { attentionGradientTwin, attentionTwin, ropeTwin, rotaryTables } from "../reference/model-ops.ts";

interface Sizes {
  readonly B?: number;
  readonly T: number;
  readonly S?: number;
  readonly H?: number;
  readonly G?: number;
  readonly D?: number;
  readonly keyLength?: number;
}

interface Options {
  readonly window?: number;
  readonly softCap?: number;
  /** Where segments begin, the same in all rows but for row 1, which is one segment. */
  readonly segments?: readonly number[];
}

/** Values and gradients of the op against its twin; those of the twin by central differences, where it is `small`. */
async function check(
  { B = 1, T, S = T, H = 1, G = 1, D = 8, keyLength = S }: Sizes,
  options: Options,
  small = false,
): Promise<void> {
  const gpu = await testGpu();
  const { window, softCap, segments } = options;
  const start = (b: number, t: number): number =>
    b === 1 ? 0 : Math.max(0, ...(segments ?? []).filter((first) => first <= keyLength - T + t));
  const starts =
    segments &&
    nd(
      [B, T],
      Array.from({ length: B * T }, (_, i) => start(Math.floor(i / T), i % T)),
    );
  const scale = 1.5 / Math.sqrt(D);
  const told = { window, softCap, starts };
  const shapes = [
    [B, T, H, D],
    [B, S, G, D],
    [B, S, G, D],
  ];
  const op = (q: Tensor, k: Tensor, v: Tensor): Tensor =>
    attention(q, k, v, { scale, keyLength, window, softCap, starts: starts && upload(gpu, starts, "i32") });
  if (small)
    await checkOp({
      inputs: shapes,
      op: (...t) => op(...(t as [Tensor, Tensor, Tensor])),
      twin: (...t) => attentionTwin(...(t as [Nd, Nd, Nd]), scale, keyLength, told),
    });
  const seed = freshSeed();
  const random = new Random(seed);
  const inputs = shapes.map((shape) => randomNd(shape, random)) as [Nd, Nd, Nd];
  const dy = randomNd([B, T, H, D], random);
  const expected = attentionGradientTwin(...inputs, scale, keyLength, told, dy);
  const found = gpu.scope(() => {
    const tensors = inputs.map((input) => {
      const t = upload(gpu, input);
      t.requiresGrad = true;
      return t;
    }) as [Tensor, Tensor, Tensor];
    const y = op(...tensors);
    const grads = backward(y, upload(gpu, dy));
    return [y, ...tensors.map((t) => grads.get(t) as Tensor)];
  });
  for (const [i, name] of (["o", "dq", "dk", "dv"] as const).entries())
    expectClose(await read(found[i] as Tensor), expected[name].data, 1e-5, `${name} (seed ${seed})`);
  gpu.release(...found);
}

const SEGMENTS = [3, 4, 17, 33];
const OPTIONS: Options[] = [undefined, 1, 5, 34].flatMap((window) =>
  [undefined, 0.75].flatMap((softCap) =>
    [undefined, SEGMENTS].map((segments) => ({
      ...(window && { window }),
      ...(softCap && { softCap }),
      ...(segments && { segments }),
    })),
  ),
);
const ALL: Options = { window: 4, softCap: 2, segments: [2, 3] };

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

  test.each(OPTIONS)("37 queries with %j equal their f64 twin, gradients too", async (options) => {
    await check({ B: 2, T: 37, H: 2 }, options);
  });

  test.each<Sizes>([
    { T: 1 },
    { T: 1, S: 45, H: 4, G: 2, keyLength: 43 },
    { B: 2, T: 4, H: 3 },
    { B: 2, T: 5, H: 4, G: 2 },
    { T: 3, S: 1 + 40, H: 2, keyLength: 39 },
    { B: 3, T: 31, H: 4, G: 4, D: 4 },
    { T: 32, S: 33, H: 3, keyLength: 32 },
    { B: 2, T: 33, S: 70, H: 6, G: 2, keyLength: 65 },
  ])("sizes %j equal their f64 twin with no option and with all", async (sizes) => {
    await check(sizes, {});
    await check(sizes, ALL);
  });

  test.each([8, 12, 16, 32, 64, 80, 96, 128, 256])("heads of %i equal their f64 twin, gradients too", async (D) => {
    await check({ T: 6, H: 2, D }, ALL, D <= 16);
  });

  test("what takes more than one dispatch equals its f64 twin, gradients too", async () => {
    const gpu = await testGpu();
    const count = (): number => gpu.counters().dispatches.get("attention") ?? 0;
    const earlier = count();
    await check({ T: 1100, H: 2, D: 64 }, { window: 300 });
    expect(count() - earlier).toBe(isSoftware ? 2 : 1);
  });

  test("segments are as good as rows of their own", async () => {
    const gpu = await testGpu();
    const random = new Random(freshSeed());
    const lengths = [5, 1, 34];
    const [T, D] = [40, 8];
    const x = randomNd([1, T, 1, D], random);
    const { cos, sin } = rotaryTables(T, D, 100);
    const [c, s] = [upload(gpu, cos), upload(gpu, sin)];
    const run = (rows: Nd, options: AttentionOptions, at: number | Tensor): Tensor => {
      const all = upload(gpu, rows);
      const turned = rope(all, c, s, at);
      return attention(turned, turned, all, options);
    };
    const firsts = lengths.map((_, i) => lengths.slice(0, i).reduce((a, b) => a + b, 0));
    const starts = lengths.flatMap((length, i) => Array(length).fill(firsts[i]));
    const positions = lengths.flatMap((length) => Array.from({ length }, (_, i) => i));
    const packed = run(
      x,
      { starts: upload(gpu, nd([1, T], starts), "i32") },
      upload(gpu, nd([1, T], positions), "i32"),
    );
    const apart: number[] = [];
    for (const [i, length] of lengths.entries()) {
      const first = firsts[i] ?? 0;
      apart.push(...(await read(run(nd([1, length, 1, D], x.data.slice(first * D, (first + length) * D)), {}, 0))));
    }
    const found = [...(await read(packed))];
    expect(found.every((value, i) => Math.abs(value - (apart[i] ?? Number.NaN)) < 1e-5)).toBe(true);
  });

  test("a score far past the cap is the cap, and has no gradient", async () => {
    const [q, k] = [
      nd([1, 3, 1, 8], Array(24).fill(1e3)),
      nd(
        [1, 3, 1, 8],
        Array.from({ length: 24 }, (_, i) => (i < 8 ? -1 : 1)),
      ),
    ];
    await checkOp({
      inputs: [q, k, [1, 3, 1, 8]],
      op: (...t) => attention(t[0] as Tensor, t[1] as Tensor, t[2] as Tensor, { softCap: 2 }),
      twin: (...t) => attentionTwin(t[0] as Nd, t[1] as Nd, t[2] as Nd, 1 / Math.sqrt(8), 3, { softCap: 2 }),
    });
  });
});

test("attention names the options that do not fit", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3, 1, 8], "x");
  const run = (options: AttentionOptions) => () => attention(x, x, x, options);
  expect(run({ window: 0 })).toThrow(
    new ShapeError("attention: window must be a whole number of keys from 1 on, got 0"),
  );
  expect(run({ window: 1.5 })).toThrow(
    new ShapeError("attention: window must be a whole number of keys from 1 on, got 1.5"),
  );
  expect(run({ softCap: 0 })).toThrow(new ShapeError("attention: softCap must be above 0, got 0"));
  expect(run({ starts: empty(gpu, [2, 4], "starts", "i32") })).toThrow(
    new ShapeError("attention: starts must be [B,T] = [2,3], got [2,4]"),
  );
  expect(run({ starts: empty(gpu, [2, 3], "starts") })).toThrow(
    new ShapeError("attention: starts must be i32, got f32"),
  );
});

test.each([
  [2, 5, 3, 6],
  [2, 3, 2, 8],
  [1, 7, 1, 24],
])("rope of [%i,%i,%i,%i] at positions given equals its f64 twin", async (B, T, H, D) => {
  const gpu = await testGpu();
  const { cos, sin } = rotaryTables(9, D, 10000);
  const positions = nd(
    [B, T],
    Array.from({ length: B * T }, (_, i) => (i * 5) % 9),
  );
  await checkOp({
    inputs: [[B, T, H, D]],
    op: (x) => rope(x as Tensor, upload(gpu, cos), upload(gpu, sin), upload(gpu, positions, "i32")),
    twin: (x) => ropeTwin(x as Nd, cos, sin, positions),
  });
});

test("rope names positions that do not fit", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3, 1, 4], "x");
  const table = empty(gpu, [4, 2], "table");
  expect(() => rope(x, table, table, empty(gpu, [3], "positions", "i32"))).toThrow(
    new ShapeError("rope: positions must be [B,T] = [2,3], got [3]"),
  );
  expect(() => rope(x, table, table, empty(gpu, [2, 3], "positions"))).toThrow(
    new ShapeError("rope: positions must be i32, got f32"),
  );
});
