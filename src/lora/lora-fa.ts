import { cholesky, choleskySolve, matrix, multiply, transpose } from "../tensor/linalg.ts";
import { readAll, type Tensor, tensor } from "../tensor/tensor.ts";
import type { LoraAdapter } from "./adapter.ts";

/** What training takes of a LoRA-FA adapter: settings of `train` and `TrainingStep`. */
export interface LoraFa {
  /** All but the A. */
  readonly parameters: readonly Tensor[];
  /** What the gradient of each B is multiplied by from the right, [r,r]. They are the caller's to release. */
  readonly projections: ReadonlyMap<Tensor, Tensor>;
  /** That of PEFT's optimizer, which adds it before the bias correction: there it is eps / √(1 − β2ᵗ) of Adam's. */
  readonly eps: number;
}

/** Added to A·Aᵀ before it is inverted: PEFT's. */
const DELTA = 1e-8;

/**
 * LoRA-FA (arXiv:2308.03303): freezes every A, which then has no gradient and no optimizer state, and whose x·Aᵀ needs no backward pass. The
 * gradient of B becomes gB·(A·Aᵀ + 10⁻⁸·I)⁻¹ / s², for which s·B·A changes as near to the full gradient as it can. A stays, and
 * so does the inverse: it is made once, on the host.
 */
export async function loraFa(adapter: LoraAdapter): Promise<LoraFa> {
  const pairs = [...adapter.pairs.values()];
  const values = await readAll(pairs.map(({ A }) => A));
  const projections = pairs.map(({ A, B, scale }, i) => {
    const [r = 0, K = 0] = A.shape;
    return [B, tensor(A.gpu, projection(values[i] ?? new Float32Array(), r, K, scale), [r, r])] as const;
  });
  return { parameters: freezeA(adapter), projections: new Map(projections), eps: 1e-6 };
}

/** Stops every A from requiring a gradient. Gives what is still trained. */
export function freezeA(adapter: LoraAdapter): Tensor[] {
  const frozen = new Set([...adapter.pairs.values()].map(({ A }) => A));
  for (const A of frozen) A.requiresGrad = false;
  return adapter.parameters.filter((p) => !frozen.has(p));
}

/** (A·Aᵀ + δ·I)⁻¹ / s² */
function projection(values: Float32Array, r: number, K: number, s: number): Float32Array {
  const A = matrix(r, K, values);
  const gram = multiply(A, transpose(A));
  const identity = matrix(r, r);
  for (let p = 0; p < r * r; p += r + 1) {
    gram.data[p] = (gram.data[p] ?? 0) + DELTA;
    identity.data[p] = 1 / s ** 2;
  }
  return Float32Array.from(choleskySolve(cholesky(gram), identity).data);
}
