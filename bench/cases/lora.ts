/** What LoRA costs. M rows, N outputs, K inputs, r the rank; all f32, W frozen unless said otherwise. */
import { matmul as matmulOp } from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { sum2 } from "../../src/kernels/axpy.ts";
import { matmul } from "../../src/kernels/matmul.ts";
import { loraLinear } from "../../src/lora/lora-linear.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import type { Case } from "../harness.ts";
import { type Matrix, matrixOf, type SizedContest, split, sum } from "./inputs.ts";

const SCALE = 2;

export interface LoraSizes {
  readonly M: number;
  readonly N: number;
  readonly K: number;
  readonly r: number;
}

const text = ({ M, N, K, r }: LoraSizes): string => `M=${M} N=${N} K=${K} r=${r}`;
const largestBytes = ({ M, N, K }: LoraSizes): number => 4 * Math.max(M * K, N * K, M * N);

/**
 * The forward pass: base product alone, with the low-rank term, and as three products of its own.
 *
 * base 2MNK operations; with LoRA 2r(MK + MN) more.
 */
export function loraForward(sizes: LoraSizes): SizedContest {
  const { M, N, K, r } = sizes;
  const base = { flops: 2 * M * N * K, bytes: 4 * (M * K + N * K + M * N) };
  const flops = base.flops + 2 * r * (M * K + M * N);
  const fused = base.bytes + 4 * (M * K + r * K + M * r) + 4 * (M * r + N * r);
  return {
    name: `LoRA forward ${text(sizes)}`,
    group: "lora-forward",
    against: "LoRA",
    sizes: { ...sizes },
    flops,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const layer = loraLayer(gpu, sizes);
      const [x, W, A, B] = [layer.x.t, layer.W.t, layer.A.t, layer.B.t];
      const check: Case["check"] = (_, element) => layer.y(...split(element, N));
      const threeProducts = (): Tensor => {
        const low = matmul(matmul(x, A, "nt"), B, "nt", { scale: SCALE });
        return sum2(matmul(x, W, "nt"), low);
      };
      return {
        inputs: [x, W, A, B],
        cases: [
          {
            name: "base product alone",
            ...base,
            run: () => ({ y: matmul(x, W, "nt") }),
            check: (_, element) => layer.base(...split(element, N)),
          },
          { name: "LoRA", flops, bytes: fused, run: () => ({ y: loraLinear(x, W, A, B, SCALE) }), check },
          {
            name: "LoRA, three products and a sum",
            flops,
            bytes: fused + 4 * 4 * M * N, // the low-rank product written, two products read, their sum written
            run: () => ({ y: threeProducts() }),
            check,
          },
        ],
        work: { op: "lora-forward", scale: SCALE, ...layer.host },
      };
    },
  };
}

/** What gives the gradients of a node's inputs, for dy. */
function thunksOf({ node }: Tensor, dy: Tensor): (input: Tensor) => Tensor {
  const thunks = node?.vjp(dy) ?? [];
  return (input) => {
    const thunk = thunks[node?.inputs.indexOf(input) ?? -1];
    if (!thunk) throw new Error("bench: loraLinear must have a gradient for x, A and B, got none for one of them");
    return thunk();
  };
}

/**
 * The backward pass of a layer whose forward pass is done: dx alone, as without LoRA, against dx, dA and dB.
 *
 * dx 2MNK operations; with LoRA 4r(MK + MN) more: v, u's part of dx, dA and dB.
 */
