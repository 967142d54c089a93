/** Dense linear algebra on the host, in f64: what initialisations of LoRA need, for matrices of up to about 2048 × 2048. */
import { ShapeError } from "./errors.ts";
import type { Random } from "./random.ts";

/** A matrix by rows: element (i, j) is data[i · columns + j]. */
export interface Matrix {
  readonly rows: number;
  readonly columns: number;
  readonly data: Float64Array;
}

/** A = U·diag(s)·Vᵀ with orthonormal columns in U [m,k], descending s [k] and orthonormal rows in Vt [k,n]. */
export interface Svd {
  readonly U: Matrix;
  readonly s: Float64Array;
  readonly Vt: Matrix;
}

/** A matrix [rows,columns] known by its products, which may be computed elsewhere: A·X and Aᵀ·X. */
export interface LinearOperator {
  readonly rows: number;
  readonly columns: number;
  times(X: Matrix): Matrix | Promise<Matrix>;
  transposeTimes(X: Matrix): Matrix | Promise<Matrix>;
}

export interface RandomizedSvdOptions {
  /** Where the Gaussian test matrix comes from. */
  readonly random: Random;
  /** Power iterations: two more products each, for singular values that decay slowly. Default 2. */
  readonly iterations?: number;
  /** Columns of the test matrix beyond the rank. Default 8. */
  readonly oversample?: number;
}

/** The matrix of these values by rows, copied, or of zeros. Throws if there are not rows · columns of them. */
export function matrix(rows: number, columns: number, values?: ArrayLike<number>): Matrix {
  const A = values ? { rows, columns, data: new Float64Array(values) } : zeros(rows, columns);
  expectSize("matrix", A);
  return A;
}

/** Aᵀ. */
export function transpose(A: Matrix): Matrix {
  expectSize("transpose", A);
  return copy(flipped(view(A)));
}

/** A·B for A [m,k] and B [k,n]. Throws if the shapes do not fit or an element is not finite. */
export function multiply(A: Matrix, B: Matrix): Matrix {
  expectFinite("multiply", A);
  expectFinite("multiply", B);
  if (A.columns !== B.rows)
    throw new ShapeError(
      `multiply: A must have as many columns as B has rows, got ${shape(A)} and ${shape(B)}. Transpose one`,
    );
  return product(view(A), view(B));
}

/**
 * A = Q·R with orthonormal columns in Q [m,k] and R [k,n] upper triangular, k = min(m, n). Householder reflections, with the
 * signs of LAPACK, NumPy and PyTorch. Throws if an element is not finite.
 */
export function qr(A: Matrix): { readonly Q: Matrix; readonly R: Matrix } {
  expectFinite("qr", A);
  const factored = factor(copy(view(A)));
  return { Q: orthonormal(factored), R: upper(factored) };
}

/**
 * The thin singular value decomposition, k = min(m, n). Errors are a small multiple of f64's rounding, relative to the
 * largest singular value. Throws if an element is not finite.
 *
 * Golub and Kahan's bidiagonalisation and QR iteration (Golub and Van Loan, "Matrix computations", 4th ed., §8.6) give s
 * and V. U is the Q of A·V = Q·R: the columns of A·V are orthogonal and the longest come first, so that R is diagonal up to
 * rounding, and Q is orthonormal also where s is zero.
 */
export function svd(A: Matrix): Svd {
  expectFinite("svd", A);
  if (A.rows < A.columns) {
    const { U, s, Vt } = svd(transpose(A));
    return { U: transpose(Vt), s, Vt: transpose(U) };
  }
  const scale = magnitude(A);
  const scaled = { ...A, data: A.data.map((x) => x / scale) };
  const { s, Vt } = rightVectors(A.rows > A.columns ? upper(factor(copy(view(scaled)))) : scaled);
  const factored = factor(product(view(scaled), view(transpose(Vt))));
  const U = orthonormal(factored);
  const signs = s.map((_, j) => (at(factored.A.data, j * s.length + j) < 0 ? -1 : 1));
  return {
    U: { ...U, data: U.data.map((x, i) => x * at(signs, i % s.length)) },
    s: s.map((x) => x * scale),
    Vt,
  };
}

