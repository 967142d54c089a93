/**
 * Laplace's approximation of the posterior over what was trained, θ ~ N(θ*, H⁻¹), and the model made linear at θ*, f(x) + J(x)·(θ − θ*):
 * Laplace-LoRA (Yang et al., arXiv:2308.13111) with another curvature, which knows how parameters of different layers depend on each other:
 *
 *     H = Σ g·gᵀ + τ·I ≈ Vᵀ·diag(λ)·V + ρ·(I − Vᵀ·V) + τ·I        τ: precision of the prior, N(0, τ⁻¹·I)
 *
 * The rows g [P] are gradients of log-probabilities, such that Σ g·gᵀ is the Fisher matrix, which of a softmax is the generalised
 * Gauss-Newton matrix. It has no higher rank than there are g's: V [k,P] are its eigenvectors and λ its eigenvalues, exact up to rounding
 * where there are no more than `rank` of them, and ρ is 0. Of more, the largest are kept, block by block as in incremental PCA, and what the
 * others have lost is spread evenly over all other directions: ρ keeps the trace, as in probabilistic PCA (Tipping and Bishop, 1999). Neither
 * H nor anything else of P² numbers is ever made.
 */
import type { Gradients } from "../autograd/engine.ts";
import { addInto, scale as scaled } from "../kernels/axpy.ts";
import { copyRows } from "../kernels/copy-rows.ts";
import { matmul } from "../kernels/matmul.ts";
import { ShapeError } from "../tensor/errors.ts";
import { type Matrix, matrix, multiply, symmetricEigen, transpose } from "../tensor/linalg.ts";
import type { Random } from "../tensor/random.ts";
import { empty, read, readAll, rowsOf, type Tensor, tensor, view } from "../tensor/tensor.ts";

/** What the data say of the parameters: Vᵀ·diag(λ)·V + ρ·(I − Vᵀ·V). */
export interface Curvature {
  readonly parameters: readonly Tensor[];
  /** λ [k], descending, above 0. */
  readonly values: Float64Array;
  /** The columns of V that belong to each parameter: [k, its size]. */
  readonly directions: readonly Tensor[];
  /** ρ, of each direction outside V. */
  readonly rest: number;
  /** P, numbers in all parameters. */
  readonly size: number;
  /** ‖θ*‖² */
  readonly squaredNorm: number;
  /** Frees the directions. */
  destroy(): void;
}

/** Makes a gradient. What it allocates is given back. */
export type Gradient = () => Gradients;

/** Eigenvalues below this share of the largest are rounding errors of sums in f32. */
const SMALLEST = 1e-5;
/** Gradients that are taken together, at most. */
const BLOCK = 64;

/**
 * Σ g·gᵀ over these gradients with respect to the parameters, of which `rank` directions are told apart. Takes the memory of rank + 64 sets of
 * parameters, or twice `rank` where that is less. Throws ShapeError where no gradient is above 0.
 */
export async function curvatureOf(
  parameters: readonly Tensor[],
  gradients: AsyncIterable<Gradient> | Iterable<Gradient>,
  rank = 128,
): Promise<Curvature> {
  const [first] = parameters;
  if (!first || !Number.isInteger(rank) || rank < 1)
    throw new ShapeError(`curvatureOf: rank must be a whole number of at least 1, got ${rank}`);
  const { gpu } = first;
  const capacity = rank + Math.min(rank, BLOCK);
  const stack = parameters.map((p) => empty(gpu, [capacity, p.size], "curvature"));
  const size = parameters.reduce((sum, p) => sum + p.size, 0);
  let lost = 0;
  const shrink = async (rows: number, unit: boolean): Promise<Float64Array> => {
    const found = await compress(stack, rows, rank, unit);
    lost += found.lost;
    return found.values;
  };
  try {
    let count = 0;
    for await (const gradient of gradients) {
      if (count === capacity) count = (await shrink(count, false)).length;
      gpu.scope(() => putGradients(parameters, gradient(), stack, count));
      gpu.flush();
      count++;
    }
    const values = await shrink(count, true);
    const directions = stack.map((t) => scaled(topRows(t, values.length), 1));
    const destroy = (): void => gpu.release(...directions);
    const rest = lost / Math.max(1, size - values.length);
    return { parameters, values, directions, rest, size, squaredNorm: await squaredNormOf(parameters), destroy };
  } finally {
    gpu.release(...stack);
  }
}

