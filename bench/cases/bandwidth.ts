/** Work that memory bounds: elementwise and reductions. One addition per element, not counted. */
import { binary } from "../../src/kernels/binary.ts";
import { reduce } from "../../src/kernels/reduce.ts";
import { matrixOf, type SizedContest, sum } from "./inputs.ts";

/** y = x + z, 12 bytes per element. */
export function addition(rows: number, columns: number): SizedContest {
  return {
    name: `add ${rows}×${columns}`,
    group: "bandwidth",
    against: "lowrank",
    sizes: { rows, columns },
    flops: 0,
    largestBytes: 4 * rows * columns,
    setup: (gpu) => {
      const [x, z] = [matrixOf(gpu, rows, columns, 1), matrixOf(gpu, rows, columns, 2)];
      return {
        inputs: [x.t, z.t],
        cases: [
          {
            name: "lowrank",
            flops: 0,
            bytes: 3 * 4 * rows * columns,
            run: () => ({ y: binary("add", x.t, z.t) }),
            check: (_, element) => x.at(0, element) + z.at(0, element),
          },
        ],
        work: { op: "add", x: x.host, z: z.host },
      };
    },
  };
}

/** y [rows], the sum of each row; 4 bytes per element. */
export function rowSum(rows: number, columns: number): SizedContest {
  return {
    name: `row sum ${rows}×${columns}`,
    group: "bandwidth",
    against: "lowrank",
    sizes: { rows, columns },
    flops: 0,
    largestBytes: 4 * rows * columns,
    setup: (gpu) => {
      const x = matrixOf(gpu, rows, columns, columns);
      return {
        inputs: [x.t],
        cases: [
          {
            name: "lowrank",
            flops: 0,
            bytes: 4 * (rows * columns + rows),
            run: () => ({ y: reduce("sum", x.t, -1) }),
            check: (_, element) => sum(columns, (k) => x.at(element, k)),
          },
        ],
        work: { op: "row-sum", x: x.host },
      };
    },
  };
}
