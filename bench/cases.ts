/** What is measured. M rows, N outputs, K inputs, r the rank of LoRA; all f32. */
import { matmul as matmulOp } from "../src/autograd/basic-ops.ts";
import { backward } from "../src/autograd/engine.ts";
import type { Gpu } from "../src/gpu/gpu.ts";
import { defineKernel } from "../src/gpu/kernel.ts";
import { sum2 } from "../src/kernels/axpy.ts";
import { type Layout, matmul } from "../src/kernels/matmul.ts";
import naiveSource from "../src/kernels/matmul-naive.wgsl";
import { loraLinear } from "../src/lora/lora-linear.ts";
import { Random } from "../src/tensor/random.ts";
import { empty, type Tensor, tensor } from "../src/tensor/tensor.ts";
import type { Case, Contest } from "./harness.ts";

const naive = defineKernel("matmul-naive", naiveSource);
const LORA_SCALE = 2;

/** The contests of a full run, or smaller ones of the same kind for a quick look. */
export function contests(quick: boolean): Contest[] {
  const layouts: readonly Layout[] = ["nn", "nt", "tn"];
  const size = quick ? 128 : 512;
  return [
    ...(quick ? [128] : [256, 512]).flatMap((n) => layouts.map((layout) => matmulContest(layout, n))),
    loraForward({ M: size, N: size, K: size, r: 16 }),
    loraStep({ M: size, N: size, K: size, r: 16 }),
  ];
}

/** The tiled product against one thread per element: n × n matrices, 2n³ operations. */
function matmulContest(layout: Layout, n: number): Contest {
  return {
    name: `matmul ${layout} ${n}³`,
    setup: (gpu) => {
      const x = input(gpu, n, n, 1);
      const w = input(gpu, n, n, n);
      const work = { flops: 2 * n ** 3, bytes: 4 * 3 * n * n };
      const check: Case["check"] = (_, element) => {
        const [i, j] = split(element, n);
        return sum(n, (k) => (layout === "tn" ? x.at(k, i) : x.at(i, k)) * (layout === "nt" ? w.at(j, k) : w.at(k, j)));
      };
      const simple = (): Tensor => {
        const y = empty(gpu, [n, n], "matmul-naive");
        const uniforms = { M: n, N: n, K: n, R: 0, s: 1, c: 0, x_batch: 0, w_batch: 0 };
        const variant = { X_T: layout === "tn" ? 1 : 0, W_T: layout === "nt" ? 1 : 0 };
        naive(gpu, uniforms, { x: x.t, w: w.t, u: x.t, b: w.t, y }, [n, n], variant);
        return y;
      };
      return {
        inputs: [x.t, w.t],
        cases: [
          { name: "naive", ...work, run: () => ({ y: simple() }), check },
          { name: "tiled", ...work, run: () => ({ y: matmul(x.t, w.t, layout) }), check },
        ],
      };
    },
  };
}

interface Sizes {
  readonly M: number;
  readonly N: number;
  readonly K: number;
  readonly r: number;
}

const sizesText = ({ M, N, K, r }: Sizes): string => `M=${M} N=${N} K=${K} r=${r}`;

/**
 * What LoRA adds to a frozen layer's forward pass.
 *
 * base 2MNK operations; with LoRA 2r(MK + MN) more, as extra columns of the base product or as products of their own.
 */
function loraForward(sizes: Sizes): Contest {
  const { M, N, K, r } = sizes;
  return {
    name: `LoRA forward ${sizesText(sizes)}`,
    setup: (gpu) => {
      const layer = loraLayer(gpu, sizes);
      const [x, W, A, B] = [layer.x.t, layer.W.t, layer.A.t, layer.B.t];
      const base = { flops: 2 * M * N * K, bytes: 4 * (M * K + N * K + M * N) };
      const flops = base.flops + 2 * r * (M * K + M * N);
      const fused = base.bytes + 4 * (M * K + r * K + M * r) + 4 * (M * r + N * r);
      const threeProducts = (): Tensor => {
        const low = matmul(matmul(x, A, "nt"), B, "nt", { scale: LORA_SCALE });
        return sum2(matmul(x, W, "nt"), low);
      };
      const baseAt = (i: number, j: number): number => sum(K, (k) => layer.x.at(i, k) * layer.W.at(j, k));
      const check: Case["check"] = (_, element) => layer.y(...split(element, N));
      return {
        inputs: [x, W, A, B],
        cases: [
          {
            name: "base product alone",
            ...base,
            run: () => ({ y: matmul(x, W, "nt") }),
            check: (_, element) => baseAt(...split(element, N)),
          },
          {
            name: "LoRA, fused columns",
            flops,
            bytes: fused,
            run: () => ({ y: loraLinear(x, W, A, B, LORA_SCALE) }),
            check,
          },
          {
            name: "LoRA, three products and a sum",
            flops,
            bytes: fused + 4 * 4 * M * N, // the low-rank product written, two products read, their sum written
            run: () => ({ y: threeProducts() }),
            check,
          },
        ],
      };
    },
  };
}

/**
 * Forward and backward of one layer whose input needs a gradient: W trained whole, or frozen under LoRA.
 *
 * full: y, dx, dW, 6MNK operations. LoRA: y, dx, dA, dB, 4MNK + 6r(MK + MN).
 */
