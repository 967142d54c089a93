// The loss with its output projection against the f64 twin of the two apart, and what it takes.
import { expect, test } from "vitest";
import { matmul, scale as scaled } from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import { crossEntropy, gatherRows, linearCrossEntropies, linearCrossEntropy } from "../../src/autograd/model-ops.ts";
import { dryGpu } from "../../src/gpu/dry.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { linearCrossEntropy as kernels } from "../../src/kernels/linear-cross-entropy.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, readAll, rowsOf, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { crossEntropyTwin, hitsTwin } from "../reference/model-ops.ts";

const product = (h: Nd, W: Nd): Nd => {
  const [M = 0, C = 0] = h.shape;
  const [V = 0] = W.shape;
  const at = (i: number): number => {
    let sum = 0;
    for (let c = 0; c < C; c++) sum += (h.data[Math.floor(i / V) * C + c] ?? 0) * (W.data[(i % V) * C + c] ?? 0);
    return sum;
  };
  return nd(
    [M, V],
    Float64Array.from({ length: M * V }, (_, i) => at(i)),
  );
};

function labelsOf(M: number, V: number): Nd {
  const random = new Random(freshSeed());
  return nd(
    [M],
    Float64Array.from({ length: M }, (_, i) => (i % 5 === 2 ? -100 : Math.floor(random.uniform(0, V)))),
  );
}

test.each([
  [1, 1, 1],
  [3, 7, 5],
  [65, 33, 8],
  [129, 64, 12],
])("%i rows of %i words and %i features: loss and both gradients equal their f64 twins", async (M, V, C) => {
  const gpu = await testGpu();
  const labels = labelsOf(M, V);
  await checkOp({
    inputs: [
      [M, C],
      [V, C],
    ],
    op: (h, W) => linearCrossEntropy(h as Tensor, W as Tensor, upload(gpu, labels, "i32"), 0.25),
    twin: (h, W) => crossEntropyTwin(product(h as Nd, W as Nd), labels, 0.25),
  });
});

test("the loss is the sum of those of its rows, which are there beside it", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [M, V, C] = [67, 33, 8];
  const [h, W, labels] = [randomNd([M, C], random), randomNd([V, C], random), labelsOf(M, V)];
  const { loss, losses } = linearCrossEntropies(upload(gpu, h), upload(gpu, W), upload(gpu, labels, "i32"), 0.25);
  const logits = product(h, W);
  const rows = Array.from({ length: M }, (_, i) => {
    const row = nd([1, V], logits.data.slice(i * V, (i + 1) * V));
    return crossEntropyTwin(row, nd([1], [labels.data[i] ?? Number.NaN]), 0.25).data[0] ?? Number.NaN;
  });
  expectClose(await read(losses), rows, 1e-5, "of the rows");
  expectClose(await read(loss), [rows.reduce((a, b) => a + b)], 1e-5, "in all");
});

test.each([
  [3, 7, 5],
  [65, 64, 12],
])("%i rows of %i capped words and %i features: loss and both gradients equal their f64 twins", async (M, V, C) => {
  const gpu = await testGpu();
  const labels = labelsOf(M, V);
  const capped = ({ shape, data }: Nd): Nd =>
    nd(
      shape,
      data.map((x) => 1.5 * Math.tanh(x / 1.5)),
    );
  await checkOp({
    inputs: [
      [M, C],
      [V, C],
    ],
    op: (h, W) => linearCrossEntropy(h as Tensor, W as Tensor, upload(gpu, labels, "i32"), 0.25, { logitCap: 1.5 }),
    twin: (h, W) => crossEntropyTwin(capped(product(h as Nd, W as Nd)), labels, 0.25),
  });
});

test.each([
  [1, 1, 1, 1, undefined],
  [3, 7, 5, 1, undefined],
  [65, 64, 12, 1, 1.5],
  [9, 128, 5, 2, undefined],
  [7, 192, 8, 3, 1.5],
])(
  "smoothed labels of %i rows of %i words and %i features, in %i pieces: loss and gradients equal their f64 twins",
  async (M, V, C, parts, cap) => {
    const gpu = await testGpu();
    const labels = labelsOf(M, V);
    const capped = ({ shape, data }: Nd): Nd =>
      cap
        ? nd(
            shape,
            data.map((x) => cap * Math.tanh(x / cap)),
          )
        : nd(shape, data);
    const W = randomNd([V, C], new Random(freshSeed()));
    await checkOp({
      inputs: parts === 1 ? [[M, C], W] : [[M, C]],
      op: (h, trained) => {
        const head = trained ?? upload(gpu, W);
        const pieces = Array.from({ length: parts }, (__, i) => rowsOf(head, (V / parts) * i, V / parts));
        const options = { labelSmoothing: 0.3, logitCap: cap };
        return linearCrossEntropy(h as Tensor, parts === 1 ? head : pieces, upload(gpu, labels, "i32"), 0.25, options);
      },
      twin: (h, trained) => crossEntropyTwin(capped(product(h as Nd, trained ?? W)), labels, 0.25, 0.3),
    });
  },
);