export function loraBackward(sizes: LoraSizes): SizedContest {
  const { M, N, K, r } = sizes;
  const product = 4 * (M * N + N * K + M * K);
  const flops = 2 * M * N * K + 4 * r * (M * K + M * N);
  return {
    name: `LoRA backward ${text(sizes)}`,
    group: "lora-backward",
    sizes: { ...sizes },
    flops,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const layer = loraLayer(gpu, sizes);
      const dy = matrixOf(gpu, M, N, 1);
      const [x, W, A, B] = [layer.x.t, layer.W.t, layer.A.t, layer.B.t];
      setTrainable([x, A, B], [W]);
      // The forward pass, once. What it keeps for later lives until the device goes.
      const y = loraLinear(x, W, A, B, SCALE);
      const gradients = (): Record<string, Tensor> => {
        const of = thunksOf(y, dy.t);
        const u = y.node?.inputs[0] as Tensor; // x·Aᵀ, a node of its own, which A hangs on
        const du = of(u);
        return { dx: of(x), dA: thunksOf(u, du)(A), dB: of(B) };
      };
      const expected = gradientsOf(layer, dy, sizes);
      return {
        inputs: [x, W, A, B, dy.t, y],
        cases: [
          {
            name: "dX alone",
            flops: 2 * M * N * K,
            bytes: product,
            run: () => ({ dx: matmul(dy.t, W, "nn") }),
            check: (_, element) => expected.baseDx(...split(element, K)),
          },
          {
            name: "dX, dA and dB",
            flops,
            // dx with its low-rank columns; v and dA; dB
            bytes: product + 4 * r * (M + K) + 4 * (2 * M * N + M * K + r * (2 * N + K + 3 * M)),
            run: gradients,
            check: expected.check,
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
export function loraStep(sizes: LoraSizes): SizedContest {
  const { M, N, K, r } = sizes;
  const product = 4 * (M * K + N * K + M * N); // bytes of y, dx or dW: two operands in, the third matrix out
  const [skinnyK, skinnyN] = [4 * (M * K + r * K + M * r), 4 * (M * N + r * N + M * r)];
  return {
    name: `training step ${text(sizes)}`,
    group: "lora-step",
    against: "LoRA, A and B trained",
    sizes: { ...sizes },
    flops: 6 * M * N * K,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const layer = loraLayer(gpu, sizes);
      const dy = matrixOf(gpu, M, N, 1);
      const [x, W, A, B] = [layer.x.t, layer.W.t, layer.A.t, layer.B.t];
      const full = (): Record<string, Tensor> => {
        setTrainable([x, W], [A, B]);
        const y = matmulOp(x, W, "nt");
        return { y, ...named(backward(y, dy.t), { dx: x, dW: W }) };
      };
      const lora = (): Record<string, Tensor> => {
        setTrainable([x, A, B], [W]);
        const y = loraLinear(x, W, A, B, SCALE);
        return { y, ...named(backward(y, dy.t), { dx: x, dA: A, dB: B }) };
      };
      const expected = gradientsOf(layer, dy, sizes);
      const fullCheck: Record<string, (element: number) => number> = {
        y: (element) => layer.base(...split(element, N)),
        dx: (element) => expected.baseDx(...split(element, K)),
        dW: (element) => {
          const [n, k] = split(element, K);
          return sum(M, (m) => dy.at(m, n) * layer.x.at(m, k));
        },
      };
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
            check: expected.check,
          },
        ],
        work: { op: "lora-step", scale: SCALE, dy: dy.host, ...layer.host },
      };
    },
  };
}

type Layer = ReturnType<typeof loraLayer>;

function loraLayer(gpu: Gpu, { M, N, K, r }: LoraSizes) {
  const [x, W, A, B] = [matrixOf(gpu, M, K, 1), matrixOf(gpu, N, K, K), matrixOf(gpu, r, K, K), matrixOf(gpu, N, r, r)];
  const u = table(M, r, (m, p) => sum(K, (k) => x.at(m, k) * A.at(p, k)));
  const base: Matrix["at"] = (i, j) => sum(K, (k) => x.at(i, k) * W.at(j, k));
  const y: Matrix["at"] = (i, j) => base(i, j) + SCALE * sum(r, (p) => u(i, p) * B.at(j, p));
  return { x, W, A, B, u, base, y, host: { x: x.host, W: W.host, A: A.host, B: B.host } };
}

/** The f64 values of y, dx, dA and dB. */
function gradientsOf(layer: Layer, dy: Matrix, { M, N, K, r }: LoraSizes) {
  const baseDx: Matrix["at"] = (i, k) => sum(N, (n) => dy.at(i, n) * layer.W.at(n, k));
  const v = table(M, r, (m, p) => SCALE * sum(N, (n) => dy.at(m, n) * layer.B.at(n, p)));
  const of: Record<string, (element: number) => number> = {
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
      return SCALE * sum(M, (m) => dy.at(m, n) * layer.u(m, p));
    },
  };
  const check: Case["check"] = (result, element) => of[result]?.(element) ?? Number.NaN;
  return { baseDx, check };
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
