// Tokens chosen from the likeliest of a row and the weight of the others, against a sampler in plain f64 that has the row.
import { describe, expect, test } from "vitest";
import { TOP } from "../../src/kernels/top-logits.ts";
import { choicesOf, type RowChoices } from "../../src/serve/row-choices.ts";
import { Sampler, type SamplingOptions, type TokenConstraint } from "../../src/serve/sampling.ts";
import { Random } from "../../src/tensor/random.ts";
import { freshSeed } from "../harness.ts";

type Allows = (id: number) => boolean;

/** The id that the options give for a row, `drawn` the numbers in [0, 1) in their order. */
function reference(
  row: Float32Array,
  options: SamplingOptions,
  { prompt, answer, allows, drawn }: { prompt: number[]; answer: number[]; allows: Allows; drawn: () => number },
): number {
  const { temperature = 0, topK = row.length, topP = 1, minP = 0, repetitionPenalty = 1 } = options;
  const { presencePenalty = 0, frequencyPenalty = 0, logitBias } = options;
  const changed = Array.from(row, (logit, id) => {
    const count = answer.filter((one) => one === id).length;
    const isSeen = count > 0 || prompt.includes(id);
    const first = !isSeen ? logit : logit > 0 ? logit / repetitionPenalty : logit * repetitionPenalty;
    return first - (count > 0 ? presencePenalty : 0) - count * frequencyPenalty + (logitBias?.get(id) ?? 0);
  });
  const logitOf = (id: number): number => changed[id] as number;
  const sorted = [...changed.keys()].sort((a, b) => logitOf(b) - logitOf(a) || a - b);
  if (temperature === 0) return sorted.find(allows) as number;
  const inOrder = (ids: readonly number[], head: readonly number[]): number[] => [
    ...head.filter((id) => ids.includes(id)),
    ...ids.filter((id) => !head.includes(id)).sort((a, b) => a - b),
  ];
  const weigh = (ids: readonly number[]): Map<number, number> => {
    const most = Math.max(...ids.map(logitOf));
    return new Map(ids.map((id) => [id, Math.exp((logitOf(id) - most) / temperature)]));
  };
  const total = (weights: Iterable<number>): number => [...weights].reduce((a, b) => a + b, 0);
  const leave = (ids: readonly number[]): Map<number, number> => {
    let left = sorted.filter((id) => ids.includes(id));
    const head = left.slice(0, TOP);
    const least = logitOf(left[Math.min(topK, left.length) - 1] as number);
    left = left.filter((id) => logitOf(id) >= least);
    const weights = weigh(left);
    const all = total(weights.values());
    let mass = 0;
    const isInside = (id: number): boolean => {
      const before = mass;
      mass += weights.get(id) as number;
      return before < topP * all;
    };
    if (topP < 1) left = left.filter(isInside);
    left = left.filter((id) => (weights.get(id) as number) >= minP);
    return weigh(inOrder(left, head));
  };
  const draw = (weights: ReadonlyMap<number, number>): number => {
    let place = drawn() * total(weights.values());
    for (const [id, weight] of weights) {
      place -= weight;
      if (place < 0) return id;
    }
    throw new Error("a place is within the total");
  };
  let left = leave(sorted);
  for (let refused = 0; refused < 8 && left.size > 0; refused++) {
    const id = draw(left);
    if (allows(id)) return id;
    left = new Map([...left].filter(([one]) => one !== id));
  }
  left = new Map([...left].filter(([id]) => allows(id)));
  return draw(left.size > 0 ? left : leave(sorted.filter(allows)));
}

const withoutRow = ({ row: _, ...choices }: RowChoices): RowChoices => choices;

const SETTINGS: (SamplingOptions & { readonly needs: "never" | "seldom" | "often" | "always" })[] = [
  { needs: "never" },
  { needs: "seldom", temperature: 0.5 },
  { needs: "often", temperature: 1.5 },
  { needs: "never", temperature: 1, topK: 1 },
  { needs: "never", temperature: 3, topK: 50 },
  { needs: "never", temperature: 1, topK: 20, topP: 0.9, minP: 0.02 },
  { needs: "always", temperature: 1, topK: TOP },
  { needs: "always", temperature: 1, topK: 100 },
  { needs: "seldom", temperature: 0.7, topP: 0.6 },
  { needs: "always", temperature: 2, topP: 0.999 },
  { needs: "seldom", temperature: 1, minP: 0.1 },
  { needs: "always", temperature: 2, minP: 1e-9 },
  { needs: "never", repetitionPenalty: 1.3 },
  { needs: "never", frequencyPenalty: 0.4, presencePenalty: 0.3 },
  { needs: "seldom", temperature: 1, topK: 20, repetitionPenalty: 1.2 },
  { needs: "always", temperature: 1, presencePenalty: 0.5 },
  { needs: "never", logitBias: new Map([[3, -100]]) },
  { needs: "always", logitBias: new Map([[3, 2]]) },
  { needs: "always", temperature: 1, topK: 5, repetitionPenalty: 0.8 },
  { needs: "always", frequencyPenalty: -0.5 },
];

