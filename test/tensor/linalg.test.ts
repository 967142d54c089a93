import { describe, expect, test } from "vitest";
import { ShapeError } from "../../src/tensor/errors.ts";
import {
  cholesky,
  choleskySolve,
  type Matrix,
  matrix,
  multiply,
  qr,
  randomizedSvd,
  type Svd,
  svd,
  symmetricEigen,
  transpose,
} from "../../src/tensor/linalg.ts";
import { Random } from "../../src/tensor/random.ts";
import golden from "../golden/linalg.json" with { type: "json" };
import { freshSeed } from "../harness.ts";

const ACCURACY = 1e-12;

const make = (rows: number, columns: number, f: (i: number, j: number) => number): Matrix =>
  matrix(
    rows,
    columns,
    Float64Array.from({ length: rows * columns }, (_, p) => f(Math.floor(p / columns), p % columns)),
  );
const gaussian = (rows: number, columns: number, random: Random, std = 1): Matrix =>
  make(rows, columns, () => random.normal(0, std));
const identity = (n: number): Matrix => make(n, n, (i, j) => (i === j ? 1 : 0));
const bidiagonal = (n: number, diagonal: (i: number) => number, above: (i: number) => number): Matrix =>
  make(n, n, (i, j) => (i === j ? diagonal(i) : j === i + 1 ? above(i) : 0));
/** A·diag(s). */
const scaleColumns = (A: Matrix, s: ArrayLike<number>): Matrix =>
  matrix(
    A.rows,
    A.columns,
    A.data.map((x, p) => x * (s[p % A.columns] ?? Number.NaN)),
  );
const firstColumns = (A: Matrix, count: number): Matrix =>
  make(A.rows, count, (i, j) => A.data[i * A.columns + j] ?? Number.NaN);
const compose = ({ U, s, Vt }: Svd): Matrix => multiply(scaleColumns(U, s), Vt);
/** A·Aᵀ. */
const gram = (A: Matrix): Matrix => multiply(A, transpose(A));
const largest = (values: Iterable<number>): number => Math.max(0, ...[...values].map(Math.abs));
/** Frobenius's, of numbers whose squares need not be in range. */
function norm(values: Float64Array): number {
  const most = largest(values) || 1;
  return most * Math.sqrt(values.reduce((sum, x) => sum + (x / most) ** 2, 0));
}
const fromGolden = ({ shape: [rows = 0, columns = 0], data }: { shape: number[]; data: number[] }): Matrix =>
  matrix(rows, columns, data);

/** Fails unless ‖A − B‖ ≤ 10⁻¹²·scale. NaN fails. */
function expectSame(A: Matrix, B: Matrix, what: string, scale = 1): void {
  expect([A.rows, A.columns], `${what}: shape`).toEqual([B.rows, B.columns]);
  const error = norm(A.data.map((x, i) => x - (B.data[i] ?? Number.NaN)));
  expect(error <= ACCURACY * scale, `${what}: error ${error} of ${scale}`).toBe(true);
}

/** Fails unless Aᵀ·A = I. */
const expectOrthonormal = (A: Matrix, what: string): void =>
  expectSame(gram(transpose(A)), identity(A.columns), `${what}: AᵀA`);

function expectDescending(values: Float64Array, least: number, what: string): void {
  const ordered = values.every((x, i) => x >= least && x <= (values[i - 1] ?? Number.POSITIVE_INFINITY));
  expect(ordered, `${what}: in order, got ${values}`).toBe(true);
}

function expectSvd(A: Matrix, what: string): Svd {
  const found = svd(A);
  const k = Math.min(A.rows, A.columns);
  expect([found.U.columns, found.s.length, found.Vt.rows], `${what}: thin`).toEqual([k, k, k]);
  expectDescending(found.s, 0, what);
  expectOrthonormal(found.U, `${what}: U`);
  expectOrthonormal(transpose(found.Vt), `${what}: V`);
  expectSame(compose(found), A, `${what}: U·diag(s)·Vᵀ`, norm(A.data));
  return found;
}

