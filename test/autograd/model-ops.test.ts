import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { add, matmul, scale } from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import {
  addRmsNorm,
  attention,
  crossEntropy,
  embedding,
  gated,
  layerNorm,
  linearCrossEntropy,
  rmsNorm,
  rope,
} from "../../src/autograd/model-ops.ts";
import { loraLinear } from "../../src/lora/lora-linear.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, readAll, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { geluTwin, siluTwin } from "../reference/elementwise.ts";
import {
  attentionTwin,
  crossEntropyTwin,
  embeddingTwin,
  layerNormTwin,
  rmsNormTwin,
  ropeTwin,
  rotaryTables,
} from "../reference/model-ops.ts";

/** The inputs of an op by position, where a test knows how many there are. */
function at<T>(values: readonly T[], i: number): T {
  const value = values[i];
  if (value === undefined) throw new Error(`there is no input ${i}`);
  return value;
}

// ---- norms

const ROWS: [rows: number, H: number][] = [
  [1, 1],
  [1, 64],
  [3, 7],
  [65, 5],
  [131, 3],
  [2, 33],
];

test.each(ROWS)("rmsNorm of %i rows of %i equals its f64 twin", async (rows, H) => {
  await checkOp({
    inputs: [[rows, H], [H]],
    op: (...t) => rmsNorm(at(t, 0), at(t, 1), 1e-5),
    twin: (...t) => rmsNormTwin(at(t, 0), at(t, 1), 1e-5),
  });
});

test.each(ROWS)("rmsNorm of %i rows of %i by 1 + w equals its f64 twin, with a residual too", async (rows, H) => {
  await checkOp({
    inputs: [[rows, H], [H]],
    op: (...t) => rmsNorm(at(t, 0), at(t, 1), 1e-5, 1),
    twin: (...t) => rmsNormTwin(at(t, 0), at(t, 1), 1e-5, 1),
  });
  await checkOp({
    inputs: [[rows, H], [H]],
    op: (...t) => addRmsNorm(at(t, 0), at(t, 0), at(t, 1), 1e-5, 1).y,
    twin: (...t) => {
      const twice = nd(
        at(t, 0).shape,
        at(t, 0).data.map((v) => 2 * v),
      );
      return rmsNormTwin(twice, at(t, 1), 1e-5, 1);
    },
  });
});

test.each([...ROWS, [3, 64], [5, 516]])(
  "a residual and its rmsNorm of %i rows of %i equal their f64 twins",
  async (rows, H) => {
    // Both results go on, as in a model: the gradient of the sum comes by two ways.
    const both = (sum: Nd, y: Nd): Nd =>
      nd(
        y.shape,
        y.data.map((v, i) => v + 0.5 * (sum.data[i] ?? 0)),
      );
    await checkOp({
      inputs: [[rows, H], [rows, H], [H]],
      op: (...t) => {
        const { sum, y } = addRmsNorm(at(t, 0), at(t, 1), at(t, 2), 1e-5);
        return add(y, scale(sum, 0.5));
      },
      twin: (...t) => {
        const sum = nd(
          at(t, 0).shape,
          at(t, 0).data.map((v, i) => v + (at(t, 1).data[i] ?? 0)),
        );
        return both(sum, rmsNormTwin(sum, at(t, 2), 1e-5));
      },
    });
  },
);

test.each([[1], [7], [64], [1028]])("gated units of %i elements equal their f64 twins", async (n) => {
  for (const kind of ["silu", "gelu", "geluTanh"] as const)
    await checkOp({
      inputs: [[n], [n]],
      op: (...t) => gated(at(t, 0), at(t, 1), kind),
      twin: (...t) => {
        const f = { silu: siluTwin, gelu: geluTwin, geluTanh: (x: Nd) => geluTwin(x, "tanh") }[kind](at(t, 0));
        return nd(
          f.shape,
          f.data.map((v, i) => v * (at(t, 1).data[i] ?? 0)),
        );
      },
    });
});

