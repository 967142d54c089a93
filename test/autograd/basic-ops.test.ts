import { expect, test } from "vitest";
import {
  add,
  gelu,
  matmul,
  mean,
  mul,
  reshape,
  scale,
  silu,
  softmax,
  split,
  sub,
  sum,
  tanh,
} from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import type { Layout } from "../../src/kernels/matmul.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { empty, read, type Tensor } from "../../src/tensor/tensor.ts";
import golden from "../golden/ops.json" with { type: "json" };
import { checkOp, expectClose, type Nd, nd, testGpu, upload } from "../harness.ts";
import { binaryTwin, geluTwin, siluTwin, tanhTwin } from "../reference/elementwise.ts";
import { matmulTwin } from "../reference/matmul.ts";
import { reduceTwin, softmaxTwin } from "../reference/reduce.ts";

// ---- PyTorch's own numbers

interface Golden {
  readonly op: string;
  readonly options: { readonly approximate?: "none" | "tanh" };
  readonly inputs: Readonly<Record<string, { shape: number[]; data: number[] }>>;
  readonly outputs: { readonly y: { shape: number[]; data: number[] } };
  readonly dy: { shape: number[]; data: number[] };
  readonly grads: Readonly<Record<string, { shape: number[]; data: number[] }>>;
}

const GOLDEN_OPS: Readonly<Record<string, (inputs: Tensor[], options: Golden["options"]) => Tensor>> = {
  add: ([a, b]) => add(a as Tensor, b as Tensor),
  mul: ([a, b]) => mul(a as Tensor, b as Tensor),
  silu: ([x]) => silu(x as Tensor),
  gelu: ([x], { approximate }) => gelu(x as Tensor, approximate),
  softmax: ([x]) => softmax(x as Tensor),
};
const cases = Object.entries(golden.cases as unknown as Record<string, Golden>).filter(
  ([, { op }]) => op in GOLDEN_OPS,
);

test("PyTorch's numbers cover these ops", () => {
  expect(new Set(cases.map(([, { op }]) => op))).toEqual(new Set(Object.keys(GOLDEN_OPS)));
});

test.each(cases)("%s equals PyTorch, gradients too", async (_, { op, options, inputs, outputs, dy, grads }) => {
  const gpu = await testGpu();
  const tensors = Object.entries(inputs).map(([name, input]) => {
    const t = upload(gpu, nd(input.shape, input.data));
    t.requiresGrad = name in grads;
    return [name, t] as const;
  });
  const y =
    GOLDEN_OPS[op]?.(
      tensors.map(([, t]) => t),
      options,
    ) ?? expect.fail(op);
  expect(y.shape).toEqual(outputs.y.shape);
  expectClose(await read(y), outputs.y.data, 1e-6);
  const found = backward(y, upload(gpu, nd(dy.shape, dy.data)));
  for (const [name, t] of tensors) {
    const grad = found.get(t) ?? expect.fail(`no gradient for ${name}`);
    expect(grad.shape).toEqual(grads[name]?.shape);
    expectClose(await read(grad), grads[name]?.data ?? [], 1e-5, name);
  }
});

// ---- f64 twins

const SHAPES: [a: number[], b: number[]][] = [
  [[], []],
  [[7], [7]],
  [[2, 3, 5], [5]],
  [[5], [2, 3, 5]],
  [
    [2, 3, 5],
    [3, 1],
  ],
  [
    [2, 1, 5],
    [3, 1],
  ],
  [[2, 3], []],
  [
    [2, 1, 3, 1],
    [5, 1, 2],
  ],
];

for (const [op, f] of [
  ["add", add],
  ["sub", sub],
  ["mul", mul],
] as const)
  test.each(SHAPES)(`${op} of %j and %j, and its gradients, equal their f64 twin`, async (a, b) => {
    // Scaled, so that the two gradients of a plain sum are not one buffer, which the check would release twice.
    const twice = (x: Nd): Nd =>
      nd(
        x.shape,
        x.data.map((value) => 2 * value),
      );
    await checkOp({ inputs: [a, b], op: (p, q) => f(scale(p, 2), q), twin: (p, q) => binaryTwin(op, twice(p), q) });
  });