function expectQr(A: Matrix, what: string): void {
  const { Q, R } = qr(A);
  expectOrthonormal(Q, `${what}: Q`);
  expectSame(multiply(Q, R), A, `${what}: Q·R`, norm(A.data));
  const below = R.data.filter((_, p) => p % R.columns < Math.floor(p / R.columns));
  expect(largest(below), `${what}: below R's diagonal`).toBe(0);
}

function expectEigen(A: Matrix, what: string): void {
  const { values, vectors } = symmetricEigen(A);
  expectDescending(values, Number.NEGATIVE_INFINITY, what);
  expectOrthonormal(vectors, `${what}: V`);
  expectSame(
    multiply(scaleColumns(vectors, values), transpose(vectors)),
    A,
    `${what}: V·diag(values)·Vᵀ`,
    norm(A.data),
  );
}

/** Matrices that are hard on one algorithm or another, by name. */
function matrices(random: Random): Record<string, Matrix> {
  const found: Record<string, Matrix> = {};
  const sizes = [1, 2, 3, 5, 7, 31, 32, 33, 48, 64, 65, 100, 257];
  const size = (): number => sizes[random.below(sizes.length)] ?? 1;
  const shapes = [
    [1, 1],
    [1, 9],
    [9, 1],
    [7, 5],
    [5, 7],
    [64, 48],
    [48, 64],
    [33, 33],
    [size(), size()],
    [size(), size()],
  ];
  for (const [m = 1, n = 1] of shapes) found[`${m}×${n}`] = gaussian(m, n, random);
  const rank5 = multiply(gaussian(60, 5, random), gaussian(5, 60, random));
  const { Q } = qr(gaussian(50, 40, random));
  return {
    ...found,
    "rank 5": rank5,
    "rank 1 of ones": make(30, 20, () => 1),
    "all zeros": matrix(9, 7),
    "some rows and columns zero": make(40, 30, (i, j) => (i % 3 > 0 && j % 4 > 0 ? random.normal() : 0)),
    identity: identity(40),
    orthonormal: Q,
    "repeated singular values": multiply(
      scaleColumns(
        Q,
        Float64Array.from({ length: 40 }, (_, i) => Math.floor(i / 10)),
      ),
      qr(gaussian(40, 40, random)).Q,
    ),
    "nearly repeated singular values": make(50, 50, (i, j) => (i === j ? 1 : 0) + 1e-13 * random.normal()),
    "as good as singular (Hilbert)": make(40, 40, (i, j) => 1 / (i + j + 1)),
    "falling to 10⁻¹⁶": multiply(
      scaleColumns(
        Q,
        Float64Array.from({ length: 40 }, (_, i) => 10 ** (-i / 2.5)),
      ),
      qr(gaussian(40, 40, random)).Q,
    ),
    "rows from 10⁻⁴⁰ to 10⁴⁰": make(17, 17, (i) => random.normal() * 10 ** (5 * (i - 8))),
    "bidiagonal, growing": bidiagonal(
      60,
      (i) => 10 ** (i / 3 - 20),
      (i) => 10 ** (i / 3 - 20),
    ),
    "bidiagonal, falling": bidiagonal(
      60,
      (i) => 10 ** (-i / 3),
      (i) => 10 ** (-i / 3),
    ),
    "bidiagonal with zeros": bidiagonal(
      80,
      () => random.below(3) - 1,
      () => random.below(3) - 1,
    ),
    "zero but above the diagonal": bidiagonal(
      30,
      () => 0,
      () => 1,
    ),
    huge: gaussian(20, 30, random, 1e150),
    "as large as numbers go": gaussian(12, 12, random, 1e305),
    tiny: gaussian(30, 20, random, 1e-150),
    "as small as numbers go": gaussian(12, 12, random, 1e-290),
  };
}