test("a gated unit needs gate and up of one shape", async () => {
  const gpu = await testGpu();
  expect(() => gated(empty(gpu, [2, 3], "g"), empty(gpu, [3, 2], "u"), "silu")).toThrow(
    new ShapeError("gated: up must have the shape of gate = [2,3], got [3,2]"),
  );
});

test.each(ROWS.filter(([, H]) => H > 1))("layerNorm of %i rows of %i equals its f64 twin", async (rows, H) => {
  await checkOp({
    inputs: [[rows, H], [H], [H]],
    op: (...t) => layerNorm(at(t, 0), at(t, 1), at(t, 2), 1e-2),
    twin: (...t) => layerNormTwin(at(t, 0), at(t, 1), at(t, 2), 1e-2),
  });
});

test("layerNorm keeps its digits where the mean is large beside the spread", async () => {
  const random = new Random(freshSeed());
  const x = nd(
    [3, 16],
    randomNd([3, 16], random).data.map((v) => Math.fround(1000 + v)),
  );
  await checkOp({
    inputs: [x, [16], [16]],
    op: (...t) => layerNorm(at(t, 0), at(t, 1), at(t, 2), 1e-5),
    twin: (...t) => layerNormTwin(at(t, 0), at(t, 1), at(t, 2), 1e-5),
    tolerance: 1e-3,
    gradients: false,
  });
});

test("the norms name the weight that does not fit", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [2, 3], "x");
  const w = empty(gpu, [4], "w");
  expect(() => rmsNorm(x, w, 1e-5)).toThrow(new ShapeError("rmsNorm: weight must be [H] = [3], got [4]"));
  expect(() => layerNorm(x, w, w, 1e-5)).toThrow(new ShapeError("layerNorm: weight must be [H] = [3], got [4]"));
  expect(() => layerNorm(x, empty(gpu, [3], "w"), w, 1e-5)).toThrow(
    new ShapeError("layerNorm: bias must be [H] = [3], got [4]"),
  );
});

// ---- rope

test.each([
  [2, 5, 3, 6, 0],
  [1, 1, 1, 2, 4],
  [2, 3, 2, 10, 7],
])("rope of [%i,%i,%i,%i] from position %i equals its f64 twin", async (B, T, H, D, offset) => {
  const { cos, sin } = rotaryTables(offset + T, D, 10000);
  const gpu = await testGpu();
  await checkOp({
    inputs: [[B, T, H, D]],
    op: (x) => rope(x, upload(gpu, cos), upload(gpu, sin), offset),
    twin: (x) => ropeTwin(x, cos, sin, offset),
  });
});

test.each([
  [2, 5, 3, 6, 4],
  [1, 3, 2, 16, 8],
  [2, 3, 1, 12, 6],
])("rope of [%i,%i,%i,%i] turns the first %i elements of a head alone", async (B, T, H, D, turned) => {
  const { cos, sin } = rotaryTables(T + 1, turned, 100);
  const gpu = await testGpu();
  await checkOp({
    inputs: [[B, T, H, D]],
    op: (x) => rope(x, upload(gpu, cos), upload(gpu, sin), 1),
    twin: (x) => ropeTwin(x, cos, sin, 1),
  });
});

test("rope names the positions past its tables", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [1, 3, 2, 4], "x");
  const table = empty(gpu, [4, 2], "table");
  expect(() => rope(x, table, table, 2)).toThrow(new ShapeError("rope: positions must be below 4, got 2 to 4"));
  expect(() => rope(x, empty(gpu, [4, 3], "table"), table)).toThrow(
    new ShapeError("rope: cos must be [P,E/2] with E at most D = 4, got [4,3]"),
  );
  expect(() => rope(empty(gpu, [1, 3, 2, 5], "x"), table, table)).toThrow(
    new ShapeError("rope: x must be [B,T,H,D] with an even D, got [1,3,2,5]"),
  );
});

// ---- embedding