test("smoothing is at least 0 and below 1", async () => {
  const gpu = await testGpu();
  const [h, W, labels] = [empty(gpu, [2, 4], "h"), empty(gpu, [8, 4], "W"), empty(gpu, [2], "l", "i32")];
  for (const labelSmoothing of [1, -0.1, Number.NaN])
    expect(() => linearCrossEntropy(h, W, labels, 1, { labelSmoothing })).toThrow(
      new ShapeError(`linearCrossEntropy: labelSmoothing must be at least 0 and below 1, got ${labelSmoothing}`),
    );
});

test.each([
  ["in one piece", 1, 2 ** 25],
  ["in pieces", 3, 2 ** 25],
  ["in pieces, rows in chunks", 2, 4 * 192 * 64],
])(
  "with the vocabulary %s, as many labels are the first of the likeliest words as in f64",
  async (_, parts, logitBytes) => {
    const gpu = await testGpu();
    const seed = freshSeed();
    const random = new Random(seed);
    // Whole numbers of few values: the products are exact, and many words tie.
    const whole = (shape: readonly number[]): Nd =>
      nd(
        shape,
        randomNd(shape, random).data.map((x) => Math.round(x)),
      );
    const [M, V, C] = [201, 192, 4];
    const [h, W] = [whole([M, C]), whole([V, C])];
    const logits = product(h, W);
    const bests = Array.from({ length: M }, (__, i) => {
      const row = logits.data.subarray(i * V, (i + 1) * V);
      const best = row.indexOf(Math.max(...row));
      const tie = row.indexOf(Math.max(...row), best + 1);
      return [best, tie === -1 ? best : tie, random.below(V), -100][i % 4] as number;
    });
    const labels = nd([M], bests);
    const head = upload(gpu, W);
    const pieces = Array.from({ length: parts }, (__, i) => rowsOf(head, (V / parts) * i, V / parts));
    const wants = { dh: false, dW: false, hits: true };
    const { hits, loss } = kernels(upload(gpu, h), pieces, upload(gpu, labels, "i32"), 1, wants, {}, logitBytes);
    expect([...(await read(hits as Tensor))], `seed ${seed}`).toEqual([hitsTwin(logits, labels)]);
    expectClose(await read(loss), crossEntropyTwin(logits, labels, 1).data, 1e-5, "loss");
  },
);

test.each([
  ["rows in chunks", 1, 4 * 24 * 64],
  ["the vocabulary in pieces", 3, 2 ** 25],
  ["both", 2, 4 * 24 * 64],
])("%s: as undivided", async (_, parts, logitBytes) => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [M, V, C] = [200, 24, 32];
  const [h, W] = [upload(gpu, randomNd([M, C], random)), upload(gpu, randomNd([V, C], random, 3))];
  const labels = upload(gpu, labelsOf(M, V), "i32");
  const pieces = Array.from({ length: parts }, (__, i) => rowsOf(W, (V / parts) * i, V / parts));
  const wants = { dh: true, dW: true };
  const whole = kernels(h, W, labels, 1, wants);
  const divided = kernels(h, parts === 1 ? W : pieces, labels, 1, wants, {}, logitBytes);
  const [loss, dh, dW] = await readAll([whole.loss, whole.dh as Tensor, whole.dW[0] as Tensor]);
  const [loss2, dh2, ...dW2] = await readAll([divided.loss, divided.dh as Tensor, ...(divided.dW as Tensor[])]);
  expectClose(loss2 ?? [], loss ?? [], 1e-6, "loss");
  // Both are f32, and other tiles add up in another order.
  expectClose(dh2 ?? [], dh ?? [], 5e-5, "dh");
  expectClose(
    dW2.flatMap((values) => [...values]),
    dW ?? [],
    5e-5,
    "dW",
  );
});