/**
 * The `rank` largest singular values of A and their vectors, approximately: randomised subspace iteration (algorithms 4.4
 * and 5.1 of Halko, Martinsson and Tropp, arXiv:0909.4061). Exact up to rounding where A has no higher rank. Throws if
 * `rank` is above min(m, n), or a product has a wrong shape or is not finite.
 */
export async function randomizedSvd(
  A: Matrix | LinearOperator,
  rank: number,
  { random, iterations = 2, oversample = 8 }: RandomizedSvdOptions,
): Promise<Svd> {
  const most = Math.min(A.rows, A.columns);
  expectWhole("rank", rank, 1, most);
  expectWhole("iterations", iterations, 0);
  expectWhole("oversample", oversample, 0);
  const operator = "data" in A ? asOperator(A) : A;
  const l = Math.min(rank + oversample, most);
  const times = async (X: Matrix): Promise<Matrix> => expectResult("times", await operator.times(X), A.rows, l);
  const transposeTimes = async (X: Matrix): Promise<Matrix> =>
    expectResult("transposeTimes", await operator.transposeTimes(X), A.columns, l);
  const gaussian = Float64Array.from({ length: A.columns * l }, () => random.normal());
  let { Q } = qr(await times(matrix(A.columns, l, gaussian)));
  for (let i = 0; i < iterations; i++) ({ Q } = qr(await times(qr(await transposeTimes(Q)).Q)));
  // Aᵀ·Q = V·diag(s)·Wᵀ, hence A ≈ Q·Qᵀ·A = (Q·W)·diag(s)·Vᵀ.
  const { U: V, s, Vt: Wt } = svd(await transposeTimes(Q));
  return {
    U: product(view(Q), flipped(view(Wt, 0, 0, rank))),
    s: s.slice(0, rank),
    Vt: copy(flipped(view(V, 0, 0, V.rows, rank))),
  };
}

/**
 * A = V·diag(values)·Vᵀ for a symmetric A [n,n], of which the lower triangle is read: descending values, vectors in columns.
 * Errors are relative to √‖A²‖, of which the norm is Frobenius's. Throws if A is not square or an element is not finite.
 */
export function symmetricEigen(A: Matrix): { readonly values: Float64Array; readonly vectors: Matrix } {
  expectSquare("symmetricEigen", A);
  const n = A.rows;
  const scale = magnitude(A);
  const S = zeros(n, n);
  for (let i = 0; i < n; i++)
    for (let j = 0; j < n; j++) S.data[i * n + j] = at(A.data, Math.max(i, j) * n + Math.min(i, j)) / scale;
  // No eigenvalue is below −√‖S²‖, so that those of S + √‖S²‖·I are its singular values.
  const shift = Math.sqrt(norm(product(view(S), view(S)).data, 0, 1, n * n));
  for (let p = 0; p < n * n; p += n + 1) S.data[p] = at(S.data, p) + shift;
  const { s, Vt } = rightVectors(S);
  return { values: s.map((x) => (x - shift) * scale), vectors: transpose(Vt) };
}

/**
 * The lower triangular L of A = L·Lᵀ for a symmetric positive definite A [n,n], of which the lower triangle is read. Throws
 * if A is not that or an element is not finite.
 */
export function cholesky(A: Matrix): Matrix {
  expectSquare("cholesky", A);
  const n = A.rows;
  const L = zeros(n, n);
  for (let i = 0; i < n; i++)
    for (let j = 0; j <= i; j++) {
      const rest = at(A.data, i * n + j) - dot(L.data, i * n, L.data, j * n, j);
      if (i === j && !(rest > 0))
        throw new ShapeError(
          `cholesky: A must be positive definite, got a pivot of ${rest} in row ${i}. Add a multiple of the identity to it`,
        );
      L.data[i * n + j] = i === j ? Math.sqrt(rest) : rest / at(L.data, j * n + j);
    }
  return L;
}