describe("on random matrices of every shape and kind", () => {
  const seed = freshSeed();
  const all = Object.entries(matrices(new Random(seed)));

  test.each(all)("svd of %s", (name, A) => {
    expectSvd(A, `${name} (seed ${seed})`);
  });

  test.each(all)("qr of %s", (name, A) => {
    expectQr(A, `${name} (seed ${seed})`);
  });

  const square = all.filter(([, { rows, columns }]) => rows === columns);
  test.each(square)("symmetricEigen of the lower triangle of %s", (name, { rows: n, data }) => {
    const symmetric = make(n, n, (i, j) => data[Math.max(i, j) * n + Math.min(i, j)] ?? Number.NaN);
    expectEigen(symmetric, `${name} (seed ${seed})`);
    expect(symmetricEigen(matrix(n, n, data)).values, name).toEqual(symmetricEigen(symmetric).values);
  });

  test("svd and symmetricEigen of many small matrices of few values", () => {
    const random = new Random(seed, 1);
    for (let round = 0; round < 300; round++) {
      const [m, n] = [1 + random.below(12), 1 + random.below(12)];
      const A = make(m, n, () => random.below(3) - 1);
      expectSvd(A, `round ${round} (seed ${seed})`);
      expectEigen(gram(A), `round ${round} (seed ${seed})`);
    }
  });
});

describe("as NumPy", () => {
  test.each(Object.entries(golden.svd))(
    "svd of %s: singular values and what the leading vectors span",
    (name, entry) => {
      const A = fromGolden(entry.A);
      const { U, s, Vt } = expectSvd(A, name);
      expectSame(matrix(1, s.length, s), matrix(1, entry.s.length, entry.s), `${name}: s`, entry.s[0]);
      if (!("U" in entry)) return;
      expectSame(gram(firstColumns(U, entry.rank)), fromGolden(entry.U), `${name}: UUᵀ`, 100);
      expectSame(gram(firstColumns(transpose(Vt), entry.rank)), fromGolden(entry.V), `${name}: VVᵀ`, 100);
    },
  );

  const unique = Object.entries(golden.svd).flatMap(([name, entry]) => ("Q" in entry ? [{ name, ...entry }] : []));
  test.each(unique)("qr of $name, signs included", ({ name, A, Q, R }) => {
    const found = qr(fromGolden(A));
    expectSame(found.Q, fromGolden(Q), `${name}: Q`, 100);
    expectSame(found.R, fromGolden(R), `${name}: R`, norm(fromGolden(A).data));
  });

  test.each(Object.entries(golden.symmetric))("symmetricEigen of a matrix that is %s", (name, entry) => {
    const { values, vectors } = symmetricEigen(fromGolden(entry.A));
    const expected = matrix(1, entry.values.length, entry.values);
    expectSame(matrix(1, values.length, values), expected, `${name}: values`, largest(entry.values));
    expectSame(gram(firstColumns(vectors, entry.rank)), fromGolden(entry.V), `${name}: VVᵀ`, 100);
  });

  test("cholesky, and a system solved by it", () => {
    const { A, L, B, X } = golden.definite;
    const found = cholesky(fromGolden(A));
    expectSame(found, fromGolden(L), "L", norm(found.data));
    expectSame(choleskySolve(found, fromGolden(B)), fromGolden(X), "X", 100);
  });
});

test("multiply is the sum of products, at sizes about those of its blocks", () => {
  const seed = freshSeed();
  const random = new Random(seed);
  for (const [m, k, n] of [
    [1, 1, 1],
    [2, 4, 3],
    [3, 5, 1],
    [5, 63, 257],
    [4, 64, 256],
    [7, 66, 255],
    [1 + random.below(40), 1 + random.below(140), 1 + random.below(300)],
  ] as const) {
    const A = gaussian(m, k, random);
    const B = gaussian(k, n, random);
    const plain = make(m, n, (i, j) => {
      let sum = 0;
      for (let l = 0; l < k; l++) sum += (A.data[i * k + l] ?? Number.NaN) * (B.data[l * n + j] ?? Number.NaN);
      return sum;
    });
    expectSame(multiply(A, B), plain, `${m}×${k}×${n} (seed ${seed})`, norm(A.data) * norm(B.data));
  }
});