function loraStep(sizes: Sizes): Contest {
  const { M, N, K, r } = sizes;
  return {
    name: `training step ${sizesText(sizes)}`,
    setup: (gpu) => {
      const layer = loraLayer(gpu, sizes);
      const dy = input(gpu, M, N, 1);
      const [x, W, A, B] = [layer.x.t, layer.W.t, layer.A.t, layer.B.t];
      const full = (): Record<string, Tensor> => {
        setTrainable([x, W], [A, B]);
        const y = matmulOp(x, W, "nt");
        return { y, ...named(backward(y, dy.t), { dx: x, dW: W }) };
      };
      const lora = (): Record<string, Tensor> => {
        setTrainable([x, A, B], [W]);
        const y = loraLinear(x, W, A, B, LORA_SCALE);
        return { y, ...named(backward(y, dy.t), { dx: x, dA: A, dB: B }) };
      };
      const baseAt = (i: number, j: number): number => sum(K, (k) => layer.x.at(i, k) * layer.W.at(j, k));
      const baseDx = (i: number, k: number): number => sum(N, (n) => dy.at(i, n) * layer.W.at(n, k));
      const v = table(M, r, (m, p) => LORA_SCALE * sum(N, (n) => dy.at(m, n) * layer.B.at(n, p)));
      const fullCheck: Record<string, (element: number) => number> = {
        y: (element) => baseAt(...split(element, N)),
        dx: (element) => baseDx(...split(element, K)),
        dW: (element) => {
          const [n, k] = split(element, K);
          return sum(M, (m) => dy.at(m, n) * layer.x.at(m, k));
        },
      };
      const loraCheck: Record<string, (element: number) => number> = {
        y: (element) => layer.y(...split(element, N)),
        dx: (element) => {
          const [i, k] = split(element, K);
          return baseDx(i, k) + sum(r, (p) => v(i, p) * layer.A.at(p, k));
        },
        dA: (element) => {
          const [p, k] = split(element, K);
          return sum(M, (m) => v(m, p) * layer.x.at(m, k));
        },
        dB: (element) => {
          const [n, p] = split(element, r);
          return LORA_SCALE * sum(M, (m) => dy.at(m, n) * layer.u(m, p));
        },
      };
      const product = 4 * (M * K + N * K + M * N); // bytes of y, dx or dW: two operands in, the third matrix out
      const [skinnyK, skinnyN] = [4 * (M * K + r * K + M * r), 4 * (M * N + r * N + M * r)];
      return {
        inputs: [x, W, A, B, dy.t],
        cases: [
          {
            name: "full, W trained",
            flops: 6 * M * N * K,
            bytes: 3 * product,
            run: full,
            check: (result, element) => fullCheck[result]?.(element) ?? Number.NaN,
          },
          {
            name: "LoRA, A and B trained",
            flops: 4 * M * N * K + 6 * r * (M * K + M * N),
            // y and dx with their low-rank columns; u and dA; v and dB
            bytes: 2 * product + 4 * r * (2 * M + N + K) + 2 * skinnyK + 2 * skinnyN,
            run: lora,
            check: (result, element) => loraCheck[result]?.(element) ?? Number.NaN,
          },
        ],
      };
    },
  };
}

/** A matrix on the device, and its elements for the f64 reference. */
interface Matrix {
  readonly t: Tensor;
  readonly at: (row: number, column: number) => number;
}

/** Random values of variance 1 / fanIn, so that products stay near 1. */
function input(gpu: Gpu, rows: number, columns: number, fanIn: number): Matrix {
  const random = new Random(20_250_101, rows * 31 + columns + fanIn);
  const values = Float32Array.from({ length: rows * columns }, () => random.normal(0, 1 / Math.sqrt(fanIn)));
  const at = (row: number, column: number): number => values[row * columns + column] ?? Number.NaN;
  return { t: tensor(gpu, values, [rows, columns]), at };
}

function loraLayer(gpu: Gpu, { M, N, K, r }: Sizes) {
  const [x, W, A, B] = [input(gpu, M, K, 1), input(gpu, N, K, K), input(gpu, r, K, K), input(gpu, N, r, r)];
  const u = table(M, r, (m, p) => sum(K, (k) => x.at(m, k) * A.at(p, k)));
  const y = (i: number, j: number): number =>
    sum(K, (k) => x.at(i, k) * W.at(j, k)) + LORA_SCALE * sum(r, (p) => u(i, p) * B.at(j, p));
  return { x, W, A, B, u, y };
}

/** f, each value computed at most once. */
function table(rows: number, columns: number, f: (row: number, column: number) => number): Matrix["at"] {
  const known = new Float64Array(rows * columns).fill(Number.NaN);
  return (row, column) => {
    const at = row * columns + column;
    let value = known[at] ?? Number.NaN;
    if (Number.isNaN(value)) known[at] = value = f(row, column);
    return value;
  };
}

function sum(n: number, term: (k: number) => number): number {
  let total = 0;
  for (let k = 0; k < n; k++) total += term(k);
  return total;
}

const split = (element: number, columns: number): [row: number, column: number] => [
  Math.floor(element / columns),
  element % columns,
];

function setTrainable(trained: readonly Tensor[], frozen: readonly Tensor[]): void {
  for (const t of trained) t.requiresGrad = true;
  for (const t of frozen) t.requiresGrad = false;
}

/** Gradients by name; a missing one is an error, and so is one too many. */
function named(
  gradients: ReadonlyMap<Tensor, Tensor>,
  leaves: Readonly<Record<string, Tensor>>,
): Record<string, Tensor> {
  const found = Object.entries(leaves).flatMap(([name, leaf]) => {
    const gradient = gradients.get(leaf);
    return gradient ? [[name, gradient] as const] : [];
  });
  if (found.length !== gradients.size || found.length !== Object.keys(leaves).length)
    throw new Error(`bench: gradients must be ${Object.keys(leaves).join(", ")}, got ${gradients.size} gradients`);
  return Object.fromEntries(found);
}