test.each(["add", "sub", "mul"] as const)(
  "%s gives a frozen operand no gradient and spends nothing on it",
  async (name) => {
    const op = { add, sub, mul }[name];
    for (const frozen of [0, 1])
      await checkOp({
        inputs: [
          [2, 3],
          [2, 3],
        ],
        op,
        twin: (p, q) => binaryTwin(name, p, q),
        frozen: [frozen],
      });
    const gpu = await testGpu();
    const [x, bias] = [upload(gpu, nd([2, 3], [1, 2, 3, 4, 5, 6])), upload(gpu, nd([3], [1, 2, 3]))];
    x.requiresGrad = true;
    const y = op(x, bias);
    const dy = upload(gpu, nd([2, 3], [1, 1, 1, 1, 1, 1]));
    gpu.resetCounters();
    backward(y, dy);
    expect(gpu.counters().dispatches.get("reduce"), "no sum for the frozen bias").toBeUndefined();
  },
);

test("an operand used twice gets both gradients", async () => {
  await checkOp({ inputs: [[3, 5]], op: (x) => mul(x, x), twin: (x) => binaryTwin("mul", x, x) });
});

test.each([[[]], [[1]], [[67]], [[3, 5]]])(
  "silu, gelu, tanh and scale of %j, and their gradients, equal their f64 twins",
  async (shape) => {
    await checkOp({ inputs: [shape], op: silu, twin: siluTwin });
    await checkOp({ inputs: [shape], op: tanh, twin: tanhTwin });
    await checkOp({ inputs: [shape], op: (x) => gelu(x), twin: (x) => geluTwin(x) });
    await checkOp({ inputs: [shape], op: (x) => gelu(x, "tanh"), twin: (x) => geluTwin(x, "tanh") });
    await checkOp({
      inputs: [shape],
      op: (x) => scale(x, -1.5),
      twin: (x) =>
        nd(
          x.shape,
          x.data.map((v) => -1.5 * v),
        ),
    });
  },
);

test.each([[[1]], [[7]], [[3, 5]], [[2, 3, 11]]])(
  "softmax of %j, and its gradient, equal their f64 twin",
  async (shape) => {
    await checkOp({ inputs: [shape], op: softmax, twin: softmaxTwin });
  },
);

for (const [op, f] of [
  ["sum", sum],
  ["mean", mean],
] as const)
  test.each([
    [[], undefined],
    [[7], undefined],
    [[2, 3, 5], undefined],
    [[2, 3, 5], 0],
    [[2, 3, 5], 1],
    [[2, 3, 5], -1],
    [[521, 1], 0],
  ] as [number[], number | undefined][])(
    `${op} of %j over axis %s, and its gradient, equal their f64 twin`,
    async (shape, axis) => {
      for (const keepDims of [false, true])
        await checkOp({
          inputs: [shape],
          op: (x) => f(x, axis, keepDims),
          twin: (x) => reduceTwin(op, x, axis, keepDims),
        });
    },
  );

test("reshape keeps the values and shapes the gradient back", async () => {
  await checkOp({
    inputs: [[2, 3, 5]],
    op: (x) => scale(reshape(x, [6, 5]), 3),
    twin: (x) =>
      nd(
        [6, 5],
        x.data.map((v) => 3 * v),
      ),
  });
  const gpu = await testGpu();
  expect(() => reshape(empty(gpu, [2, 3], "x"), [4])).toThrow(
    new ShapeError("reshape: [2,3] has 6 elements and cannot take the shape [4]"),
  );
});

const shapes = (layout: Layout, M: number, N: number, K: number): [number[], number[]] => [
  layout === "tn" ? [K, M] : [M, K],
  layout === "nt" ? [N, K] : [K, N],
];