test("transpose swaps rows and columns, and inputs are left as they were", () => {
  const A = make(2, 3, (i, j) => 10 * i + j);
  expect(transpose(A)).toEqual(make(3, 2, (i, j) => 10 * j + i));
  const S = make(3, 3, (i, j) => (i === j ? 4 : 1));
  for (const f of [qr, svd, symmetricEigen, cholesky, transpose]) f(S);
  choleskySolve(S, S);
  multiply(S, S);
  expect(S).toEqual(make(3, 3, (i, j) => (i === j ? 4 : 1)));
});

test("qr leaves a column alone that is zero below the diagonal, and turns the sign of the others, as LAPACK does", () => {
  expect([...qr(matrix(2, 2, [-3, 1, 0, -2])).R.data]).toEqual([-3, 1, 0, -2]);
  expect(qr(matrix(2, 1, [3, 4])).R.data[0]).toBe(-5);
  expect(qr(matrix(2, 1, [-3, 4])).R.data[0]).toBe(5);
});

test("a positive definite system of random size is solved by its Cholesky factor", () => {
  const seed = freshSeed();
  const random = new Random(seed);
  const n = 1 + random.below(80);
  const A = gram(gaussian(n, n + 5, random));
  for (let p = 0; p < n * n; p += n + 1) A.data[p] = (A.data[p] ?? 0) + n;
  const X = gaussian(n, 1 + random.below(6), random);
  const L = cholesky(A);
  expectSame(gram(L), A, `L·Lᵀ (seed ${seed})`, norm(A.data));
  expectSame(choleskySolve(L, multiply(A, X)), X, `X (seed ${seed})`, 10 * norm(X.data));
});

describe("randomizedSvd", () => {
  const seed = freshSeed();

  test.each([
    [40, 70],
    [70, 40],
    [5, 3],
  ])("finds a matrix of low rank, [%i,%i], from its products alone", async (m, n) => {
    const random = new Random(seed);
    const A = multiply(gaussian(m, 3, random), gaussian(3, n, random));
    const products: string[] = [];
    const operator = {
      rows: m,
      columns: n,
      times: async (X: Matrix) => {
        products.push("A·X");
        return multiply(A, X);
      },
      transposeTimes: (X: Matrix) => {
        products.push("Aᵀ·X");
        return multiply(transpose(A), X);
      },
    };
    const found = await randomizedSvd(operator, 3, { random, iterations: 1 });
    expect(products).toEqual(["A·X", "Aᵀ·X", "A·X", "Aᵀ·X"]);
    expect([found.U.columns, found.s.length, found.Vt.rows]).toEqual([3, 3, 3]);
    expectOrthonormal(found.U, `U (seed ${seed})`);
    expectOrthonormal(transpose(found.Vt), `V (seed ${seed})`);
    expectSame(compose(found), A, `A (seed ${seed})`, norm(A.data));
  });

  test("finds the leading part of a matrix of full rank, the better the more iterations", async () => {
    const random = new Random(seed, 1);
    const { Q: left } = qr(gaussian(80, 60, random));
    const { Q: right } = qr(gaussian(60, 60, random));
    const s = Float64Array.from({ length: 60 }, (_, i) => 0.8 ** i);
    const A = multiply(scaleColumns(left, s), transpose(right));
    const error = async (iterations: number): Promise<number> => {
      const found = await randomizedSvd(A, 10, { random: new Random(seed, 2), iterations });
      return largest(found.s.map((x, i) => x - (s[i] ?? Number.NaN)));
    };
    const [none, two, eight] = [await error(0), await error(2), await error(8)];
    expect(two, `seed ${seed}`).toBeLessThan(none);
    expect(two, `seed ${seed}`).toBeLessThan(1e-3);
    expect(eight, `seed ${seed}`).toBeLessThan(1e-9);
  });

  test("gives the same for the same seed, and is exact where the test matrix is as wide as the matrix", async () => {
    const A = gaussian(12, 9, new Random(seed, 3));
    const run = (): Promise<Svd> => randomizedSvd(A, 9, { random: new Random(5) });
    expect(await run()).toEqual(await run());
    expectSame(compose(await run()), A, `A (seed ${seed})`, norm(A.data));
  });
});

