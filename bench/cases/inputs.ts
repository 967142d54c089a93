/** Operands: random, the same in every run, on the device and on the host. */
import type { Gpu } from "../../src/gpu/gpu.ts";
import { Random } from "../../src/tensor/random.ts";
import { type Tensor, tensor } from "../../src/tensor/tensor.ts";
import type { Contest } from "../harness.ts";
import type { HostMatrix } from "../peers/peer.ts";

/** A contest that says beforehand what it takes, so that a device which cannot run it need not try. */
export interface SizedContest extends Contest {
  /** Operations of its longest case. */
  readonly flops: number;
  /** Bytes of its largest operand or result. */
  readonly largestBytes: number;
  /** It needs a device opened with `matrixUnits`. */
  readonly matrixUnits?: boolean;
  /** What the device lacks for it, in words; undefined if nothing. */
  readonly unmet?: (gpu: Gpu) => string | undefined;
}

/** A matrix on the device, the same on the host, and its elements for the f64 reference. */
export interface Matrix {
  readonly t: Tensor;
  readonly host: HostMatrix;
  readonly at: (row: number, column: number) => number;
}

const PERIOD = 65_537; // prime: rows do not repeat each other

/** Normal values of variance 1 / fanIn, so that products stay near 1. */
export function matrixOf(gpu: Gpu, rows: number, columns: number, fanIn: number): Matrix {
  const values = new Float32Array(rows * columns);
  const random = new Random(20_250_101, rows * 31 + columns + fanIn);
  const distinct = Math.min(values.length, PERIOD);
  for (let i = 0; i < distinct; i++) values[i] = random.normal(0, 1 / Math.sqrt(fanIn));
  // Drawing numbers is slow: large matrices repeat the first ones.
  for (let done = distinct; done < values.length; done += distinct)
    values.set(values.subarray(0, Math.min(distinct, values.length - done)), done);
  return {
    t: tensor(gpu, values, [rows, columns]),
    host: { rows, columns, values },
    at: (row, column) => values[row * columns + column] ?? Number.NaN,
  };
}

export const vectorOf = (gpu: Gpu, size: number): Matrix => matrixOf(gpu, 1, size, 1);

export function sum(n: number, term: (k: number) => number): number {
  let total = 0;
  for (let k = 0; k < n; k++) total += term(k);
  return total;
}

export const split = (element: number, columns: number): [row: number, column: number] => [
  Math.floor(element / columns),
  element % columns,
];