test.each([
  ["one update", 1, 1, undefined],
  ["two updates, capped logits and the vocabulary in pieces", 2, 2, 1.5],
])("%s of the head: loss and gradients equal their f64 twins", async (_, count, parts, cap) => {
  const gpu = await testGpu();
  const [M, V, C, r] = [9, 128, 5, 4];
  const labels = labelsOf(M, V);
  const W = randomNd([V, C], new Random(freshSeed()));
  const twin = (h: Nd, factors: readonly Nd[]): Nd => {
    const logits = product(h, W);
    for (let j = 0; j < factors.length; j += 2) {
      const more = product(factors[j] as Nd, factors[j + 1] as Nd); // u·Xᵀ
      logits.data.forEach((x, i) => {
        logits.data[i] = x + 0.5 * (more.data[i] ?? 0);
      });
    }
    const capped = nd(
      logits.shape,
      logits.data.map((x) => (cap ? cap * Math.tanh(x / cap) : x)),
    );
    return crossEntropyTwin(capped, labels, 0.25);
  };
  const shapes = Array.from({ length: count }, () => [
    [M, r],
    [V, r],
  ]).flat();
  await checkOp({
    inputs: [[M, C], ...shapes],
    op: (h, ...given) => {
      const head = upload(gpu, W);
      const pieces = Array.from({ length: parts }, (__, i) => rowsOf(head, (V / parts) * i, V / parts));
      const updates = Array.from({ length: count }, (__, j) => ({
        ...{ u: given[2 * j] as Tensor, X: given[2 * j + 1] as Tensor, scale: 0.5 },
      }));
      return linearCrossEntropy(h as Tensor, pieces, upload(gpu, labels, "i32"), 0.25, { logitCap: cap, updates });
    },
    twin: (h, ...given) => twin(h as Nd, given),
  });
});

test("updates of the head with rows in chunks: as undivided", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [M, V, C, r] = [200, 24, 32, 4];
  const [h, W, u, X] = [
    [M, C],
    [V, C],
    [M, r],
    [V, r],
  ].map((shape) => upload(gpu, randomNd(shape, random))) as [Tensor, Tensor, Tensor, Tensor];
  u.requiresGrad = true;
  X.requiresGrad = true;
  const labels = upload(gpu, labelsOf(M, V), "i32");
  const run = (bytes?: number) =>
    kernels(h, W, labels, 1, { dh: false, dW: false }, { updates: [{ u, X, scale: 0.5 }] }, bytes);
  const [whole, divided] = [run(), run(4 * 24 * 64)];
  const [loss, du, dX] = await readAll([whole.loss, whole.du[0] as Tensor, whole.dX[0] as Tensor]);
  const [loss2, du2, dX2] = await readAll([divided.loss, divided.du[0] as Tensor, divided.dX[0] as Tensor]);
  expectClose(loss2 ?? [], loss ?? [], 1e-6, "loss");
  expectClose(du2 ?? [], du ?? [], 5e-5, "du");
  expectClose(dX2 ?? [], dX ?? [], 5e-5, "dX");
});

test("a frozen head costs no gradient, a frozen everything neither", async () => {
  const gpu = await openGpu();
  const [h, W] = [upload(gpu, randomNd([5, 4], new Random(1))), upload(gpu, randomNd([8, 4], new Random(2)))];
  const labels = tensor(gpu, Int32Array.of(1, 2, -100, 3, 7), [5]);
  const count = (run: () => void): number => {
    gpu.resetCounters();
    gpu.scope(run);
    return [...gpu.counters().dispatches].reduce((sum, [name, n]) => sum + (name.startsWith("matmul") ? n : 0), 0);
  };
  expect(count(() => void linearCrossEntropy(h, W, labels))).toBe(1);
  h.requiresGrad = true;
  expect(count(() => void backward(linearCrossEntropy(h, W, labels)))).toBe(2);
  W.requiresGrad = true;
  expect(count(() => void backward(linearCrossEntropy(h, W, labels)))).toBe(3);
  gpu.destroy();
});

test("the gradient is that of the loss times what follows", async () => {
  const gpu = await testGpu();
  const h = upload(gpu, randomNd([5, 4], new Random(1)));
  const W = upload(gpu, randomNd([8, 4], new Random(2)));
  const labels = tensor(gpu, Int32Array.of(1, 2, -100, 3, 7), [5]);
  h.requiresGrad = true;
  const apart = backward(scaled(crossEntropy(matmul(h, W, "nt"), labels), 3)).get(h) as Tensor;
  const fused = backward(scaled(linearCrossEntropy(h, W, labels), 3)).get(h) as Tensor;
  expectClose(await read(fused), await read(apart), 1e-6);
});