describe("what does not fit is refused, and said", () => {
  const A = make(2, 3, (i, j) => i + j);
  const square = identity(3);
  const bad = make(3, 3, (i, j) => (i === 1 && j === 2 ? Number.NaN : 1));
  const infinite = make(3, 3, (i, j) => (i === 2 && j === 0 ? Number.NEGATIVE_INFINITY : 1));
  const source = "Look for it in what the matrix is made of";

  test.each([
    ["multiply", () => multiply(square, bad)],
    ["qr", () => qr(bad)],
    ["svd", () => svd(bad)],
    ["symmetricEigen", () => symmetricEigen(bad)],
    ["cholesky", () => cholesky(bad)],
    ["choleskySolve", () => choleskySolve(square, bad)],
  ])("%s of a matrix that is not finite", (op, run) => {
    expect(run).toThrow(ShapeError);
    expect(run).toThrow(`${op}: elements must be finite, got NaN at [1,2] of [3,3]. ${source}`);
  });

  test("infinity and a randomised svd too", async () => {
    expect(() => svd(infinite)).toThrow(`svd: elements must be finite, got -Infinity at [2,0] of [3,3]. ${source}`);
    const random = new Random(1);
    await expect(randomizedSvd(bad, 1, { random })).rejects.toThrow(
      `randomizedSvd: elements must be finite, got NaN at [1,2] of [3,3]. ${source}`,
    );
  });

  test("shapes", () => {
    expect(() => matrix(2, 3, [1, 2])).toThrow("matrix: a matrix must have rows · columns elements, got 2 in [2,3]");
    expect(() => matrix(0, 3)).toThrow("matrix: a matrix must have rows · columns elements, got 0 in [0,3]");
    expect(() => multiply(A, A)).toThrow(
      "multiply: A must have as many columns as B has rows, got [2,3] and [2,3]. Transpose one",
    );
    expect(() => symmetricEigen(A)).toThrow("symmetricEigen: the matrix must be square, got [2,3]");
    expect(() => cholesky(A)).toThrow("cholesky: the matrix must be square, got [2,3]");
    expect(() => choleskySolve(square, A)).toThrow(
      "choleskySolve: B must have as many rows as L, got [2,3] and [3,3]. Transpose B",
    );
  });

  test("a matrix that is not positive definite", () => {
    expect(() => cholesky(matrix(2, 2, [1, 2, 2, 1]))).toThrow(
      "cholesky: A must be positive definite, got a pivot of -3 in row 1. Add a multiple of the identity to it",
    );
  });

  test("options of a randomised svd, and an operator that gives another shape", async () => {
    const random = new Random(1);
    await expect(randomizedSvd(A, 3, { random })).rejects.toThrow(
      "randomizedSvd: rank must be a whole number from 1 to 2, got 3",
    );
    await expect(randomizedSvd(A, 1, { random, iterations: -1 })).rejects.toThrow(
      "randomizedSvd: iterations must be a whole number of at least 0, got -1",
    );
    await expect(randomizedSvd(A, 1, { random, oversample: 0.5 })).rejects.toThrow(
      "randomizedSvd: oversample must be a whole number of at least 0, got 0.5",
    );
    const operator = { rows: 4, columns: 3, times: () => square, transposeTimes: () => square };
    await expect(randomizedSvd(operator, 2, { random })).rejects.toThrow(
      "randomizedSvd: times must give [4,3], got [3,3]",
    );
  });
});