/** The X of L·Lᵀ·X = B, for the L of `cholesky` and B [n,l]. Throws if the shapes do not fit or an element is not finite. */
export function choleskySolve(L: Matrix, B: Matrix): Matrix {
  expectSquare("choleskySolve", L);
  expectFinite("choleskySolve", B);
  const n = L.rows;
  if (B.rows !== n)
    throw new ShapeError(`choleskySolve: B must have as many rows as L, got ${shape(B)} and ${shape(L)}. Transpose B`);
  const X = copy(view(B));
  const solveRow = (i: number, others: View, solved: View): void => {
    addProduct(-1, others, solved, view(X, i, 0, 1));
    for (let p = i * X.columns; p < (i + 1) * X.columns; p++) X.data[p] = at(X.data, p) / at(L.data, i * n + i);
  };
  for (let i = 0; i < n; i++) solveRow(i, view(L, i, 0, 1, i), view(X, 0, 0, i));
  for (let i = n - 1; i >= 0; i--) solveRow(i, flipped(view(L, i + 1, i, n - i - 1, 1)), view(X, i + 1));
  return X;
}

/** A part of a matrix, or of its transpose: element (i, j) is data[offset + i · down + j · right]. */
interface View extends Matrix {
  readonly offset: number;
  readonly down: number;
  readonly right: number;
}

function view({ rows, columns, data }: Matrix, top = 0, left = 0, height = rows - top, width = columns - left): View {
  return { data, offset: top * columns + left, rows: height, columns: width, down: columns, right: 1 };
}

const flipped = (v: View): View => ({ ...v, rows: v.columns, columns: v.rows, down: v.right, right: v.down });

const zeros = (rows: number, columns: number): Matrix => ({ rows, columns, data: new Float64Array(rows * columns) });

/** data[i], where i is known to be within. */
const at = (data: Float64Array, i: number): number => data[i] as number;

/** Element (i, j), or 0 outside. */
const element = ({ data, offset, rows, columns, down, right }: View, i: number, j: number): number =>
  i < rows && j < columns ? at(data, offset + i * down + j * right) : 0;

function copy(A: View): Matrix {
  const C = zeros(A.rows, A.columns);
  for (let i = 0, p = 0; i < A.rows; i++) for (let j = 0; j < A.columns; j++) C.data[p++] = element(A, i, j);
  return C;
}

function product(A: View, B: View): Matrix {
  const C = zeros(A.rows, B.columns);
  addProduct(1, A, B, view(C));
  return C;
}

/** C += alpha·A·B, where C is by rows: blocks of A and B that stay in the cache, and in them 2 × 4 elements of A at a time. */
function addProduct(alpha: number, A: View, B: View, C: View): void {
  for (let left = 0; left < C.columns; left += 256)
    for (let top = 0; top < B.rows; top += 64)
      for (let i = 0; i < C.rows; i += 2)
        for (let k = top; k < Math.min(top + 64, B.rows); k += 4)
          addRows(alpha, A, B, C, i, k, left, Math.min(left + 256, C.columns));
}

/** Adds to rows i and i + 1 of C, from `left` up to `right`, what rows k … k + 3 of B give. */
function addRows(alpha: number, A: View, B: View, C: View, i: number, k: number, left: number, right: number): void {
  const { data: b, right: step } = B;
  const { data: c } = C;
  const x0 = alpha * element(A, i, k);
  const x1 = alpha * element(A, i, k + 1);
  const x2 = alpha * element(A, i, k + 2);
  const x3 = alpha * element(A, i, k + 3);
  const y0 = alpha * element(A, i + 1, k);
  const y1 = alpha * element(A, i + 1, k + 1);
  const y2 = alpha * element(A, i + 1, k + 2);
  const y3 = alpha * element(A, i + 1, k + 3);
  // In place of rows past the last, whose factors are zero, stands one that can be read and written.
  const b1 = k + 1 < B.rows ? B.down : 0;
  const b2 = k + 2 < B.rows ? 2 * B.down : 0;
  const b3 = k + 3 < B.rows ? 3 * B.down : 0;
  const c1 = i + 1 < C.rows ? C.down : 0;
  let p = B.offset + k * B.down + left * step;
  let q = C.offset + i * C.down + left;
  for (const end = q + right - left; q < end; q++, p += step) {
    const u = at(b, p);
    const v = at(b, p + b1);
    const w = at(b, p + b2);
    const z = at(b, p + b3);
    c[q] = at(c, q) + x0 * u + x1 * v + x2 * w + x3 * z;
    c[q + c1] = at(c, q + c1) + y0 * u + y1 * v + y2 * w + y3 * z;
  }
}

