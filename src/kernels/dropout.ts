import { defineKernel, definePart, type Uniform } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./dropout.wgsl";
import addGradientSource from "./parts/add-gradient.wgsl";
import fourSource from "./parts/dropout-four.wgsl";
import noiseSource from "./parts/noise-four.wgsl";

const kernel = defineKernel("dropout", source);
const FOUR = definePart("dropout-four", fourSource);
const NOISE = definePart("noise-four", noiseSource);
const ADD_GRADIENT = definePart("add-gradient", addGradientSource);

/** What a mask or noise is made from. Two calls of equal values make equal ones; any difference makes independent ones. */
export interface DropoutKey {
  /** Whole, from 0 to 2⁵³ − 1. */
  readonly seed: number;
  /** Whole, below 2³²; counts the forward passes, micro-batches too. */
  readonly step: Uniform;
  /** Whole, below 2³²; whose mask it is: one for each module. */
  readonly stream: number;
}

/**
 * mask∘x/(1 − p): each element is 0 with probability p; acc + that where acc is given. One dispatch; the mask is never stored.
 *
 * It is linear in x, so the same call on dy is the gradient of x. Throws ShapeError unless 0 ≤ p < 1 and acc has x's shape.
 */
export function dropout(x: Tensor, p: number, key: DropoutKey, acc?: Tensor): Tensor {
  if (!(p >= 0 && p < 1)) throw new ShapeError(`dropout: p must be at least 0 and below 1, got ${p}`);
  if (acc) expectShape("dropout", "acc must have the shape of x", acc, x.shape);
  const y = empty(x.gpu, x.shape, "dropout");
  const inFours = x.size % 4 === 0;
  const n = inFours ? x.size / 4 : x.size;
  const threshold = Math.min(Math.round(p * 2 ** 32), 2 ** 32 - 1);
  const parts = [...(inFours ? [FOUR] : []), ...(acc ? [ADD_GRADIENT] : [])];
  kernel(x.gpu, { n, threshold, s: 1 / (1 - p), ...words(key) }, { x, y, more: acc ?? x }, [n], {}, parts);
  return y;
}

const words = ({ seed, step, stream }: DropoutKey) => ({
  ...{ seed_low: seed % 2 ** 32, seed_high: Math.floor(seed / 2 ** 32), step, stream },
});

/** x + most·u, u uniform in [−1, 1) and independent for each element. Throws ShapeError unless the elements are a multiple of four. */
export function addNoise(x: Tensor, most: number, key: DropoutKey): Tensor {
  if (x.size % 4 !== 0) throw new ShapeError(`addNoise: x must have a multiple of 4 elements, got [${x.shape}]`);
  const y = empty(x.gpu, x.shape, "addNoise");
  const n = x.size / 4;
  kernel(x.gpu, { n, threshold: 0, s: most, ...words(key) }, { x, y }, [n], {}, [NOISE]);
  return y;
}
