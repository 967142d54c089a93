/** The study ladders of `bench/matmul/` and `bench/lora/` as contests: the same work by every rung, the shipped path last. */
import type { Gpu } from "../src/gpu/gpu.ts";
import { defineKernel } from "../src/gpu/kernel.ts";
import { matmul } from "../src/kernels/matmul.ts";
import { loraLinear } from "../src/lora/lora-linear.ts";
import { Random } from "../src/tensor/random.ts";
import { empty, type Tensor, tensor } from "../src/tensor/tensor.ts";
import type { Contest } from "./harness.ts";
import productSource from "./lora/0-product.wgsl";
import sumSource from "./lora/1-three-products.wgsl";
import twoPassesSource from "./lora/2-two-passes.wgsl";
import columnsSource from "./lora/3-columns.wgsl";
import naiveSource from "./matmul/1-naive.wgsl";
import coalescedSource from "./matmul/2-coalesced.wgsl";
import sharedTileSource from "./matmul/3-shared-tile.wgsl";
import registerBlockSource from "./matmul/4-register-block.wgsl";
import vec4Source from "./matmul/5-vec4.wgsl";

/** y = x·w, x [M,K] and w [K,N]. */
export interface MatmulRung {
  readonly name: string;
  readonly run: (x: Tensor, w: Tensor) => Tensor;
}

/** y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, x [M,K], W [N,K], A [R,K] and B [N,R]. */
export interface LoraRung {
  readonly name: string;
  readonly run: (x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: number) => Tensor;
}

const BLOCK = 8; // TM and TN of rungs 4 and 5

export const matmulRungs: readonly MatmulRung[] = [
  matmulRung("1-naive", naiveSource, (M, N) => [M, N]),
  matmulRung("2-coalesced", coalescedSource, (M, N) => [N, M]),
  matmulRung("3-shared-tile", sharedTileSource, (M, N) => [N, M]),
  matmulRung("4-register-block", registerBlockSource, (M, N) => [Math.ceil(N / BLOCK), Math.ceil(M / BLOCK)]),
  matmulRung("5-vec4", vec4Source, (M, N) => [Math.ceil(N / BLOCK), Math.ceil(M / BLOCK)]),
  { name: "shipped, matmul", run: (x, w) => matmul(x, w, "nn") },
];

function matmulRung(
  name: string,
  source: string,
  threads: (M: number, N: number) => readonly [x: number, y: number],
): MatmulRung {
  const kernel = defineKernel(`ladder ${name}`, source);
  return {
    name,
    run: (x, w) => {
      const [M = 0, K = 0] = x.shape;
      const [, N = 0] = w.shape;
      const y = empty(x.gpu, [M, N], name);
      kernel(x.gpu, { M, N, K }, { x, w, y }, threads(M, N));
      return y;
    },
  };
}

const product = defineKernel("ladder 0-product", productSource);
const sumOfProducts = defineKernel("ladder 1-three-products", sumSource);
const twoPasses = defineKernel("ladder 2-two-passes", twoPassesSource);
const columns = defineKernel("ladder 3-columns", columnsSource);

export const loraRungs: readonly LoraRung[] = [
  {
    name: "1-three-products",
    run: (x, W, A, B, s) => {
      const t = xWt(xWt(x, A), B);
      const y0 = xWt(x, W);
      const y = empty(x.gpu, y0.shape, "1-three-products");
      sumOfProducts(x.gpu, { n: y.size, s }, { y0, t, y }, [y.size]);
      return y;
    },
  },
  { name: "2-two-passes", run: withLowRank("2-two-passes", twoPasses) },
  { name: "3-columns", run: withLowRank("3-columns", columns) },
  { name: "shipped, loraLinear", run: loraLinear },
];

/** x·wᵀ by `0-product.wgsl`. */
function xWt(x: Tensor, w: Tensor): Tensor {
  const [M = 0, K = 0] = x.shape;
  const [N = 0] = w.shape;
  const y = empty(x.gpu, [M, N], "0-product");
  product(x.gpu, { M, N, K }, { x, w, y }, [N, M]);
  return y;
}