test.each([
  [5, 3, [2, 4], [0, 3, 3, 1, 4, 3, 0, 3]],
  [1, 1, [1], [0]],
  [7, 17, [5], [6, 0, 6, 6, 2]],
])("embedding of a %i×%i table equals its f64 twin, repeated ids too", async (V, H, shape, values) => {
  const gpu = await testGpu();
  const ids = nd(shape, values);
  await checkOp({
    inputs: [[V, H]],
    op: (w) => embedding(w, upload(gpu, ids, "i32")),
    twin: (w) => embeddingTwin(w, ids),
  });
});

test.each([
  [[5], [0, 4, 2]],
  [
    [1, 1, 3],
    [1, 4, 0, 2, 3, 1],
  ],
  [
    [4, 1],
    [4, 4, 0],
  ],
])("embedding of a table in pieces of %j rows equals the twin of the whole", async (rows, values) => {
  const gpu = await testGpu();
  const ids = nd([values.length], values);
  await checkOp({
    inputs: rows.map((V) => [V, 3]),
    op: (...t) => embedding(t, upload(gpu, ids, "i32")),
    twin: (...t) =>
      embeddingTwin(
        nd(
          [5, 3],
          t.flatMap(({ data }) => [...data]),
        ),
        ids,
      ),
  });
});

test("the gradient of a large table, which takes more than one dispatch, has every row of dy once", async () => {
  const gpu = await testGpu();
  const [V, H, N] = [4100, 64, 1100];
  const random = new Random(freshSeed());
  const ids = Int32Array.from({ length: N }, () => random.below(V));
  const dy = Float32Array.from({ length: N * H }, () => random.below(9) - 4); // sums of these are exact
  const expected = new Float32Array(V * H);
  dy.forEach((value, i) => {
    const to = (ids[Math.floor(i / H)] as number) * H + (i % H);
    expected[to] = (expected[to] as number) + value;
  });
  const w = empty(gpu, [V, H], "w");
  w.requiresGrad = true;
  const earlier = gpu.counters().dispatches.get("embedding-backward") ?? 0;
  const dw = gpu.scope(() => {
    const y = embedding(w, tensor(gpu, ids, [N]));
    return backward(y, tensor(gpu, dy, [N, H])).get(w) as Tensor;
  });
  expect(Buffer.compare(Buffer.from((await read(dw)).buffer), Buffer.from(expected.buffer))).toBe(0);
  expect((gpu.counters().dispatches.get("embedding-backward") ?? 0) - earlier).toBe(2);
  gpu.release(w, dw);
});

test("an id past all pieces reads the last row, and pieces are of one width", async () => {
  const gpu = await testGpu();
  const pieces = [tensor(gpu, [1, 2], [2, 1]), tensor(gpu, [3], [1, 1])];
  expect([...(await read(embedding(pieces, tensor(gpu, Int32Array.of(2, 9, -1, 0), [4]))))]).toEqual([3, 3, 3, 1]);
  expect(() => embedding([empty(gpu, [3, 4], "w"), empty(gpu, [3, 5], "w")], empty(gpu, [2], "ids", "i32"))).toThrow(
    new ShapeError("embedding: weight must be [V,H] = [3,4], got [3,5]"),
  );
});

test("embedding takes ids of i32 only", async () => {
  const gpu = await testGpu();
  expect(() => embedding(empty(gpu, [3, 4], "w"), empty(gpu, [2], "ids"))).toThrow(
    new ShapeError("embedding: ids must be i32, got f32"),
  );
});

// ---- attention

/** Gradients by central differences only where they take no time. */
const ATTENTION: [
  B: number,
  T: number,
  S: number,
  H: number,
  G: number,
  D: number,
  keys: number,
  gradients: boolean,
][] = [
  [1, 1, 1, 1, 1, 8, 1, true],
  [2, 5, 5, 4, 2, 8, 5, true],
  [1, 7, 7, 3, 1, 4, 7, true],
  [1, 3, 9, 2, 2, 8, 6, true],
  [1, 1, 7, 2, 1, 16, 7, true],
  [2, 17, 17, 2, 1, 16, 17, false],
  [1, 37, 37, 3, 3, 32, 37, false],
  [1, 9, 9, 2, 1, 64, 9, false],
  [1, 9, 9, 2, 1, 80, 9, false],
  [1, 9, 9, 2, 1, 128, 9, false],
];

