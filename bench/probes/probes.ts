/** What this device can do at most, found out by two small kernels before anything else is measured. */
import { defineKernel } from "../../src/gpu/kernel.ts";
import { empty } from "../../src/tensor/tensor.ts";
import { sum, vectorOf } from "../cases/inputs.ts";
import type { CaseReport, Contest, Peaks } from "../harness.ts";
import copySource from "./copy.wgsl";
import fmaSource from "./fma-peak.wgsl";

const fma = defineKernel("fma-peak", fmaSource);
const copy = defineKernel("copy", copySource);

const STEPS = 512;
const [A, B] = [1 - 1 / 256, 1 / 512]; // every chain tends to b / (1 − a) = 1/2

export interface Effort {
  readonly isSoftware: boolean;
  readonly quick: boolean;
  /** No operand may be larger. */
  readonly maxBytes: number;
}

/** The probes, as contests of the best way to do nothing but compute and nothing but copy. */
export function probes({ isSoftware, quick, maxBytes }: Effort): { fmaPeak: Contest; copyBandwidth: Contest } {
  const threads = quick ? 2 ** 8 : isSoftware ? 2 ** 12 : 2 ** 20;
  const mebibytes = quick ? 4 : isSoftware ? 64 : 256;
  return { fmaPeak: fmaPeak(threads), copyBandwidth: copyBandwidth(Math.min(mebibytes * 2 ** 20, maxBytes)) };
}

/** The best rates of the two contests. */
export function peaksOf(fmaCases: readonly CaseReport[], copyCases: readonly CaseReport[]): Peaks {
  const best = (cases: readonly CaseReport[], rate: "gflops" | "gbs"): number =>
    Math.max(...cases.flatMap((one) => ("error" in one ? [] : [one[rate]])));
  return { fmaGflops: best(fmaCases, "gflops"), copyGbs: best(copyCases, "gbs") };
}

function fmaPeak(threads: number): Contest {
  const variants = [8, 4, 2].flatMap((CHAINS) => [1, 0].map((FUSED) => ({ CHAINS, FUSED })));
  return {
    name: "probe FMA peak",
    group: "probe",
    sizes: { threads },
    setup: (gpu) => ({
      inputs: [],
      cases: variants.map(({ CHAINS, FUSED }) => ({
        name: `${CHAINS} chains of vec4, ${FUSED ? "fma(a, x, b)" : "a·x + b"}`,
        flops: 8 * CHAINS * STEPS * threads,
        bytes: 4 * threads,
        run: () => {
          const y = empty(gpu, [threads], "fma-peak");
          fma(gpu, { n: threads, N: STEPS, a: A, b: B }, { y }, [threads], { CHAINS, FUSED });
          return { y };
        },
        check: (_, thread) => {
          const left = A ** STEPS;
          return sum(4 * CHAINS, (c) => left * ((c + 1) / 64 + (thread % 256) / 256) + ((1 - left) * B) / (1 - A));
        },
      })),
    }),
  };
}

function copyBandwidth(bytes: number): Contest {
  const size = Math.floor(bytes / 16) * 4;
  return {
    name: "probe copy bandwidth",
    group: "probe",
    sizes: { bytes: 4 * size },
    setup: (gpu) => {
      const x = vectorOf(gpu, size);
      return {
        inputs: [x.t],
        cases: [1, 4, 16].map((PER_THREAD) => ({
          name: `${PER_THREAD} vec4 per thread`,
          flops: 0,
          bytes: 2 * 4 * size,
          run: () => {
            const y = empty(gpu, [size], "copy");
            const n = size / 4;
            copy(gpu, { n }, { x: x.t, y }, [Math.ceil(n / PER_THREAD)], { PER_THREAD });
            return { y };
          },
          check: (_, element) => x.at(0, element),
        })),
      };
    },
  };
}
