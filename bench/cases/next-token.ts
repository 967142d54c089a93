/** From logits to the next token of each row of a batch. */
import { gatherRows } from "../../src/kernels/gather-rows.ts";
import { TOP } from "../../src/kernels/top-logits.ts";
import { PagedStep } from "../../src/serve/paged-step.ts";
import { Sampler } from "../../src/serve/sampling.ts";
import { Random } from "../../src/tensor/random.ts";
import { tensor } from "../../src/tensor/tensor.ts";
import type { Case } from "../harness.ts";
import type { SizedContest } from "./inputs.ts";

const temperature = 0.7;

/** Whole rows read back and sampled by the host, against the likeliest and the weight of the others found on the device. Rows are normal, σ = 3. */
export function nextToken(N: number, V: number): SizedContest {
  const bytes = 4 * N * V;
  return {
    name: `next token, ${N} rows of ${V}`,
    group: "next-token",
    sizes: { N, V },
    flops: 0,
    largestBytes: bytes,
    setup: (gpu) => {
      const random = new Random(N + V);
      const some = Float32Array.from({ length: Math.min(V * N, 65_537) }, () => random.normal(0, 3));
      const logits = Float32Array.from({ length: N * V }, (_, i) => some[i % some.length] as number);
      const x = tensor(gpu, logits, [N, V]);
      const sizes = { layers: 1, kvHeads: 1, headDim: 4, contextLength: 1, vocabSize: V, eosIds: [] };
      const model = {
        gpu,
        config: sizes,
        pagedLogits: (_: unknown, __: unknown, rows: typeof x) => gatherRows(x, rows),
      };
      const settings = { tokens: N, pageTokens: 1, sequences: N, contextLength: 1, format: "f32" } as const;
      const expected = Array.from({ length: N }, (_, row) => tokenOf(logits.subarray(row * V, (row + 1) * V), row));
      const tokens = expected.map((_, sequence) => ({ id: 0, position: 0, sequence, slot: -1 }));
      const asked = expected.map((_, at) => ({ at, temperature, isWhole: false }));
      const steps: PagedStep[] = [];
      const one = (name: string, by: "host" | "device"): Case => {
        const step = new PagedStep(model, { ...settings, choices: by });
        steps.push(step);
        return {
          ...{ name, flops: 0, bytes },
          run: () => ({}),
          after: async () => {
            const found = await step.choices(tokens, asked);
            const samplers = found.map((_, seed) => new Sampler([], { temperature, seed }));
            const first = found.map((choices, i) => samplers[i]?.next(choices)?.id);
            const late = [...first.keys()].filter((i) => first[i] === undefined);
            const rows = await step.readRows(late);
            late.forEach((i, n) => {
              const choices = { ...found[i], row: rows[n] } as (typeof found)[number];
              first[i] = samplers[i]?.next(choices)?.id;
            });
            if (`${first}` !== `${expected}`) throw new Error(`${name}: tokens must be ${expected}, got ${first}`);
          },
          check: () => Number.NaN,
        };
      };
      return {
        inputs: [x],
        cases: [one("rows read back", "host"), one("choices of the device", "device")],
        dispose: () => {
          for (const step of steps) step.destroy();
        },
      };
    },
  };
}

/** The token that the first number of a seed gives: along the TOP likeliest, then along the others by id. */
function tokenOf(row: Float32Array, seed: number): number {
  const sorted = [...row.keys()].sort((a, b) => Number(row[b]) - Number(row[a]) || a - b);
  const order = [...sorted.slice(0, TOP), ...sorted.slice(TOP).sort((a, b) => a - b)];
  const weights = order.map((id) => Math.exp((Number(row[id]) - Number(row[order[0] as number])) / temperature));
  let place = new Random(seed).uniform() * weights.reduce((a, b) => a + b, 0);
  return order[
    weights.findIndex((weight) => {
      place -= weight;
      return place < 0;
    })
  ] as number;
}