/** Σ a[p + i]·b[q + i] over i < count, as two sums that do not wait for each other. */
function dot(a: Float64Array, p: number, b: Float64Array, q: number, count: number): number {
  let even = 0;
  let odd = 0;
  for (let i = 0; i + 1 < count; i += 2) {
    even += at(a, p + i) * at(b, q + i);
    odd += at(a, p + i + 1) * at(b, q + i + 1);
  }
  return even + odd + (count % 2 === 1 ? at(a, p + count - 1) * at(b, q + count - 1) : 0);
}

/** √Σ x², without overflow. */
function norm(data: Float64Array, start: number, stride: number, count: number): number {
  const end = start + stride * count;
  let most = 0;
  for (let p = start; p < end; p += stride) most = Math.max(most, Math.abs(at(data, p)));
  let sum = 0;
  for (let p = start; p < end; p += stride) sum += (at(data, p) / most) ** 2;
  return most === 0 ? 0 : most * Math.sqrt(sum);
}

const largest = (data: Float64Array): number => data.reduce((most, x) => Math.max(most, Math.abs(x)), 0);

/** A power of two near the largest element, so that dividing by it is exact. */
const magnitude = ({ data }: Matrix): number => 2 ** Math.floor(Math.log2(largest(data) || 1));

/**
 * The reflection H = I − tau·v·vᵀ that takes x to (beta, 0, …): returns tau, and puts beta and the rest of v, of which the
 * first element is one, in place of x (LAPACK's dlarfg).
 */
function reflect(data: Float64Array, start: number, stride: number, count: number): number {
  const alpha = at(data, start);
  const rest = norm(data, start + stride, stride, count - 1);
  if (rest === 0) return 0;
  const beta = alpha < 0 ? Math.hypot(alpha, rest) : -Math.hypot(alpha, rest);
  for (let i = 1, p = start + stride; i < count; i++, p += stride) data[p] = at(data, p) / (alpha - beta);
  data[start] = beta;
  return (beta - alpha) / beta;
}

/** R on and above A's diagonal; below it the vectors of the reflections H₀·H₁·… = Q, with ones on the diagonal. */
interface Factored {
  readonly A: Matrix;
  readonly tau: Float64Array;
}

/** Columns whose reflections reach the rest of the matrix together, by products of matrices. */
const BLOCK = 32;

/** The QR factorisation of A, in place (LAPACK's dgeqrf). */
function factor(A: Matrix): Factored {
  const { rows: m, columns: n, data } = A;
  const tau = new Float64Array(Math.min(m, n));
  for (let left = 0; left < tau.length; left += BLOCK) {
    const right = Math.min(left + BLOCK, tau.length);
    for (let j = left; j < right; j++) {
      tau[j] = reflect(data, j * n + j, n, m - j);
      reflectAll({ A, tau }, j, j + 1, view(A, j, j + 1, m - j, right - j - 1), true);
    }
    reflectAll({ A, tau }, left, right, view(A, left, right), true);
  }
  return { A, tau };
}

