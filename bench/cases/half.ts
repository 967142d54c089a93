/** Half precision: f16 arithmetic and matrix units against f32, y = x·Wᵀ with W [n,n] stored in f16. */
import type { Gpu } from "../../src/gpu/gpu.ts";
import { matmul } from "../../src/kernels/matmul.ts";
import { type MatmulPlan, plans } from "../../src/kernels/matmul-plans.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { Random } from "../../src/tensor/random.ts";
import { tensor } from "../../src/tensor/tensor.ts";
import { type SizedContest, split, sum } from "./inputs.ts";

/** Operands staged and multiplied in f16, summed in f32. */
export const halfArithmetic = (n: number): SizedContest => ({
  ...contest("f16 arithmetic", n, (gpu) =>
    plansOf(gpu, n)
      .filter(({ family }) => family === "tiled")
      .slice(0, 1)
      .map((plan) => ({ ...plan, half: true })),
  ),
  unmet: (gpu) => (gpu.features.has("shader-f16") ? undefined : "this device has no shader-f16"),
});

/** Runs on a device of its own, opened with `matrixUnits`, so that the other contests stay f32. */
export const matrixUnits = (n: number): SizedContest => ({
  ...contest("matrix units", n, (gpu) => unitsOf(gpu, n)),
  matrixUnits: true,
  unmet: (gpu) => {
    if (!gpu.features.has("chromium-experimental-subgroup-matrix"))
      return "this device has no chromium-experimental-subgroup-matrix";
    if (unitsOf(gpu, n).length === 0) return "no matrix units here take f16 and sum in f32 in tiles that fit";
    return undefined;
  },
});

/** x and W hold −c, 0 and c, c a power of two: f16 holds them and their products exactly, so the results can be checked closely. */
function contest(what: string, n: number, tried: (gpu: Gpu) => readonly MatmulPlan[]): SizedContest {
  const flops = 2 * n ** 3;
  return {
    name: `${what} ${n}³`,
    group: "half",
    sizes: { layout: "nt", M: n, N: n, K: n },
    flops,
    largestBytes: 4 * n * n,
    setup: (gpu) => {
      const random = new Random(11);
      const draw = (c: number): Float32Array => {
        const period = Float32Array.from({ length: 65_537 }, () => c * (random.below(3) - 1));
        return Float32Array.from({ length: n * n }, (_, i) => period[i % period.length] ?? 0);
      };
      const [left, right] = [draw(1), draw(2 ** -Math.round(Math.log2(n) / 2))];
      const x = tensor(gpu, left, [n, n]);
      const w = packMatrix(gpu, right, [n, n], "f16");
      const by = (plan: MatmulPlan) => ({
        name: plan.half ? `${plan.name}, f16` : plan.name,
        flops,
        bytes: (4 + 2 + 4) * n * n,
        run: () => ({ y: matmul(x, w, "nt", { plan }) }),
        check: (_: string, element: number): number => {
          const [i, j] = split(element, n);
          return sum(n, (k) => (left[i * n + k] ?? Number.NaN) * (right[j * n + k] ?? Number.NaN));
        },
      });
      const inF32 = plansOf(gpu, n).filter(({ family }) => family !== "units");
      return { inputs: [x, w.words], cases: [...inF32.slice(0, 1), ...tried(gpu)].map(by) };
    },
  };
}

/** The default first. */
function plansOf(gpu: Gpu, n: number): readonly MatmulPlan[] {
  return plans(gpu, { layout: "nt", M: n, N: n, K: n, R: 0, batch: 1, format: "f16" });
}

const unitsOf = (gpu: Gpu, n: number): MatmulPlan[] => plansOf(gpu, n).filter(({ family }) => family === "units");
