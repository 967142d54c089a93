/** What kernel and op tests share: one GPU, plain f64 arrays, and a check of values and gradients against an f64 twin. */
import { expect } from "vitest";
import { backward } from "../src/autograd/engine.ts";
import { type Gpu, openGpu } from "../src/gpu/gpu.ts";
import { Random } from "../src/tensor/random.ts";
import { read, type Tensor, tensor } from "../src/tensor/tensor.ts";

let opened: Promise<Gpu> | undefined;

/** The GPU of this test process. Every buffer is handed out full of NaN. A machine without any adapter fails. */
export function testGpu(): Promise<Gpu> {
  opened ??= openGpu({ poison: true });
  return opened;
}

/** A plain f64 array: what the twins compute on. */
export interface Nd {
  readonly shape: readonly number[];
  readonly data: Float64Array;
}

export const nd = (shape: readonly number[], data: ArrayLike<number>): Nd => ({ shape, data: Float64Array.from(data) });

export const zeros = (shape: readonly number[]): Nd => nd(shape, new Float64Array(shape.reduce((a, b) => a * b, 1)));

/** Values of the normal distribution, rounded to f32 so that both sides start from the same numbers. */
export function randomNd(shape: readonly number[], random: Random, std = 1): Nd {
  return nd(
    shape,
    zeros(shape).data.map(() => Math.fround(random.normal(0, std))),
  );
}

/** A fresh seed each run; failures print it. */
export const freshSeed = (): number => Math.floor(Math.random() * 2 ** 31);

export function upload(gpu: Gpu, { shape, data }: Nd, dtype: "f32" | "i32" = "f32"): Tensor {
  return tensor(gpu, dtype === "i32" ? Int32Array.from(data) : Float32Array.from(data), shape);
}

/** Fails unless every |actual − expected| ≤ atol + rtol·|expected|. NaN fails. */
export function expectClose(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  tolerance = 1e-5,
  what = "values",
): void {
  expect(actual.length, `${what}: count`).toBe(expected.length);
  let worst = 0;
  let worstAt = -1;
  for (let i = 0; i < expected.length; i++) {
    const a = actual[i] ?? Number.NaN;
    const e = expected[i] ?? Number.NaN;
    const error = Math.abs(a - e) / (1 + Math.abs(e));
    if (!(error <= worst) && !Number.isNaN(worst)) {
      worst = error;
      worstAt = i;
    }
  }
  expect(
    worst <= tolerance,
    `${what}: at ${worstAt} got ${actual[worstAt]}, expected ${expected[worstAt]} (error ${worst} > ${tolerance})`,
  ).toBe(true);
}

export interface OpCheck {
  /** f32 inputs, given as values or as shapes to fill at random. */
  readonly inputs: readonly (Nd | readonly number[])[];
  /** The op on tensors; all inputs require a gradient unless `frozen` lists them. */
  readonly op: (...inputs: Tensor[]) => Tensor;
  /** The same in plain f64. */
  readonly twin: (...inputs: Nd[]) => Nd;
  /** Error allowed in values, relative to 1 + |expected|. */
  readonly tolerance?: number;
  /** Check gradients too, by central differences of the twin: keep the inputs small. Default true. */
  readonly gradients?: boolean;
  readonly gradientTolerance?: number;
  /** Indices of inputs without a gradient. */
  readonly frozen?: readonly number[];
}

/** Checks an op's values, and its gradients for a random dy, against its f64 twin. */
export async function checkOp(check: OpCheck): Promise<void> {
  const seed = freshSeed();
  const random = new Random(seed);
  const gpu = await testGpu();
  const { tolerance = 1e-5, gradients = true, gradientTolerance = 1e-4, frozen = [] } = check;
  const inputs = check.inputs.map((input) => ("data" in input ? (input as Nd) : randomNd(input, random)));
  const expected = check.twin(...inputs);
  const dy = randomNd(expected.shape, random);
  const { y, grads } = gpu.scope(() => {
    const tensors = inputs.map((input, i) => {
      const t = upload(gpu, input);
      t.requiresGrad = gradients && !frozen.includes(i);
      return t;
    });
    const out = check.op(...tensors);
    const found = gradients ? backward(out, upload(gpu, dy)) : new Map<Tensor, Tensor>();
    return { y: out, grads: tensors.map((t) => found.get(t)) };
  });
  expect(y.shape, `shape (seed ${seed})`).toEqual(expected.shape);
  expectClose(await read(y), expected.data, tolerance, `values (seed ${seed})`);
  if (gradients) {
    for (const [i, input] of inputs.entries()) {
      const grad = grads[i];
      if (frozen.includes(i)) expect(grad, `input ${i} is frozen`).toBeUndefined();
      else if (!grad) expect.fail(`input ${i} has no gradient (seed ${seed})`);
      else {
        expect(grad.shape, `gradient shape of input ${i}`).toEqual(input.shape);
        expectClose(
          await read(grad),
          numericGradient(check.twin, inputs, i, dy),
          gradientTolerance,
          `gradient of input ${i} (seed ${seed})`,
        );
      }
    }
  }
  gpu.release(y, ...grads.filter((g) => g !== undefined));
}

/** d(Σ dy·f)/d(input) by central differences in f64. */
function numericGradient(f: (...inputs: Nd[]) => Nd, inputs: readonly Nd[], which: number, dy: Nd): Float64Array {
  const h = 1e-5;
  const target = inputs[which]?.data ?? new Float64Array();
  const loss = (): number => f(...inputs).data.reduce((sum, y, i) => sum + y * (dy.data[i] ?? 0), 0);
  return Float64Array.from(target, (value, i) => {
    target[i] = value + h;
    const up = loss();
    target[i] = value - h;
    const down = loss();
    target[i] = value;
    return (up - down) / (2 * h);
  });
}