test.each(ATTENTION)(
  "attention of B %i, T %i, S %i, H %i, G %i, D %i over %i keys equals its f64 twin",
  async (B, T, S, H, G, D, keyLength, gradients) => {
    await checkOp({
      inputs: [
        [B, T, H, D],
        [B, S, G, D],
        [B, S, G, D],
      ],
      op: (...t) => attention(at(t, 0), at(t, 1), at(t, 2), { keyLength }),
      twin: (...t) => attentionTwin(at(t, 0), at(t, 1), at(t, 2), 1 / Math.sqrt(D), keyLength),
      gradients,
    });
  },
);

test.each([
  [2, 5, 5, 4, 2, 8, [5, 3]],
  [3, 7, 7, 2, 2, 4, [1, 7, 4]],
  [2, 37, 37, 2, 1, 16, [37, 20]],
])(
  "attention both ways of B %i, T %i, S %i, H %i, G %i, D %i over %j keys equals its f64 twin",
  async (B, T, S, H, G, D, keys) => {
    const gpu = await testGpu();
    const lengths = nd([B], keys);
    await checkOp({
      inputs: [
        [B, T, H, D],
        [B, S, G, D],
        [B, S, G, D],
      ],
      op: (...t) => attention(at(t, 0), at(t, 1), at(t, 2), { lengths: upload(gpu, lengths, "i32") }),
      twin: (...t) => attentionTwin(at(t, 0), at(t, 1), at(t, 2), 1 / Math.sqrt(D), S, { lengths }),
      gradients: T < 20,
    });
  },
);

test("attention survives scores of ±10⁴", async () => {
  await checkOp({
    inputs: [
      [1, 6, 2, 8],
      [1, 6, 1, 8],
      [1, 6, 1, 8],
    ],
    op: (...t) => attention(at(t, 0), at(t, 1), at(t, 2), { scale: 2048 }),
    twin: (...t) => attentionTwin(at(t, 0), at(t, 1), at(t, 2), 2048, 6),
    tolerance: 1e-2, // a score of 10⁴ is known to 10⁻³
    gradients: false,
  });
});

test("attention never reads a key past keyLength", async () => {
  const gpu = await testGpu();
  const values = new Float32Array(5 * 8).fill(Number.NaN);
  values.set(randomNd([3, 8], new Random(freshSeed())).data);
  const kv = tensor(gpu, values, [1, 5, 1, 8]);
  const q = tensor(gpu, new Float32Array(2 * 8).fill(1), [1, 2, 1, 8]);
  q.requiresGrad = kv.requiresGrad = true;
  const y = attention(q, kv, kv, { keyLength: 3 });
  const grads = backward(y, tensor(gpu, new Float32Array(16).fill(1), y.shape));
  const [out, dq, dkv] = await readAll([y, grads.get(q), grads.get(kv)].filter((t): t is Tensor => t !== undefined));
  expect([...(out ?? []), ...(dq ?? [])].every(Number.isFinite)).toBe(true);
  expect([...(dkv ?? [])].slice(0, 24).every(Number.isFinite)).toBe(true);
  expect([...(dkv ?? [])].slice(24)).toEqual(Array(16).fill(0));
});

