import { type Nd, zeros } from "../harness.ts";

/** Of one adapter, for G modules on one input: A [G,r,K], B [G,r,N] (s·Bᵀ), and DoRA's gain − 1 [G,N]. */
export interface RowAdapter {
  readonly A: Nd;
  readonly B: Nd;
  readonly gain?: Nd;
}

const at = ({ data }: Nd, i: number): number => data[i] ?? Number.NaN;

/** u_j = Σ_k A[g,j,k]·x[t,k] of every row's own adapter, undefined for none. */
export function shrinkTwin(x: Nd, adapters: readonly (RowAdapter | undefined)[], g: number): number[][] {
  const [, K = 0] = x.shape;
  return adapters.map((adapter, t) => {
    const [, r = 0] = adapter?.A.shape ?? [];
    return Array.from({ length: r }, (_, j) => {
      let sum = 0;
      for (let k = 0; k < K; k++) sum += at((adapter as RowAdapter).A, (g * r + j) * K + k) * at(x, t * K + k);
      return sum;
    });
  });
}

/** (value + Σ_j u_j·B[g,j,n])·(1 + gain[g,n]) of every element of a product [M,N]. */
export function expandTwin(
  product: Nd,
  u: readonly (readonly number[])[],
  adapters: readonly (RowAdapter | undefined)[],
  g: number,
): Nd {
  const [, N = 0] = product.shape;
  const y = zeros(product.shape);
  for (const [t, adapter] of adapters.entries())
    for (let n = 0; n < N; n++) {
      let sum = at(product, t * N + n);
      for (const [j, value] of u[t]?.entries() ?? [])
        if (adapter) sum += value * at(adapter.B, (g * (adapter.B.shape[1] ?? 0) + j) * N + n);
      y.data[t * N + n] = sum * (1 + (adapter?.gain ? at(adapter.gain, g * N + n) : 0));
    }
  return y;
}