for (const layout of ["nn", "nt", "tn"] as const) {
  test.each([
    [1, 1, 1],
    [4, 8, 12],
    [5, 7, 3],
  ])(`matmul ${layout} of %i×%i over %i, and its gradients, equal their f64 twin`, async (M, N, K) => {
    const inputs = shapes(layout, M, N, K);
    const op = (x: Tensor, w: Tensor) => matmul(x, w, layout);
    const twin = (x: Nd, w: Nd) => matmulTwin(x, w, layout);
    await checkOp({ inputs, op: op as never, twin: twin as never });
    await checkOp({ inputs, op: op as never, twin: twin as never, frozen: [1] });
    await checkOp({ inputs, op: op as never, twin: twin as never, frozen: [0] });
  });

  test(`matmul ${layout} with a bias, and its gradients, equal their f64 twin`, async () => {
    const [M, N, K] = [5, 8, 12];
    await checkOp({
      inputs: [layout === "tn" ? [K, M] : [M, K], layout === "nt" ? [N, K] : [K, N], [N]],
      op: (...[x, w, bias]) => matmul(x as Tensor, w as Tensor, layout, bias),
      twin: (...[x, w, bias]) => binaryTwin("add", matmulTwin(x as Nd, w as Nd, layout), bias as Nd),
    });
  });

  test(`matmul ${layout} of batches, and its gradients, equal their f64 twin`, async () => {
    const [x, w] = shapes(layout, 4, 5, 8);
    await checkOp({
      inputs: [
        [3, ...x],
        [3, ...w],
      ],
      op: (p, q) => matmul(p, q, layout),
      twin: (p, q) => matmulTwin(p, q, layout),
    });
  });
}

test.each(["nn", "nt"] as const)(
  "matmul %s of a three-axis x sums the gradient of w over all its rows",
  async (layout) => {
    const [, w] = shapes(layout, 1, 4, 8);
    const flat = (x: Nd): Nd => nd([6, 8], x.data);
    await checkOp({
      inputs: [[2, 3, 8], w],
      op: (p, q) => matmul(p, q, layout),
      twin: (p, q) => nd([2, 3, 4], matmulTwin(flat(p), q, layout).data),
    });
  },
);

test("matmul with a frozen w runs one product backward", async () => {
  const gpu = await testGpu();
  const [x, w] = [upload(gpu, nd([4, 4], new Float64Array(16))), upload(gpu, nd([4, 4], new Float64Array(16)))];
  x.requiresGrad = true;
  const y = matmul(x, w, "nt");
  gpu.resetCounters();
  backward(y, w);
  const products = [...gpu.counters().dispatches].filter(([name]) => name !== "matmul-splits");
  expect(products.map(([name, n]) => [name.split("-")[0], n])).toEqual([["matmul", 1]]);
});

// ---- split

const columnsOf = ({ shape, data }: Nd, first: number, width: number): Nd => {
  const N = shape.at(-1) ?? 1;
  return nd(
    [...shape.slice(0, -1), width],
    data.filter((_, i) => i % N >= first && i % N < first + width),
  );
};
const total = ({ data }: Nd): number => data.reduce((a, b) => a + b, 0);

test.each([
  [
    [2, 3, 8],
    [4, 2, 2],
  ],
  [[5, 1], [1]],
  [
    [3, 7],
    [3, 4],
  ],
])("parts of %j by widths %j are its columns, gradients too", async (shape, widths) => {
  const firsts = widths.map((_, i) => widths.slice(0, i).reduce((a, b) => a + b, 0));
  for (const [i, width] of widths.entries())
    await checkOp({
      inputs: [shape],
      op: (x) => split(x, widths)[i] as Tensor,
      twin: (x) => columnsOf(x, firsts[i] ?? 0, width),
    });
  await checkOp({
    inputs: [shape],
    op: (x) => split(x, widths).reduce((before, part, i) => add(before, scale(sum(part), i + 1)), sum(x)),
    twin: (x) =>
      nd(
        [],
        [widths.reduce((before, width, i) => before + (i + 1) * total(columnsOf(x, firsts[i] ?? 0, width)), total(x))],
      ),
  });
});

test("a part of a split that nothing came of has a gradient of zero", async () => {
  const gpu = await testGpu();
  const x = upload(gpu, nd([2, 4], new Float64Array(8).fill(1)));
  x.requiresGrad = true;
  const [, middle] = split(x, [1, 2, 1]);
  const dx = backward(sum(middle as Tensor)).get(x) ?? expect.fail("x has a gradient");
  expect([...(await read(dx))]).toEqual([0, 1, 1, 0, 0, 1, 1, 0]);
});

test("split names the widths that do not add up", async () => {
  const gpu = await testGpu();
  expect(() => split(empty(gpu, [2, 4], "x"), [1, 2])).toThrow(
    new ShapeError("split: widths must add up to 4, got 1,2"),
  );
});