test("attention runs only the backward kernels that are needed", async () => {
  const gpu = await testGpu();
  const run = (grads: readonly boolean[]): string[] => {
    const [q, k, v] = grads.map((requiresGrad) => {
      const t = tensor(gpu, new Float32Array(16).fill(0.5), [1, 2, 1, 8]);
      t.requiresGrad = requiresGrad;
      return t;
    });
    if (!q || !k || !v) throw new Error("three inputs");
    const y = attention(q, k, v);
    gpu.resetCounters();
    backward(y, tensor(gpu, new Float32Array(16), y.shape));
    return [...gpu.counters().dispatches].map(([name, n]) => `${name} ${n}`);
  };
  expect(run([true, false, false])).toEqual(["attention-delta 1", "attention-backward-q 1"]);
  expect(run([false, true, true])).toEqual(["attention-delta 1", "attention-backward-kv 1"]);
  expect(run([true, true, true])).toEqual(["attention-delta 1", "attention-backward-q 1", "attention-backward-kv 1"]);
});

test("attention names the shapes that do not fit", async () => {
  const gpu = await testGpu();
  const of = (...shape: number[]): Tensor => empty(gpu, shape, "t");
  const kv = of(2, 5, 2, 8);
  expect(() => attention(of(2, 3, 4, 6), kv, kv)).toThrow(
    new ShapeError("attention: q must be [B,T,H,D] with D a multiple of 4, got [2,3,4,6]"),
  );
  expect(() => attention(of(1, 3, 4, 8), kv, kv)).toThrow(
    new ShapeError("attention: k must be [B,S,G,D] = [1,5,2,8], got [2,5,2,8]"),
  );
  expect(() => attention(of(2, 3, 4, 8), kv, of(2, 4, 2, 8))).toThrow(
    new ShapeError("attention: v must be [B,S,G,D] = [2,5,2,8], got [2,4,2,8]"),
  );
  expect(() => attention(of(2, 3, 3, 8), kv, kv)).toThrow(
    new ShapeError("attention: query heads must be a multiple of key heads, got 3 and 2"),
  );
  expect(() => attention(of(2, 3, 4, 8), kv, kv, { keyLength: 6 })).toThrow(
    new ShapeError("attention: keyLength must be from T = 3 to S = 5, got 6"),
  );
  expect(() => attention(of(2, 3, 4, 8), kv, kv, { keyLength: 2 })).toThrow(
    new ShapeError("attention: keyLength must be from T = 3 to S = 5, got 2"),
  );
  const lengths = empty(gpu, [2], "lengths", "i32");
  expect(() => attention(of(2, 3, 4, 8), kv, kv, { lengths, window: 2 })).toThrow(
    new ShapeError("attention: lengths take no window and no starts, got one"),
  );
  expect(() => attention(of(2, 3, 4, 8), kv, kv, { lengths: empty(gpu, [3], "lengths", "i32") })).toThrow(
    new ShapeError("attention: lengths must be [B] = [2], got [3]"),
  );
});

// ---- cross-entropy

test.each([
  [[1, 1], [0]],
  [
    [5, 9],
    [4, -100, 0, 8, -1],
  ],
  [
    [2, 3, 7],
    [6, 0, -100, 3, 3, 1],
  ],
  [[70, 5], Array.from({ length: 70 }, (_, i) => (i % 6) - 1)],
])("crossEntropy of logits %j equals its f64 twin", async (shape, values) => {
  const gpu = await testGpu();
  const labels = nd(shape.slice(0, -1), values);
  await checkOp({
    inputs: [shape],
    op: (x) => crossEntropy(x, upload(gpu, labels, "i32"), 0.25),
    twin: (x) => crossEntropyTwin(x, labels, 0.25),
  });
});

