// Which plans a device that is not here would take: by its limits, without running them.
import { describe, expect, test } from "vitest";
import { MAX_GROUPS } from "../../src/gpu/kernel.ts";
import { defaultPlan, type MatmulPlan, type MatmulShape, plans, suits } from "../../src/kernels/matmul-plans.ts";
import { Recorder } from "./recorder.ts";

const shapeOf = (some: Partial<MatmulShape>): MatmulShape => ({
  ...{ layout: "nt", M: 1, N: 2048, K: 2048, R: 0, batch: 1, format: "f32" },
  ...some,
});

describe.each([false, true])("on a software adapter: %s", (isSoftware) => {
  const gpu = new Recorder({ isSoftware, features: ["subgroups"] });
  const all = (shape: MatmulShape): readonly MatmulPlan[] => [defaultPlan(gpu, shape), ...plans(gpu, shape)];

  test("products in batches are never made by the kernel that knows none", () => {
    for (const layout of ["nn", "nt", "tn"] as const)
      for (let M = 1; M <= 17; M++) {
        const shape = shapeOf({ layout, M, N: 12, K: 16, batch: 3 });
        for (const plan of all(shape)) {
          expect(plan.family, `${layout}, M = ${M}`).not.toBe("rows");
          expect(suits(plan, shape)).toBe(true);
        }
      }
    const [plan] = all(shapeOf({ M: 2 }));
    expect(plan?.family).toBe("rows");
    expect(suits(plan as MatmulPlan, shapeOf({ M: 2, batch: 2 })), "nor where it was tuned for one").toBe(false);
  });

  test("few rows take no more workgroups than an axis has, and no more memory than any device has", () => {
    for (const format of ["f32", "nf4"] as const)
      for (const N of [5, 151_936, 262_144, 262_208, 1_000_000])
        for (let M = 1; M <= 16; M++)
          for (const { family, tuned } of all(shapeOf({ M, N, format }))) {
            if (family !== "rows") continue;
            const { TM = 0, TN = 0, WG = 0 } = tuned;
            expect(Math.ceil(N / TN)).toBeLessThanOrEqual(MAX_GROUPS);
            expect(4 * TM * TN * WG + (format === "nf4" ? 4 * 16 : 0)).toBeLessThanOrEqual(16_384);
            expect(TM).toBeGreaterThanOrEqual(M);
          }
  });
});
