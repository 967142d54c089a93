/** LoRA-GA: an adapter that begins along the gradient of the full weights. */
import { backward } from "../autograd/engine.ts";
import { addInto } from "../kernels/axpy.ts";
import { ShapeError } from "../tensor/errors.ts";
import { randomizedSvd, type Svd, transpose } from "../tensor/linalg.ts";
import { isPacked } from "../tensor/packed.ts";
import { Random } from "../tensor/random.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";
import type { LoraAdapter } from "./adapter.ts";
import { type CalibrationBatch, demandBatches, inRuns } from "./calibration.ts";
import { deviceOperator, planOperator } from "./device-operator.ts";
import { asValues, type Factors, rowsOf, scaledRows } from "./init-factors.ts";

const DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"] as const;
const SCALES = ["stable", "weight_svd", "gd_scale", "unit"] as const;

/** By PEFT's names and defaults (`LoraGAConfig`). */
export interface LoraGaOptions {
  /**
   * Which of the 2r singular vectors of the gradient A and B take: the first r and the second ("ArB2r", unless given), the other way around
   * ("A2rBr"), the odd and the even, counted from 0 ("ArBr"), or both the same r by lot ("random").
   */
  readonly direction?: (typeof DIRECTIONS)[number];
  /**
   * B is U·S times N^¼/√γ ("stable", unless given), the largest singular value of W over that of B ("weight_svd"), or 1 ("unit"); "gd_scale" divides
   * both A and B by s.
   */
  readonly scale?: (typeof SCALES)[number];
  /** γ of "stable"; 16 unless given. */
  readonly gamma?: number;
  readonly seed?: number;
  /** Ends it by throwing the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

type Chosen = Required<Omit<LoraGaOptions, "seed" | "signal">>;

interface Module {
  readonly name: string;
  readonly weight: Tensor;
  readonly r: number;
  /** s */
  readonly scale: number;
}

/** Power iterations for the gradient's singular vectors: PEFT's count. */
const ITERATIONS = 4;

/** For the largest singular value of W, whose others are often near: four as in PEFT may leave it 2 % too small. */
const NORM_ITERATIONS = 16;

/**
 * LoRA-GA (arXiv:2407.05000) as in PEFT: A and B are singular vectors of each target's gradient, averaged over the batches, so that the first
 * steps go where full fine-tuning would. What B·A stands for is taken from the base, as with PiSSA: the output is unchanged.
 *
 * Gradients stay on the device, of as many modules at a time as `KEPT_BYTES` holds; each such run is a forward and backward pass per batch.
 * Throws ShapeError for options that are none of these, no data, packed weights, and a rank above half of a module's.
 */
export async function initLoraGa(
  adapter: LoraAdapter,
  batches: readonly CalibrationBatch[],
  { seed = 0, signal, ...options }: LoraGaOptions = {},
): Promise<void> {
  const chosen: Chosen = { direction: "ArB2r", scale: "stable", gamma: 16, ...options };
  checkOptions(chosen);
  demandBatches("lora_ga", batches);
  const modules = modulesOf(adapter);
  const random = new Random(seed);
  const starts = new Map<string, ReturnType<typeof asValues>>();
  adapter.disable();
  try {
    for (const run of inRuns(modules, ({ weight }) => 2 * weight.sizeBytes)) {
      signal?.throwIfAborted();
      const gradients = gradientSums(run, batches);
      try {
        for (const [i, module] of run.entries()) {
          signal?.throwIfAborted();
          const G = gradients[i] as Tensor;
          const [rank, q] = [2 * module.r, Math.min(4 * module.r, ...G.shape)];
          const found = await randomizedSvd(deviceOperator(G), rank, {
            ...{ random, iterations: ITERATIONS, oversample: q - rank },
          });
          const mean = { ...found, s: found.s.map((value) => value / batches.length) };
          starts.set(module.name, asValues(await factorsOf(mean, module, chosen, random)));
        }
      } finally {
        for (const t of gradients) t.gpu.release(t);
      }
    }
  } finally {
    adapter.enable();
  }
  adapter.start(starts, true);
}

/** Makes and frees on a dry Gpu what `initLoraGa` needs there: how a plan knows. */
export function planLoraGa(adapter: LoraAdapter, batches: readonly CalibrationBatch[]): void {
  adapter.disable();
  for (const run of inRuns(modulesOf(adapter), ({ weight }) => 2 * weight.sizeBytes)) {
    const gradients = gradientSums(run, batches);
    for (const [i, { r }] of run.entries()) planOperator(gradients[i] as Tensor, 4 * r);
    gradients[0]?.gpu.release(...gradients);
  }
  adapter.enable();
}