test("crossEntropy keeps its digits for logits of ±10⁴", async () => {
  const gpu = await testGpu();
  const x = nd([3, 4], [1e4, 9998.5, -1e4, 0, -1e4, -9999, -1e4, -9998, 1e4, -1e4, -1e4, -1e4]);
  const labels = nd([3], [1, 2, 3]);
  await checkOp({
    inputs: [x],
    op: (t) => crossEntropy(t, upload(gpu, labels, "i32"), 1e-3),
    twin: (t) => crossEntropyTwin(t, labels, 1e-3),
    gradients: false,
  });
  const logits = upload(gpu, x);
  logits.requiresGrad = true;
  const dx = backward(crossEntropy(logits, upload(gpu, labels, "i32"))).get(logits);
  if (!dx) throw new Error("the logits have a gradient");
  const softmax = (row: number[]): number[] => {
    const e = row.map((v) => Math.exp(v - Math.max(...row)));
    return e.map((v) => v / e.reduce((a, b) => a + b, 0));
  };
  const expected = [0, 1, 2].flatMap((i) =>
    softmax([...x.data.subarray(4 * i, 4 * i + 4)]).map((p, j) => p - (labels.data[i] === j ? 1 : 0)),
  );
  expectClose(await read(dx), expected, 1e-5, "gradient");
});

test("crossEntropy of nothing but ignored rows is 0, and so is its gradient", async () => {
  const gpu = await testGpu();
  const x = upload(gpu, randomNd([3, 5], new Random(freshSeed())));
  x.requiresGrad = true;
  const loss = crossEntropy(x, tensor(gpu, Int32Array.of(-100, -100, -100), [3]));
  const dx = backward(loss).get(x);
  expect([...(await read(loss))]).toEqual([0]);
  expect([...(dx ? await read(dx) : [])]).toEqual(Array(15).fill(0));
});

test("crossEntropy names the labels that do not fit", async () => {
  const gpu = await testGpu();
  const x = empty(gpu, [3, 5], "x");
  expect(() => crossEntropy(x, empty(gpu, [4], "labels", "i32"))).toThrow(
    new ShapeError("crossEntropy: labels must be the leading axes of logits = [3], got [4]"),
  );
  expect(() => crossEntropy(x, empty(gpu, [3], "labels"))).toThrow(
    new ShapeError("crossEntropy: labels must be i32, got f32"),
  );
});

// ---- what PyTorch says

interface Golden {
  readonly op: string;
  readonly options: Readonly<Record<string, number | string | boolean>>;
  readonly inputs: Readonly<Record<string, { readonly shape: number[]; readonly data: number[] }>>;
  readonly outputs: { readonly y: { readonly shape: number[]; readonly data: number[] } };
  readonly dy: { readonly shape: number[]; readonly data: number[] };
  readonly grads: Readonly<Record<string, { readonly shape: number[]; readonly data: number[] }>>;
}

const { cases } = JSON.parse(readFileSync(new URL("../golden/ops.json", import.meta.url), "utf8")) as {
  cases: Record<string, Golden>;
};
const option = (golden: Golden, name: string): number => Number(golden.options[name]);

/** Swaps axes 1 and 2 of four, and fills the last up with zeros to a multiple of 4, which no score or gradient notices. */
function heads({ shape, data }: Omit<Nd, "data"> & { data: ArrayLike<number> }, multiple: number): Nd {
  const [B = 0, X = 0, Y = 0, D = 0] = shape;
  const padded = Math.ceil(D / multiple) * multiple;
  const out = nd([B, Y, X, padded], new Float64Array(B * X * Y * padded));
  for (let b = 0; b < B; b++)
    for (let x = 0; x < X; x++)
      for (let y = 0; y < Y; y++)
        for (let i = 0; i < D; i++)
          out.data[((b * Y + y) * X + x) * padded + i] = data[((b * X + x) * Y + y) * D + i] ?? Number.NaN;
  return out;
}

const asIs = ({ shape, data }: { shape: readonly number[]; data: ArrayLike<number> }): Nd => nd(shape, data);
const head4 = (t: { shape: readonly number[]; data: ArrayLike<number> }): Nd => heads(t, 4);
const head1 = (t: { shape: readonly number[]; data: ArrayLike<number> }): Nd => heads(t, 1);