const unchanging = (allows: Allows): TokenConstraint => ({
  ...{ allows, accept: () => {}, mayEnd: false, isDone: false },
  fork: () => unchanging(allows),
});

describe.each(SETTINGS)("%j", ({ needs, ...options }) => {
  test.each([false, true])(
    "the same token with the row, without it, and in plain f64; constrained: %j",
    (isConstrained) => {
      const seed = freshSeed();
      const random = new Random(seed);
      let [asked, again] = [0, 0];
      for (let n = 0; n < 60; n++) {
        const V = [20, TOP, TOP + 1, 300, 300, 300][n % 6] as number;
        const prompt = [1, 2, random.below(V)];
        const among = new Set([0, 7, ...Array.from({ length: V / 4 }, () => random.below(V))]);
        const allows: Allows = isConstrained ? (id) => among.has(id) : () => true;
        const constraint = isConstrained ? unchanging(allows) : undefined;
        const ownSeed = random.uint32();
        const [plain, early, late] = [new Random(ownSeed), 0, 0].map((one) =>
          one instanceof Random ? one : new Sampler(prompt, { ...options, constraint, seed: ownSeed }),
        ) as [Random, Sampler, Sampler];
        const answer: number[] = [];
        const levels = n % 7 === 0 ? 2 : 1e6; // few: many are equal
        for (let step = 0; step < 5; step++) {
          const row = Float32Array.from({ length: V }, () => Math.round(random.normal(0, 3) * levels) / levels);
          const choices = choicesOf(row, late.temperature);
          const expected = reference(row, options, { prompt, answer, allows, drawn: () => plain.uniform() });
          const given = early.next(choices, 3);
          let token = late.next(withoutRow(choices), 3);
          if (V === 300 && levels > 2) {
            asked++;
            if (!token) again++;
            if (late.needsRow(3))
              expect(token, `what needs its row has no token without it (seed ${seed})`).toBe(undefined);
          }
          token ??= late.next(choices, 3);
          expect([given?.id, token?.id], `row ${n}, step ${step} (seed ${seed})`).toEqual([expected, expected]);
          expect(token).toEqual(given);
          answer.push(expected);
        }
      }
      const share = again / asked;
      const most = { never: 0, seldom: 0.2, often: 1, always: 1 }[needs];
      if (!isConstrained) expect(share, `whole rows of ${asked} (seed ${seed})`).toBeLessThanOrEqual(most);
      if (!isConstrained && needs === "always")
        expect(share, `whole rows of ${asked} (seed ${seed})`).toBeGreaterThan(0.9);
    },
  );
});

test("draws from a flat row are spread as its softmax over the first tokens and the others", () => {
  const random = new Random(11);
  const row = Float32Array.from({ length: 400 }, () => random.normal(0, 1));
  const choices = choicesOf(row, 1.3);
  const sampler = new Sampler([], { temperature: 1.3, seed: 12 });
  const counts = new Float64Array(row.length);
  const draws = 40_000;
  let again = 0;
  for (let n = 0; n < draws; n++) {
    let token = sampler.next(withoutRow(choices));
    if (!token) again++;
    token ??= sampler.next(choices);
    const id = token?.id ?? -1;
    counts[id] = (counts[id] ?? 0) + 1;
  }
  const weights = Array.from(row, (x) => Math.exp(x / 1.3));
  const total = weights.reduce((a, b) => a + b, 0);
  const expected = weights.map((weight) => (draws * weight) / total);
  const outside = expected.reduce((sum, n, id) => (choices.ids.includes(id) ? sum : sum + n), 0);
  expect(Math.abs(again - outside)).toBeLessThanOrEqual(5 * Math.sqrt(draws / 4));
  const chi = expected.reduce((sum, n, id) => sum + ((counts[id] as number) - n) ** 2 / n, 0);
  expect(Math.abs(chi - 399) / Math.sqrt(2 * 399)).toBeLessThanOrEqual(4);
});