/** Q, thin (LAPACK's dorgqr). */
function orthonormal(factored: Factored): Matrix {
  const k = factored.tau.length;
  const Q = zeros(factored.A.rows, k);
  for (let i = 0; i < k; i++) Q.data[i * k + i] = 1;
  for (let left = k - 1 - ((k - 1) % BLOCK); left >= 0; left -= BLOCK)
    reflectAll(factored, left, Math.min(left + BLOCK, k), view(Q, left, left), false);
  return Q;
}

/**
 * C ← H·C or Hᵀ·C for the reflections `left` … `right` − 1 on C's rows, which begin at `left`. H = I − V·T·Vᵀ: the compact
 * form of Schreiber and Van Loan (SIAM J. Sci. Stat. Comput. 10, 1989).
 */
function reflectAll({ A, tau }: Factored, left: number, right: number, C: View, transposed: boolean): void {
  const n = right - left;
  const V = copy(view(A, left, left, A.rows - left, n));
  for (let i = 0; i < n; i++) for (let j = i; j < n; j++) V.data[i * n + j] = i === j ? 1 : 0;
  const G = product(flipped(view(V)), view(V));
  const T = zeros(n, n);
  for (let j = 0; j < n; j++) {
    T.data[j * n + j] = at(tau, left + j);
    addProduct(-at(tau, left + j), view(T, 0, 0, j, j), view(G, 0, j, j, 1), view(T, 0, j, j, 1));
  }
  const W = product(flipped(view(V)), C);
  addProduct(-1, view(V), view(product(transposed ? flipped(view(T)) : view(T), view(W))), C);
}

/** R. */
function upper({ A, tau }: Factored): Matrix {
  const R = copy(view(A, 0, 0, tau.length));
  for (let i = 1; i < R.rows; i++) R.data.fill(0, i * R.columns, i * R.columns + i);
  return R;
}

/** s and Vᵀ of a square A = U·diag(s)·Vᵀ. A's elements are near one: squares of them neither overflow nor vanish. */
function rightVectors(A: Matrix): Omit<Svd, "U"> {
  const n = A.columns;
  const { d, e, right } = bidiagonalise(A);
  const V = zeros(n + 3, n);
  V.data.set(orthonormal(right).data);
  diagonalise(d, e, V);
  const s = d.map(Math.abs);
  const order = Array.from(s.keys()).sort((i, j) => at(s, j) - at(s, i));
  const Vt = zeros(n, n);
  order.forEach((from, to) => {
    for (let i = 0; i < n; i++) Vt.data[to * n + i] = at(V.data, i * n + from);
  });
  return { s: Float64Array.from(order, (i) => at(s, i)), Vt };
}

/**
 * A = Q·B·Pᵀ for a square A: B's diagonal d, the elements e above it, and the reflections of P.
 *
 * A pair of reflections, from the left and from the right, takes A to A − u·yᵀ − x·vᵀ. A row is brought up to date when the
 * next step reads it first, so that a step goes through the matrix twice and not four times (Howell et al., "Cache efficient
 * bidiagonalization using BLAS 2.5 operators", ACM TOMS 34, 2008).
 */
function bidiagonalise(A: Matrix): { d: Float64Array; e: Float64Array; right: Factored } {
  const n = A.columns;
  const a = A.data.slice();
  const d = new Float64Array(n);
  const e = new Float64Array(n - 1);
  const right = { A: zeros(n, n), tau: new Float64Array(n) };
  const u = new Float64Array(n);
  const x = new Float64Array(n);
  const y = new Float64Array(n);
  const v = new Float64Array(n);
  const w = new Float64Array(n);
  const z = new Float64Array(n);
  for (let j = 0; j < n; j++) {
    for (let i = j; i < n; i++) w[i] = at(a, i * n + j) - at(u, i) * at(y, j) - at(x, i) * at(v, j);
    const tau = reflect(w, j, 1, n - j);
    d[j] = at(w, j);
    if (j === n - 1) break;
    w[j] = 1;
    z.fill(0);
    for (let i = j; i < n; i++) {
      const ui = at(u, i);
      const xi = at(x, i);
      const wi = at(w, i);
      for (let c = j + 1, p = i * n + c; c < n; c++, p++) {
        const value = at(a, p) - ui * at(y, c) - xi * at(v, c);
        a[p] = value;
        z[c] = at(z, c) + wi * value;
      }
    }
    u.set(w);
    for (let c = j + 1; c < n; c++) {
      y[c] = tau * at(z, c);
      v[c] = at(a, j * n + c) - at(y, c);
    }
    const rho = reflect(v, j + 1, 1, n - j - 1);
    e[j] = at(v, j + 1);
    v[j + 1] = 1;
    right.tau[j + 1] = rho;
    for (let c = j + 1; c < n; c++) right.A.data[c * n + j + 1] = at(v, c);
    const yv = dot(y, j + 1, v, j + 1, n - j - 1);
    for (let i = j + 1; i < n; i++) x[i] = rho * (dot(a, i * n + j + 1, v, j + 1, n - j - 1) - at(u, i) * yv);
  }
  return { d, e, right };
}