/** How a golden's op is called here, and how its arrays are laid out here. */
const CALLS: Record<string, { run: (golden: Golden, ...t: Tensor[]) => Tensor; layout: (t: Nd) => Nd }> = {
  rms_norm: { run: (g, ...t) => rmsNorm(at(t, 0), at(t, 1), option(g, "eps")), layout: asIs },
  layer_norm: { run: (g, ...t) => layerNorm(at(t, 0), at(t, 1), at(t, 2), option(g, "eps")), layout: asIs },
  rotary: {
    run: (g, ...t) => {
      const x = at(t, 0);
      const { cos, sin } = rotaryTables(x.shape[1] ?? 0, x.shape[3] ?? 0, option(g, "rope_theta"));
      return rope(x, upload(x.gpu, cos), upload(x.gpu, sin), t[1]);
    },
    layout: head1,
  },
  attention: {
    run: (g, ...t) => {
      const { window, softCap } = g.options as { window?: number; softCap?: number };
      const [starts] = t.slice(3);
      return attention(at(t, 0), at(t, 1), at(t, 2), {
        scale: option(g, "scale"),
        ...(window !== undefined && { window }),
        ...(softCap !== undefined && { softCap }),
        ...(starts && { starts }),
      });
    },
    layout: head4,
  },
  gated: { run: (g, ...t) => gated(at(t, 0), at(t, 1), g.options.activation as "silu"), layout: asIs },
  embedding: { run: (_, ...t) => embedding(at(t, 0), at(t, 1)), layout: asIs },
  linear: { run: (_, ...t) => matmul(at(t, 0), at(t, 1), "nt", at(t, 2)), layout: asIs },
  linear_cross_entropy: {
    run: (g, ...t) => {
      const { label_smoothing: labelSmoothing } = g.options as { label_smoothing?: number };
      return linearCrossEntropy(at(t, 0), at(t, 1), at(t, 2), 1, { labelSmoothing });
    },
    layout: asIs,
  },
  add_rms_norm: {
    run: (g, ...t) => {
      const { sum, y } = addRmsNorm(at(t, 0), at(t, 1), at(t, 2), option(g, "eps"));
      return add(sum, y);
    },
    layout: asIs,
  },
  lora_linear: {
    run: (g, ...t) => loraLinear(at(t, 0), at(t, 1), at(t, 2), at(t, 3), option(g, "scale")),
    layout: asIs,
  },
  cross_entropy: {
    run: (g, ...t) => {
      const counted = g.inputs.targets?.data.filter((label) => label >= 0).length ?? 0;
      return crossEntropy(at(t, 0), at(t, 1), g.options.reduction === "mean" ? 1 / counted : 1);
    },
    layout: asIs,
  },
};

/** Inputs that are i32 and laid out here as there. */
const WHOLE = ["targets", "ids", "positions", "starts"];

describe("PyTorch agrees", () => {
  const known = Object.entries(cases).filter(([, { op }]) => op in CALLS);

  test("on every op there is a golden for", () => {
    expect(new Set(known.map(([, { op }]) => op)).size).toBe(Object.keys(CALLS).length);
  });

  test.each(known)("on %s", async (_, golden) => {
    const gpu = await testGpu();
    const call = CALLS[golden.op];
    if (!call) throw new Error(golden.op);
    const inputs = Object.entries(golden.inputs).map(([name, values]) => {
      const isWhole = WHOLE.includes(name);
      const t = upload(gpu, isWhole ? asIs(values) : call.layout(asIs(values)), isWhole ? "i32" : "f32");
      t.requiresGrad = name in golden.grads;
      return t;
    });
    const y = call.run(golden, ...inputs);
    const grads = backward(y, upload(gpu, call.layout(asIs(golden.dy))));
    expectClose(await read(y), call.layout(asIs(golden.outputs.y)).data, 1e-5, "values");
    for (const [i, name] of Object.keys(golden.inputs).entries()) {
      const expected = golden.grads[name];
      const grad = grads.get(at(inputs, i));
      if (expected)
        expectClose(grad ? await read(grad) : [], call.layout(asIs(expected)).data, 1e-5, `gradient of ${name}`);
    }
  });
});
