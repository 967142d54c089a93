/** Pairs B·A that a matrix is nearest to. */
import { type Matrix, matrix, type Svd, transpose } from "../tensor/linalg.ts";

/** Factors of one module: A [r,K], B [N,r]. */
export interface Factors {
  readonly A: Matrix;
  readonly B: Matrix;
}

/** The same as f32, as `LoraAdapter.start` takes them. */
export const asValues = ({ A, B }: Factors): { readonly A: Float32Array; readonly B: Float32Array } => ({
  A: Float32Array.from(A.data),
  B: Float32Array.from(B.data),
});

/** A = √(S/s)·Vᵀ and B = U·√(S/s) of the r largest singular values S: s·B·A is the matrix of rank r that is nearest. */
export function principal({ U, s, Vt }: Svd, r: number, scale: number): Factors {
  const root = (i: number): number => Math.sqrt((s[i] ?? 0) / scale);
  const first = Array.from({ length: r }, (_, i) => i);
  return {
    A: scaledRows(
      rowsOf(Vt, r, (i) => i),
      first.map(root),
    ),
    B: transpose(
      scaledRows(
        rowsOf(transpose(U), r, (i) => i),
        first.map(root),
      ),
    ),
  };
}

/** diag(factors)·X. */
export const scaledRows = ({ rows, columns, data }: Matrix, factors: ArrayLike<number>): Matrix => ({
  ...{ rows, columns },
  data: data.map((v, at) => v * (factors[Math.floor(at / columns)] ?? 0)),
});

/** `count` rows of X, the i-th of them its `at(i)`-th. */
export function rowsOf(X: Matrix, count: number, at: (i: number) => number): Matrix {
  const { columns } = X;
  const picked = matrix(count, columns);
  for (let i = 0; i < count; i++) picked.data.set(X.data.subarray(at(i) * columns, (at(i) + 1) * columns), i * columns);
  return picked;
}