function withLowRank(name: string, kernel: typeof columns): LoraRung["run"] {
  return (x, W, A, B, s) => {
    const u = xWt(x, A);
    const [M = 0, K = 0] = x.shape;
    const [N = 0, R = 0] = B.shape;
    const y = empty(x.gpu, [M, N], name);
    kernel(x.gpu, { M, N, K, R, s }, { x, W, u, B, y }, [N, M]);
    return y;
  };
}

/** All rungs of `bench/matmul/` on n × n matrices: 2n³ operations. */
export function matmulLadder(n: number): Contest {
  return {
    name: `matmul ladder ${n}³`,
    group: "matmul ladder",
    sizes: { M: n, N: n, K: n },
    setup: (gpu) => {
      const [x, w] = [randomMatrix(gpu, n, n, 1), randomMatrix(gpu, n, n, n)];
      return {
        inputs: [x.t, w.t],
        cases: matmulRungs.map(({ name, run }) => ({
          name,
          flops: 2 * n ** 3,
          bytes: 4 * 3 * n * n,
          run: () => ({ y: run(x.t, w.t) }),
          check: (_, element) => sum(n, (k) => x.at(Math.floor(element / n), k) * w.at(k, element % n)),
        })),
      };
    },
  };
}

const LORA_SCALE = 2;

/** All rungs of `bench/lora/`, after the base product alone by the same kind of kernel. */
export function loraLadder({ M, N, K, r }: { M: number; N: number; K: number; r: number }): Contest {
  return {
    name: `LoRA ladder M=${M} N=${N} K=${K} r=${r}`,
    group: "LoRA ladder",
    sizes: { M, N, K, r },
    setup: (gpu) => {
      const x = randomMatrix(gpu, M, K, 1);
      const W = randomMatrix(gpu, N, K, K);
      const A = randomMatrix(gpu, r, K, K);
      const B = randomMatrix(gpu, N, r, r);
      const base = { flops: 2 * M * N * K, bytes: 4 * (M * K + N * K + M * N) };
      const flops = base.flops + 2 * r * (M * K + M * N);
      const uBytes = 4 * (M * K + r * K + M * r);
      const uAndB = 4 * (M * r + N * r);
      const baseAt = (i: number, j: number): number => sum(K, (k) => x.at(i, k) * W.at(j, k));
      const lowRankAt = (i: number, j: number): number =>
        sum(r, (p) => B.at(j, p) * sum(K, (k) => x.at(i, k) * A.at(p, k)));
      return {
        inputs: [x.t, W.t, A.t, B.t],
        cases: [
          {
            name: "0-product, base alone",
            ...base,
            run: () => ({ y: xWt(x.t, W.t) }),
            check: (_, element) => baseAt(Math.floor(element / N), element % N),
          },
          ...loraRungs.map(({ name, run }, rung) => ({
            name,
            flops,
            // Rung 1 writes t on the way, and its sum reads y0 and t and writes y.
            bytes: base.bytes + uBytes + uAndB + (rung === 0 ? 4 * (M * N + 3 * M * N) : 0),
            run: () => ({ y: run(x.t, W.t, A.t, B.t, LORA_SCALE) }),
            check: (_: string, element: number) => {
              const [i, j] = [Math.floor(element / N), element % N];
              return baseAt(i, j) + LORA_SCALE * lowRankAt(i, j);
            },
          })),
        ],
      };
    },
  };
}

/** Normal values of variance 1 / fanIn, on the device and for the f64 reference. */
function randomMatrix(gpu: Gpu, rows: number, cols: number, fanIn: number) {
  const random = new Random(20_250_102, rows * 31 + cols + fanIn);
  const values = Float32Array.from({ length: rows * cols }, () => random.normal(0, 1 / Math.sqrt(fanIn)));
  const at = (row: number, column: number): number => values[row * cols + column] ?? Number.NaN;
  return { t: tensor(gpu, values, [rows, cols]), at };
}

function sum(n: number, term: (k: number) => number): number {
  let total = 0;
  for (let k = 0; k < n; k++) total += term(k);
  return total;
}