/** Puts a gradient into one row of a stack; a parameter that has none gets zeros. */
function putGradients(
  parameters: readonly Tensor[],
  gradients: Gradients,
  stack: readonly Tensor[],
  row: number,
): void {
  parameters.forEach((p, i) => {
    const target = stack[i] as Tensor;
    const g = gradients.get(p) ?? tensor(p.gpu, new Float32Array(p.size), p.shape);
    copyRows(view(g, [1, 1, p.size]), view(target, [1, ...target.shape]), row);
  });
}

const topRows = (t: Tensor, count: number): Tensor => rowsOf(t, 0, count);

/**
 * Turns the first `count` rows S of a stack into the fewest that have the same SᵀS, but for what is beyond `rank` or lost in rounding:
 * √λᵢ·vᵢ, or with `unit` vᵢ, of the eigenvectors of SᵀS. They come from those of S·Sᵀ = U·diag(λ)·Uᵀ: diag(√λ)·V = Uᵀ·S. Returns λ and what
 * the eigenvalues beyond `rank` add up to.
 */
async function compress(
  stack: readonly Tensor[],
  count: number,
  rank: number,
  unit: boolean,
): Promise<{ readonly values: Float64Array; readonly lost: number }> {
  const [first] = stack as [Tensor];
  const gram = count === 0 ? matrix(1, 1) : await sumOfProducts(stack.map((t) => topRows(t, count)));
  if (!(gram.data.some((x) => x > 0) && gram.data.every(Number.isFinite)))
    throw new ShapeError(
      `curvatureOf: gradients must be finite and one of them above 0, got a sum of squares of ${trace(gram)}`,
    );
  const { values, vectors } = symmetricEigen(gram);
  const real = values.filter((value) => value > SMALLEST * (values[0] ?? 0));
  const kept = real.slice(0, rank);
  const scales = kept.map((value) => (unit ? 1 / Math.sqrt(value) : 1));
  const turn = Float32Array.from(
    { length: kept.length * count },
    (_, p) => (vectors.data[(p % count) * count + Math.floor(p / count)] ?? 0) * (scales[Math.floor(p / count)] ?? 0),
  );
  first.gpu.scope(() => {
    const T = tensor(first.gpu, turn, [kept.length, count]);
    for (const t of stack) {
      const turned = first.gpu.scope(() => matmul(T, topRows(t, count)));
      copyRows(view(turned, [1, ...turned.shape]), view(t, [1, ...t.shape]), 0);
      first.gpu.release(turned);
    }
  });
  return { values: kept, lost: real.slice(rank).reduce((a, b) => a + b, 0) };
}

const trace = ({ rows, data }: Matrix): number =>
  Array.from({ length: rows }, (_, i) => data[i * (rows + 1)] ?? 0).reduce((a, b) => a + b, 0);

/** Σ x·wᵀ over pairs of matrices, summed on the device. */
function productSum(pairs: readonly (readonly [x: Tensor, w: Tensor])[]): Tensor {
  const [[x, w], ...others] = pairs as [readonly [Tensor, Tensor], ...(readonly [Tensor, Tensor])[]];
  const { gpu } = x;
  return gpu.scope(() => {
    const sum = matmul(x, w, "nt");
    for (const [y, z] of others) gpu.scope(() => addInto(matmul(y, z, "nt"), sum));
    return sum;
  });
}

async function sumOfProducts(parts: readonly Tensor[]): Promise<Matrix> {
  const sum = productSum(parts.map((t) => [t, t]));
  const [rows = 0] = sum.shape;
  const values = await read(sum);
  sum.gpu.release(sum);
  return matrix(rows, rows, values);
}

async function squaredNormOf(parameters: readonly Tensor[]): Promise<number> {
  const values = await readAll(parameters);
  return values.reduce((sum, part) => part.reduce((s, x) => s + x * x, sum), 0);
}

/** What the evidence depends on. */
type Spectrum = Pick<Curvature, "values" | "rest" | "size" | "squaredNorm">;

/** Σ f(eigenvalue) over all of them. */
const overAll = ({ values, rest, size }: Spectrum, f: (value: number) => number): number =>
  values.reduce((sum, value) => sum + f(value), (size - values.length) * f(rest));

