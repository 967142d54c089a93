/** Frozen weights by the way they are stored: y = x·Wᵀ, W [N,K] widened as it is read. f16 is the baseline. */
import { matmul } from "../../src/kernels/matmul.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { Random } from "../../src/tensor/random.ts";
import { tensor } from "../../src/tensor/tensor.ts";
import { matrixOf, type SizedContest, split, sum } from "./inputs.ts";

const FORMATS = ["f16", "bf16", "int8", "nf4"] as const;
/** Bytes of an element, scales included: a row's for int8, 64 elements' for nf4. */
const BYTES = { f32: 4, f16: 2, bf16: 2, int8: 1, nf4: 0.5 + 4 / 64 } as const;

/** W has the values −c, 0 and c, c a power of two, which every format holds exactly: so all have one result, and it can be checked. */
export function weightFormats(M: number, K: number, N: number): SizedContest {
  const flops = 2 * M * N * K;
  return {
    name: `weights M=${M} K=${K} N=${N}`,
    group: "weights",
    sizes: { M, N, K },
    flops,
    largestBytes: 4 * Math.max(M * K, N * K, M * N),
    setup: (gpu) => {
      const x = matrixOf(gpu, M, K, 1);
      const c = 2 ** -Math.round(Math.log2(K) / 2);
      const random = new Random(5);
      const period = Float32Array.from({ length: 65_537 }, () => c * (random.below(3) - 1));
      const values = Float32Array.from({ length: N * K }, (_, i) => period[i % period.length] ?? 0);
      const check = (_: string, element: number): number => {
        const [i, j] = split(element, N);
        return sum(K, (k) => x.at(i, k) * (values[j * K + k] ?? Number.NaN));
      };
      const packed = FORMATS.map((format) => packMatrix(gpu, values, [N, K], format));
      const wide = tensor(gpu, values, [N, K]);
      const of = (name: keyof typeof BYTES, w: Parameters<typeof matmul>[1]) => ({
        name,
        flops,
        bytes: 4 * (M * K + M * N) + BYTES[name] * N * K,
        run: () => ({ y: matmul(x.t, w, "nt") }),
        check,
      });
      return {
        inputs: [x.t, wide, ...packed.flatMap(({ words, scales }) => [words, ...(scales ? [scales] : [])])],
        cases: [...packed.map((w) => of(w.format, w)), of("f32", wide)],
      };
    },
  };
}