test("a packed head is widened as it is read", async () => {
  const gpu = await testGpu();
  const values = randomNd([16, 8], new Random(3));
  const h = upload(gpu, randomNd([6, 8], new Random(4)));
  const labels = tensor(gpu, Int32Array.of(1, 2, -100, 3, 15, 0), [6]);
  const packed = packMatrix(gpu, Float32Array.from(values.data), [16, 8], "f16");
  const [loss = Number.NaN] = await read(linearCrossEntropy(h, packed, labels));
  const [exact = Number.NaN] = await read(linearCrossEntropy(h, upload(gpu, values), labels));
  expect(Math.abs(loss - exact)).toBeLessThan(1e-2);
});

// Beyond weights, hidden states and labels: 4·V·rows for the logits of a chunk of rows, where rows = 64·max(1, ⌊32 MiB / 256·V⌋),
// 4·M·C for dh, 4·rows·C twice more while dh is added up over pieces; buffers come in size classes, an eighth apart at most.
test.each([
  [152_064, 1, 1],
  [152_064, 4, 1],
  [32_000, 1, 4],
])("%i words in %i pieces, 2,048 tokens: what it takes beyond weights", async (V, pieces, chunkOf64) => {
  const real = await testGpu();
  const [M, C] = [2048, 1024];
  const gpu = dryGpu(real);
  const h = empty(gpu, [M, C], "h");
  h.requiresGrad = true;
  const W = Array.from({ length: pieces }, () => empty(gpu, [V / pieces, C], "W"));
  const labels = empty(gpu, [M], "labels", "i32");
  const workspace: GPUBuffer[] = [];
  const run = (): void => void backward(linearCrossEntropy(h, W, labels));
  gpu.trace(run, workspace);
  const bytes = workspace.reduce((sum, { size }) => sum + size, 0);
  const rows = 64 * chunkOf64;
  const counted = 4 * V * rows + 4 * M * C + (pieces > 1 ? 8 * rows * C : 0);
  expect(bytes).toBeGreaterThan(0.98 * counted);
  expect(bytes).toBeLessThan(1.15 * counted);
  expect(bytes).toBeLessThan(200e6);
  const before = gpu.counters().bytesLive;
  gpu.resetCounters();
  gpu.scope(run);
  expect(gpu.counters().bytesPeak - before).toBeLessThan(200e6);
});

test("152k words, one row in reach of each end: the loss of the f64 twin", async () => {
  const gpu = await testGpu();
  const random = new Random(freshSeed());
  const [M, V, C] = [3, 152_064, 4];
  const [h, W] = [randomNd([M, C], random), randomNd([V, C], random)];
  const labels = nd([M], [0, V - 1, 99_999]);
  const [loss = Number.NaN] = await read(
    linearCrossEntropy(upload(gpu, h), upload(gpu, W), upload(gpu, labels, "i32")),
  );
  const logits = product(h, W);
  const exact = [0, 1, 2].reduce((sum, i) => {
    const row = logits.data.subarray(i * V, (i + 1) * V);
    return sum + Math.log(row.reduce((all, x) => all + Math.exp(x), 0)) - (row[labels.data[i] ?? 0] ?? Number.NaN);
  }, 0);
  expectClose([loss], [exact], 1e-5);
});

test("rows go where the index says, and gradients back", async () => {
  const gpu = await testGpu();
  for (const H of [3, 4, 16]) {
    const places = [2, -1, 0, 1];
    const ids = [2, 3, 0, -1];
    await checkOp({
      inputs: [[4, H]],
      op: (x) =>
        gatherRows(x as Tensor, tensor(gpu, Int32Array.from(ids), [4]), tensor(gpu, Int32Array.from(places), [4])),
      twin: (x) =>
        nd(
          [4, H],
          ids.flatMap((id) => Array.from({ length: H }, (_, c) => (id < 0 ? 0 : ((x as Nd).data[id * H + c] ?? 0)))),
        ),
    });
  }
});

test("what does not fit is refused", async () => {
  const gpu = await testGpu();
  const [h, labels] = [empty(gpu, [2, 4], "h"), empty(gpu, [2], "l", "i32")];
  expect(() => linearCrossEntropy(h, empty(gpu, [8, 5], "W"), labels)).toThrow(
    new ShapeError("linearCrossEntropy: W must be [V,C] with C = 4, got [8,5]"),
  );
  expect(() => linearCrossEntropy(h, empty(gpu, [8, 4], "W"), empty(gpu, [3], "l", "i32"))).toThrow(
    new ShapeError("linearCrossEntropy: labels must be [M] = [2], got [3]"),
  );
  expect(() => linearCrossEntropy(h, empty(gpu, [8, 4], "W"), empty(gpu, [2], "l"))).toThrow(
    new ShapeError("linearCrossEntropy: labels must be i32, got f32"),
  );
});
