/** Products of matrices: the shipped kernel against the peers'. Row-major f32. */
import { type Layout, matmul } from "../../src/kernels/matmul.ts";
import { matrixOf, type SizedContest, split, sum } from "./inputs.ts";

export const LAYOUTS: readonly Layout[] = ["nn", "nt", "tn"];

interface Sizes {
  readonly M: number;
  readonly N: number;
  readonly K: number;
}

export const square = (layout: Layout, n: number): SizedContest =>
  product(`matmul ${layout} ${n}³`, "matmul", layout, { M: n, N: n, K: n });

/** A linear layer of a transformer: y = x·Wᵀ with W [N,K], as checkpoints store it. */
export const linear = (M: number, K: number, N: number): SizedContest =>
  product(`linear M=${M} K=${K} N=${N}`, "transformer", "nt", { M, N, K });

/** y [M,N], 2MNK operations. */
function product(name: string, group: string, layout: Layout, { M, N, K }: Sizes): SizedContest {
  const flops = 2 * M * N * K;
  return {
    name,
    group,
    against: "lowrank",
    sizes: { layout, M, N, K },
    flops,
    largestBytes: 4 * Math.max(M * K, N * K, M * N),
    setup: (gpu) => {
      const x = layout === "tn" ? matrixOf(gpu, K, M, 1) : matrixOf(gpu, M, K, 1);
      const w = layout === "nt" ? matrixOf(gpu, N, K, K) : matrixOf(gpu, K, N, K);
      return {
        inputs: [x.t, w.t],
        cases: [
          {
            name: "lowrank",
            flops,
            bytes: 4 * (M * K + N * K + M * N),
            run: () => ({ y: matmul(x.t, w.t, layout) }),
            check: (_, element) => {
              const [i, j] = split(element, N);
              return sum(
                K,
                (k) => (layout === "tn" ? x.at(k, i) : x.at(i, k)) * (layout === "nt" ? w.at(j, k) : w.at(k, j)),
              );
            },
          },
        ],
        work: { op: "matmul", layout, x: x.host, w: w.host },
      };
    },
  };
}