/**
 * How the logarithm of the marginal likelihood depends on the prior's precision: −τ/2·‖θ*‖² − ½·Σ log(1 + λ/τ), over all P eigenvalues. Added
 * to the log-likelihood at θ* it is Laplace's approximation of the whole: P/2·log τ − ½·log det H − τ/2·‖θ*‖² with what cancels taken out.
 */
export const logEvidence = (spectrum: Spectrum, tau: number): number =>
  -(tau * spectrum.squaredNorm + overAll(spectrum, (value) => Math.log1p(value / tau))) / 2;

/**
 * The τ at which `logEvidence` is largest: the root of τ·‖θ*‖² = γ(τ) = Σ λ/(λ + τ), the number of parameters that the data determine
 * (MacKay, "Bayesian interpolation", 1992). γ falls with τ, so there is one root; it is found by bisection. Throws ShapeError where θ* is 0.
 */
export function bestPrecision(spectrum: Spectrum): number {
  const { squaredNorm, size } = spectrum;
  if (!(squaredNorm > 0))
    throw new ShapeError("bestPrecision: parameters must not all be 0, got a norm of 0. Give the precision");
  const excess = (tau: number): number => tau * squaredNorm - overAll(spectrum, (value) => value / (value + tau));
  let [low, high] = [0, size / squaredNorm];
  for (let i = 0; i < 200; i++) {
    const middle = (low + high) / 2;
    if (excess(middle) < 0) low = middle;
    else high = middle;
  }
  return high;
}

/**
 * J·H⁻¹·Jᵀ [C,C], the covariance of C outputs of the linear model, of whose gradients J [C,P] is made. With Q = J·Vᵀ and what is left of J
 * outside the directions, R = J − Q·V, it is R·Rᵀ/(ρ + τ) + Q·diag(1/(λ + τ))·Qᵀ: no difference of large numbers, so f32 is enough.
 */
export async function outputCovariance(
  { parameters, directions, values, rest }: Curvature,
  tau: number,
  jacobian: readonly Gradient[],
): Promise<Matrix> {
  const [first] = parameters as [Tensor];
  const { gpu } = first;
  const C = jacobian.length;
  const { inside, outside } = gpu.scope(() => {
    const J = parameters.map((p) => empty(gpu, [C, p.size], "jacobian"));
    jacobian.forEach((gradient, c) => void gpu.scope(() => putGradients(parameters, gradient(), J, c)));
    const Q = productSum(J.map((part, i) => [part, directions[i] as Tensor]));
    const R = J.map((part, i) => matmul(Q, directions[i] as Tensor, "nn", { scale: -1, residual: part }));
    return { inside: Q, outside: productSum(R.map((part) => [part, part])) };
  });
  const [q, r] = await readAll([inside, outside]);
  gpu.release(inside, outside);
  const Q = matrix(C, values.length, q);
  const weighted = matrix(
    C,
    values.length,
    Q.data.map((x, p) => x / ((values[p % values.length] ?? 0) + tau)),
  );
  const seen = multiply(weighted, transpose(Q));
  return matrix(
    C,
    C,
    seen.data.map((x, p) => x + (r?.[p] ?? Number.NaN) / (rest + tau)),
  );
}

/**
 * A draw of θ − θ* from N(0, H⁻¹), a tensor for each parameter: with t = ρ + τ, t^(−½)·(ε − Vᵀ·diag(1 − √(t/(λ + τ)))·V·ε) of a standard
 * normal ε.
 */
export async function drawOffset(
  { parameters, directions, values, rest }: Curvature,
  tau: number,
  random: Random,
): Promise<Tensor[]> {
  const [first] = parameters as [Tensor];
  const { gpu } = first;
  const std = 1 / Math.sqrt(rest + tau);
  const noise = parameters.map((p) =>
    tensor(
      gpu,
      Float32Array.from({ length: p.size }, () => random.normal(0, std)),
      [1, p.size],
    ),
  );
  const along = productSum(noise.map((part, i) => [part, directions[i] as Tensor]));
  const inside = await read(along);
  const removed = inside.map((x, i) => x * (Math.sqrt((rest + tau) / ((values[i] ?? 0) + tau)) - 1));
  const offset = gpu.scope(() => {
    const D = tensor(gpu, removed, [1, values.length]);
    return noise.map((part, i) => matmul(D, directions[i] as Tensor, "nn", { residual: part }));
  });
  gpu.release(along, ...noise);
  return offset.map((part, i) => view(part, parameters[i]?.shape ?? []));
}