/** Rotations of columns `first` and `first` + 1, then of `first` + 1 and `first` + 2, …: cosine and sine of each. */
interface Sweep {
  readonly first: number;
  readonly turns: Float64Array;
}

/** Takes the bidiagonal matrix (d, e) to its singular values, up to their signs, and V along. */
function diagonalise(d: Float64Array, e: Float64Array, V: Matrix): void {
  const negligible = Math.max(largest(d), largest(e)) * 2 ** -50;
  const sweeps: Sweep[] = [];
  for (let hi = e.length; hi > 0; ) {
    let lo = hi;
    while (lo > 0 && Math.abs(at(e, lo - 1)) > negligible) lo--;
    const zero = d.subarray(lo, hi).findIndex((x) => Math.abs(x) <= negligible);
    if (lo === hi) hi--;
    else if (zero >= 0) splitAt(d, e, lo + zero, hi);
    else sweeps.push({ first: lo, turns: sweep(d, e, lo, hi) });
    if (sweeps.length === 64) rotate(V, sweeps.splice(0));
  }
  rotate(V, sweeps);
}

/** Where d is zero at i, rotations of rows i and k > i make e zero there too. They leave V as it is. */
function splitAt(d: Float64Array, e: Float64Array, i: number, hi: number): void {
  let f = at(e, i);
  d[i] = 0;
  e[i] = 0;
  for (let k = i + 1; k <= hi; k++) {
    const { c, s, r } = givens(at(d, k), f);
    d[k] = r;
    if (k === hi) break;
    f = -s * at(e, k);
    e[k] = c * at(e, k);
  }
}

/** One implicitly shifted QR step on the block lo … hi. Returns the rotations from the right. */
function sweep(d: Float64Array, e: Float64Array, lo: number, hi: number): Float64Array {
  const turns = new Float64Array(2 * (hi - lo));
  let f = at(d, lo) - wilkinsonShift(d, e, lo, hi) / at(d, lo);
  let g = at(e, lo);
  for (let i = lo; i < hi; i++) {
    const right = givens(f, g);
    turns.set([right.c, right.s], 2 * (i - lo));
    if (i > lo) e[i - 1] = right.r;
    f = right.c * at(d, i) + right.s * at(e, i);
    e[i] = right.c * at(e, i) - right.s * at(d, i);
    g = right.s * at(d, i + 1);
    d[i + 1] = right.c * at(d, i + 1);
    const left = givens(f, g);
    d[i] = left.r;
    f = left.c * at(e, i) + left.s * at(d, i + 1);
    d[i + 1] = left.c * at(d, i + 1) - left.s * at(e, i);
    if (i + 1 === hi) break;
    g = left.s * at(e, i + 1);
    e[i + 1] = left.c * at(e, i + 1);
  }
  e[hi - 1] = f;
  return turns;
}