function checkOptions({ direction, scale, gamma }: Chosen): void {
  const oneOf = (name: string, value: string, all: readonly string[]): void => {
    if (!all.includes(value)) throw new ShapeError(`lora_ga: ${name} must be one of ${all.join(", ")}, got "${value}"`);
  };
  oneOf("direction", direction, DIRECTIONS);
  oneOf("scale", scale, SCALES);
  if (!(gamma > 0 && Number.isFinite(gamma)))
    throw new ShapeError(`lora_ga: gamma must be a number above 0, got ${gamma}`);
}

function modulesOf(adapter: LoraAdapter): Module[] {
  return [...adapter.pairs].map(
    ([
      name,
      {
        layer: { weight },
        A,
        scale,
      },
    ]) => {
      if (isPacked(weight))
        throw new ShapeError(
          `lora_ga: gradients are taken of f32 weights, got ${weight.format}. Load the model as f32`,
        );
      const [r = 0] = A.shape;
      const most = Math.floor(Math.min(...weight.shape) / 2);
      if (r > most) throw new ShapeError(`lora_ga: r must be at most ${most}, half the rank of ${name}, got ${r}`);
      return { name, weight, r, scale };
    },
  );
}

/** Σ over the batches of the gradient of their mean loss by each weight, which only meanwhile requires one. */
function gradientSums(modules: readonly Module[], batches: readonly CalibrationBatch[]): Tensor[] {
  const sums = modules.map(({ weight: W }) => tensor(W.gpu, new Float32Array(W.size), W.shape));
  const workspace: GPUBuffer[] = [];
  const gpu = modules[0]?.weight.gpu;
  try {
    for (const { weight } of modules) weight.requiresGrad = true;
    for (const batch of batches) {
      const plan = gpu?.trace(() => {
        const gradients = backward(batch.loss());
        modules.forEach(({ weight, name }, i) => {
          const gradient = gradients.get(weight);
          if (!gradient) throw new ShapeError(`lora_ga: the loss must depend on every target, got none of ${name}`);
          addInto(gradient, sums[i] as Tensor);
        });
      }, workspace);
      plan?.run();
      plan?.destroy();
    }
    return sums;
  } catch (error) {
    gpu?.release(...sums);
    throw error;
  } finally {
    for (const { weight } of modules) weight.requiresGrad = false;
    gpu?.release(...workspace.map((buffer) => ({ buffer })));
  }
}

/** A [r,K] and B [N,r] of the first 2r singular triplets of the gradient. */
async function factorsOf(
  { U, s, Vt }: Svd,
  { weight, r, scale }: Module,
  { direction, scale: scaling, gamma }: Chosen,
  random: Random,
): Promise<Factors> {
  const { ofA, ofB } = picked(direction, r, random);
  const S = Float64Array.from({ length: r }, (_, i) => s[ofB(i)] ?? 0);
  const largest = async (): Promise<number> => {
    const svd = await randomizedSvd(deviceOperator(weight), 1, { random, iterations: NORM_ITERATIONS, oversample: r });
    return svd.s[0] ?? 0;
  };
  const [first = 0] = S;
  const factor = {
    stable: async () => U.rows ** 0.25 / Math.sqrt(gamma),
    weight_svd: async () => (first > 0 ? (await largest()) / first : 1),
    gd_scale: async () => 1 / scale,
    unit: async () => 1,
  };
  const b = await factor[scaling]();
  const a = scaling === "gd_scale" ? 1 / scale : 1;
  return {
    A: scaledRows(rowsOf(Vt, r, ofA), new Float64Array(r).fill(a)),
    B: transpose(
      scaledRows(
        rowsOf(transpose(U), r, ofB),
        S.map((value) => value * b),
      ),
    ),
  };
}

/** Which of the 2r triplets the i-th row of A and column of B take. */
function picked(
  direction: Chosen["direction"],
  r: number,
  random: Random,
): { readonly ofA: (i: number) => number; readonly ofB: (i: number) => number } {
  switch (direction) {
    case "ArB2r":
      return { ofA: (i) => i, ofB: (i) => r + i };
    case "A2rBr":
      return { ofA: (i) => r + i, ofB: (i) => i };
    case "ArBr":
      return { ofA: (i) => 2 * i + 1, ofB: (i) => 2 * i };
    case "random": {
      const order = random.shuffle(Array.from({ length: 2 * r }, (_, i) => i));
      const of = (i: number): number => order[i] ?? 0;
      return { ofA: of, ofB: of };
    }
  }
}
