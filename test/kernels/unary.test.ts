import { expect, test } from "vitest";
import { gelu, geluBackward, silu, siluBackward, tanh, tanhBackward } from "../../src/kernels/unary.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";
import { checkOp, expectClose, nd, testGpu } from "../harness.ts";
import { geluTwin, siluTwin, tanhTwin } from "../reference/elementwise.ts";

const OPS = [
  { name: "silu", op: silu, back: siluBackward, twin: siluTwin },
  { name: "gelu", op: gelu, back: geluBackward, twin: geluTwin },
  {
    name: "gelu by tanh",
    op: (x: Parameters<typeof gelu>[0]) => gelu(x, "tanh"),
    back: (dy: Parameters<typeof gelu>[0], x: Parameters<typeof gelu>[0]) => geluBackward(dy, x, "tanh"),
    twin: (x: Parameters<typeof geluTwin>[0]) => geluTwin(x, "tanh"),
  },
];
const CURVES = [...OPS, { name: "tanh", op: tanh, back: tanhBackward, twin: tanhTwin }];
const EXTREMES = [0, 1e-30, -1e-30, 5, -5, 9, -9, 40, -40, 88, -88, 100, -100, 1e4, -1e4, 1e20, -1e20];

for (const { name, op, back, twin } of CURVES) {
  test.each([[[1]], [[67]], [[3, 5, 7]]])(`${name} of %j equals its f64 twin`, async (shape) => {
    await checkOp({ inputs: [shape], op: (x) => op(x), twin: (x) => twin(x), gradients: false, tolerance: 1e-6 });
  });

  test(`${name} and its derivative are right to 1e-6 from −10 to 10`, async () => {
    const gpu = await testGpu();
    const xs = Float32Array.from({ length: 2001 }, (_, i) => (i - 1000) / 100);
    const ones = tensor(gpu, new Float32Array(xs.length).fill(1), [xs.length]);
    const x = tensor(gpu, xs, [xs.length]);
    const f = (h: number) =>
      twin(
        nd(
          [xs.length],
          Float64Array.from(xs, (value) => value + h),
        ),
      ).data;
    expectClose(await read(op(x)), f(0), 1e-6);
    const [up, down] = [f(1e-5), f(-1e-5)];
    expectClose(
      await read(back(ones, x)),
      up.map((value, i) => (value - (down[i] ?? 0)) / 2e-5),
      1e-6,
    );
  });
}

for (const { name, op, back, twin } of OPS)
  test(`${name} is finite, and flat or straight, far from 0`, async () => {
    const gpu = await testGpu();
    const x = tensor(gpu, EXTREMES, [EXTREMES.length]);
    const ones = tensor(
      gpu,
      EXTREMES.map(() => 1),
      [EXTREMES.length],
    );
    expectClose(await read(op(x)), twin(nd([EXTREMES.length], EXTREMES)).data, 1e-6);
    const slopes = EXTREMES.map((value) => (Math.abs(value) < 1 ? 0.5 : value > 39 ? 1 : value < -39 ? 0 : Number.NaN));
    const derivative = await read(back(ones, x));
    slopes.forEach((slope, i) => {
      if (!Number.isNaN(slope)) expect(derivative[i], `at ${EXTREMES[i]}`).toBeCloseTo(slope, 5);
    });
  });

test("tanh is −1 or 1, and flat, far from 0", async () => {
  const gpu = await testGpu();
  const far = EXTREMES.filter((value) => Math.abs(value) >= 9);
  const x = tensor(gpu, far, [far.length]);
  const ones = tensor(gpu, new Float32Array(far.length).fill(1), [far.length]);
  expectClose(await read(tanh(x)), far.map(Math.tanh), 1e-6);
  expectClose(await read(tanhBackward(ones, x)), new Array(far.length).fill(0), 1e-6);
});

test("a backward names the shapes that differ", async () => {
  const gpu = await testGpu();
  const [x, dy] = [empty(gpu, [2, 3], "x"), empty(gpu, [3, 2], "dy")];
  expect(() => siluBackward(dy, x)).toThrow(
    new ShapeError("siluBackward: dy must have the shape of x = [2,3], got [3,2]"),
  );
  expect(() => tanhBackward(dy, x)).toThrow(
    new ShapeError("tanhBackward: dy must have the shape of x = [2,3], got [3,2]"),
  );
  expect(() => geluBackward(dy, x)).toThrow(
    new ShapeError("geluBackward: dy must have the shape of x = [2,3], got [3,2]"),
  );
});