/** The eigenvalue of the last 2 × 2 block of BᵀB that is nearer to its last element. */
function wilkinsonShift(d: Float64Array, e: Float64Array, lo: number, hi: number): number {
  const a = at(d, hi - 1) ** 2 + (hi - 1 > lo ? at(e, hi - 2) ** 2 : 0);
  const b = at(d, hi - 1) * at(e, hi - 1);
  const c = at(d, hi) ** 2 + at(e, hi - 1) ** 2;
  const half = (a - c) / 2;
  return c - b ** 2 / (half + (half < 0 ? -1 : 1) * Math.hypot(half, b));
}

/** The rotation [c s; −s c] that takes (f, g) to (r, 0). */
function givens(f: number, g: number): { c: number; s: number; r: number } {
  const r = Math.sqrt(f * f + g * g);
  return r === 0 ? { c: 1, s: 0, r } : { c: f / r, s: g / r, r };
}

/** Rotates columns in four rows at a time, which stay in the cache while all sweeps go over them. */
function rotate({ rows, columns: n, data }: Matrix, sweeps: readonly Sweep[]): void {
  for (let row = 0; row + 3 < rows; row += 4)
    for (const { first, turns } of sweeps) {
      let p = row * n + first;
      let x0 = at(data, p);
      let x1 = at(data, p + n);
      let x2 = at(data, p + 2 * n);
      let x3 = at(data, p + 3 * n);
      for (let t = 0; t < turns.length; t += 2, p++) {
        const c = at(turns, t);
        const s = at(turns, t + 1);
        const y0 = at(data, p + 1);
        const y1 = at(data, p + 1 + n);
        const y2 = at(data, p + 1 + 2 * n);
        const y3 = at(data, p + 1 + 3 * n);
        data[p] = c * x0 + s * y0;
        data[p + n] = c * x1 + s * y1;
        data[p + 2 * n] = c * x2 + s * y2;
        data[p + 3 * n] = c * x3 + s * y3;
        x0 = c * y0 - s * x0;
        x1 = c * y1 - s * x1;
        x2 = c * y2 - s * x2;
        x3 = c * y3 - s * x3;
      }
      data[p] = x0;
      data[p + n] = x1;
      data[p + 2 * n] = x2;
      data[p + 3 * n] = x3;
    }
}

function asOperator(A: Matrix): LinearOperator {
  expectFinite("randomizedSvd", A);
  return {
    ...A,
    times: (X) => product(view(A), view(X)),
    transposeTimes: (X) => transpose(product(flipped(view(X)), view(A))),
  };
}

const shape = ({ rows, columns }: Matrix): string => `[${rows},${columns}]`;

function expectSize(op: string, A: Matrix): void {
  if (!(A.rows >= 1 && A.columns >= 1 && A.data.length === A.rows * A.columns))
    throw new ShapeError(`${op}: a matrix must have rows · columns elements, got ${A.data.length} in ${shape(A)}`);
}

function expectFinite(op: string, A: Matrix): void {
  expectSize(op, A);
  const bad = A.data.findIndex((x) => !Number.isFinite(x));
  const place = `[${Math.floor(bad / A.columns)},${bad % A.columns}]`;
  if (bad >= 0)
    throw new ShapeError(
      `${op}: elements must be finite, got ${A.data[bad]} at ${place} of ${shape(A)}. Look for it in what the matrix is made of`,
    );
}

function expectSquare(op: string, A: Matrix): void {
  expectFinite(op, A);
  if (A.rows !== A.columns) throw new ShapeError(`${op}: the matrix must be square, got ${shape(A)}`);
}

function expectWhole(name: string, value: number, least: number, most = Number.POSITIVE_INFINITY): void {
  if (Number.isInteger(value) && value >= least && value <= most) return;
  const range = most < Number.POSITIVE_INFINITY ? `from ${least} to ${most}` : `of at least ${least}`;
  throw new ShapeError(`randomizedSvd: ${name} must be a whole number ${range}, got ${value}`);
}

function expectResult(name: string, result: Matrix, rows: number, columns: number): Matrix {
  if (result.rows !== rows || result.columns !== columns)
    throw new ShapeError(`randomizedSvd: ${name} must give [${rows},${columns}], got ${shape(result)}`);
  return result;
}
