/** Where an adapter starts from, by PEFT's names for it. */

import { ShapeError } from "../tensor/errors.ts";
import { type Matrix, matrix, multiply, qr, randomizedSvd, svd, transpose } from "../tensor/linalg.ts";
import { isPacked } from "../tensor/packed.ts";
import { Random } from "../tensor/random.ts";
import { read, type Tensor } from "../tensor/tensor.ts";
import type { LoraAdapter } from "./adapter.ts";
import { asValues, type Factors, principal, rowsOf } from "./init-factors.ts";

/**
 * "gaussian": A normal with deviation 1/r, B zero. "orthogonal": A and B of two halves of an orthogonal matrix, so that B·A is zero.
 * "pissa": the r largest singular triplets of W (arXiv:2404.02948), "pissa_niter_N" by N power iterations, far faster. "olora": the first r
 * columns and rows of W = Q·R (arXiv:2406.01775).
 */
export type LoraInit = "gaussian" | "orthogonal" | "pissa" | "olora" | `pissa_niter_${number}`;

/** Whether such a start takes a part of the base: W is then kept twice. */
export const takesFromBase = (init: string | undefined): boolean => init !== undefined && startOf(init).takesFromBase;

interface Start {
  readonly r: number;
  readonly scale: number;
  readonly random: Random;
}

/**
 * Starts the adapter anew. PiSSA and OLoRA begin with a part of W, which is taken from the base while the adapter is enabled, so that the
 * model's output is unchanged; `savePeft` then writes what was learned as an ordinary adapter of twice the rank.
 *
 * SVD and QR are computed on the host in f64, a module at a time: seconds for 1024 × 1024, minutes for larger ones ("pissa").
 * Throws ShapeError for a name that is none of these, and for a rank that the start cannot have; before anything is changed, the reason of
 * the signal.
 */
export async function initLora(adapter: LoraAdapter, init: LoraInit, seed = 0, signal?: AbortSignal): Promise<void> {
  const make = startOf(init);
  const random = new Random(seed);
  const starts = new Map<string, { readonly A: Float32Array; readonly B: Float32Array }>();
  for (const [name, { layer, A, scale }] of adapter.pairs) {
    signal?.throwIfAborted();
    const [r = 0] = A.shape;
    const [N = 0, K = 0] = layer.weight.shape;
    if (make.takesFromBase && r > Math.min(N, K))
      throw new ShapeError(`${init}: r must be at most ${Math.min(N, K)}, the rank of ${name}, got ${r}`);
    if (make.takesFromBase && isPacked(layer.weight))
      throw new ShapeError(
        `${init}: a part of the base is taken from f32 weights, got ${layer.weight.format}. Load the model as f32`,
      );
    const W = make.takesFromBase
      ? matrix(N, K, await read(layer.weight as Tensor))
      : { rows: N, columns: K, data: NONE };
    starts.set(name, asValues(await make.of(W, { r, scale, random })));
  }
  adapter.start(starts, make.takesFromBase);
}

const NONE = new Float64Array();

function startOf(init: string): {
  readonly takesFromBase: boolean;
  readonly of: (W: Matrix, start: Start) => Factors | Promise<Factors>;
} {
  const [, iterations] = /^pissa_niter_(\d+)$/.exec(init) ?? [];
  if (iterations !== undefined)
    return {
      takesFromBase: true,
      of: async (W, { r, scale, random }) =>
        principal(await randomizedSvd(W, r, { random, iterations: Number(iterations) }), r, scale),
    };
  switch (init) {
    case "gaussian":
      return { takesFromBase: false, of: gaussian };
    case "orthogonal":
      return { takesFromBase: false, of: orthogonal };
    case "pissa":
      return { takesFromBase: true, of: (W, { r, scale }) => principal(svd(W), r, scale) };
    case "olora":
      return { takesFromBase: true, of: (W, { r }) => firstOf(qr(W), r) };
    default:
      throw new ShapeError(
        `init: must be gaussian, orthogonal, pissa, pissa_niter_N or olora, got "${init}". Leave it out for PEFT's usual start`,
      );
  }
}

const normal = (rows: number, columns: number, deviation: number, random: Random): Matrix =>
  matrix(
    rows,
    columns,
    Float64Array.from({ length: rows * columns }, () => random.normal(0, deviation)),
  );

const gaussian = ({ rows: N, columns: K }: Matrix, { r, random }: Start): Factors => ({
  A: normal(r, K, 1 / r, random),
  B: matrix(N, r),
});

/** Of an orthogonal Q [r,r]: A of its even rows and B of its odd ones, each times normal values and divided by 10. */
function orthogonal({ rows: N, columns: K }: Matrix, { r, random }: Start): Factors {
  if (r % 2 !== 0) throw new ShapeError(`orthogonal: r must be even, got ${r}`);
  const { Q } = qr(normal(r, r, 1, random));
  const half = (odd: 0 | 1): Matrix => rowsOf(Q, r / 2, (i) => 2 * i + odd);
  return {
    A: multiply(transpose(half(0)), normal(r / 2, K, 0.1, random)),
    B: multiply(normal(N, r / 2, 0.1, random), half(1)),
  };
}

const firstOf = ({ Q, R }: { readonly Q: Matrix; readonly R: Matrix }, r: number): Factors => ({
  A: rowsOf(R, r, (i) => i),
  B: transpose(rowsOf(transpose(Q), r, (i) => i)),
});
