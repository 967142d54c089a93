/** LoftQ: an adapter that begins with what quantising took from the base. */
import { axpy } from "../kernels/axpy.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { doraNorms } from "../kernels/dora.ts";
import { matmul } from "../kernels/matmul.ts";
import { packMatrix } from "../kernels/pack.ts";
import { unpackMatrix } from "../kernels/unpack.ts";
import { ShapeError } from "../tensor/errors.ts";
import { randomizedSvd } from "../tensor/linalg.ts";
import { isPacked, type PackedMatrix, tensorsIn } from "../tensor/packed.ts";
import { Random } from "../tensor/random.ts";
import { read, type Tensor, tensor } from "../tensor/tensor.ts";
import type { LoraAdapter } from "./adapter.ts";
import { deviceOperator } from "./device-operator.ts";
import { rowSquares } from "./dora-linear.ts";
import { asValues, principal } from "./init-factors.ts";
import type { LoraPair } from "./parts.ts";

export interface LoftqOptions {
  /**
   * 1 unless given: the base stays what it is, and the saved adapter fits it wherever it is quantised the same way. More of them quantise
   * each adapted layer anew, W − s·B·A: such an adapter belongs to that very base and to no other.
   */
  readonly iterations?: number;
  readonly seed?: number;
  /** Ends it by throwing the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

/** Power iterations: singular values of rounding errors fall slowly. */
const POWER_ITERATIONS = 6;

/**
 * LoftQ (arXiv:2310.08659) on a base that is quantised already: s·B·A is the matrix of rank r nearest to W − dq(Q), so that the layer begins
 * nearer to W than Q alone. Further iterations alternate Q = quant(W − s·B·A) and that. PEFT leaves s out, which is exact only for s = 1.
 *
 * `original` gives W of a module, [N,K] by rows; it is asked for one module at a time: see `openLinears`. Throws ShapeError, before anything is
 * changed, for a number of iterations that is no whole number above 0, a layer that is not int8 or nf4, a rank above a module's, and as `start`.
 */
export async function initLoftq(
  adapter: LoraAdapter,
  original: (module: string) => Promise<Float32Array>,
  { iterations = 1, seed = 0, signal }: LoftqOptions = {},
): Promise<void> {
  if (!Number.isInteger(iterations) || iterations < 1)
    throw new ShapeError(`loftq: iterations must be a whole number of at least 1, got ${iterations}`);
  adapter.demandStart();
  const quantised = [...adapter.pairs].map(([name, pair]) => ({ name, pair, packed: quantisedOf(name, pair) }));
  const random = new Random(seed);
  const starts = new Map<string, ReturnType<typeof asValues>>();
  const replaced = new Map<LoraPair, PackedMatrix>();
  try {
    for (const { name, pair, packed } of quantised) {
      signal?.throwIfAborted();
      const { factors, Q } = await alternated(await original(name), packed, pair, iterations, random);
      starts.set(name, factors);
      if (Q !== packed) replaced.set(pair, Q);
    }
  } catch (error) {
    for (const Q of replaced.values()) Q.gpu.release(...tensorsIn(Q));
    throw error;
  }
  for (const [{ layer }, Q] of replaced) {
    Q.gpu.release(...tensorsIn(layer.weight));
    layer.weight = Q;
  }
  adapter.start(starts, false);
  for (const { layer, A, B, scale, magnitude } of adapter.pairs.values())
    if (magnitude)
      A.gpu.scope(() => copyTo(doraNorms(layer.weight, A, B, rowSquares(layer.weight), scale).gain, magnitude));
}

function quantisedOf(name: string, { layer: { weight }, A }: LoraPair): PackedMatrix {
  if (!isPacked(weight) || (weight.format !== "int8" && weight.format !== "nf4"))
    throw new ShapeError(
      `loftq: the base must be int8 or nf4, got ${isPacked(weight) ? weight.format : "f32"} for ${name}. Load it quantised`,
    );
  const [[r = 0], most] = [A.shape, Math.min(...weight.shape)];
  if (r > most) throw new ShapeError(`loftq: r must be at most ${most}, the rank of ${name}, got ${r}`);
  return weight;
}

async function alternated(
  values: Float32Array,
  packed: PackedMatrix,
  { A: { shape }, scale }: LoraPair,
  iterations: number,
  random: Random,
): Promise<{ readonly factors: ReturnType<typeof asValues>; readonly Q: PackedMatrix }> {
  const { gpu, format, doubleQuant } = packed;
  const [r = 0] = shape;
  const W = tensor(gpu, values, packed.shape);
  let Q = packed;
  for (let i = 1; ; i++) {
    const rest = gpu.scope(() => axpy(1, W, -1, unpackMatrix(Q)));
    const options = { random, iterations: POWER_ITERATIONS, oversample: r };
    const factors = asValues(principal(await randomizedSvd(deviceOperator(rest), r, options), r, scale));
    gpu.release(rest);
    if (i === iterations) {
      gpu.release(W);
      return { factors, Q };
    }
    if (Q !== packed) gpu.release(...tensorsIn(Q));
    const target = gpu.scope(() => withoutPair(W, factors, r, scale));
    Q = packMatrix(gpu, await read(target), packed.shape, format, { doubleQuant });
    gpu.release(target);
  }
}

/** W − s·B·A */
function withoutPair(W: Tensor, { A, B }: ReturnType<typeof asValues>, r: number, s: number): Tensor {
  const [N = 0, K = 0] = W.shape;
  return axpy(1, W, -1, matmul(tensor(W.gpu, B, [N, r]), tensor(W.gpu, A, [r, K]), "nn", { scale: s }));
}
