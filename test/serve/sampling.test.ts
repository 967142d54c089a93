import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { Sampler, type SamplingOptions } from "../../src/serve/sampling.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { expectClose, freshSeed } from "../harness.ts";
import { nextOf } from "./next-of.ts";

const golden = JSON.parse(readFileSync("test/golden/sampling.json", "utf8")) as {
  prompt: number[];
  logits: number[];
  log_softmax: number[];
  cases: { settings: SamplingOptions; probabilities: number[] }[];
};
const logits = Float32Array.from(golden.logits);
const DRAWS = 4000;

describe("sampling", () => {
  test.each(golden.cases)(
    "draws as often as transformers' processors say: $settings",
    ({ settings, probabilities }) => {
      const seed = freshSeed();
      const counts = new Float64Array(logits.length);
      for (let i = 0; i < DRAWS; i++) {
        const { id } = nextOf(new Sampler(golden.prompt, { ...settings, seed: seed + i }), logits);
        counts[id] = (counts[id] ?? 0) + 1;
      }
      for (const [id, p] of probabilities.entries()) {
        const share = (counts[id] ?? 0) / DRAWS;
        if (p === 0) expect(share, `token ${id} is left out (seed ${seed})`).toBe(0);
        else
          expect(Math.abs(share - p), `token ${id} (seed ${seed})`).toBeLessThanOrEqual(
            6 * Math.sqrt((p * (1 - p)) / DRAWS) + 4 / DRAWS,
          );
      }
    },
  );

  test("says what the model thought of a token, whatever was done to the logits, and of the likeliest ones", () => {
    const sampler = new Sampler(golden.prompt, { temperature: 2, seed: 4, logitBias: new Map([[5, 100]]) });
    const { id, logprob, top } = nextOf(sampler, logits, 3);
    expect(id).toBe(5);
    expectClose([logprob], [golden.log_softmax[5] ?? 0], 1e-6);
    const order = golden.log_softmax
      .map((value, one) => ({ id: one, logprob: value }))
      .toSorted((a, b) => b.logprob - a.logprob);
    expect(top.map((one) => one.id)).toEqual(order.slice(0, 3).map((one) => one.id));
    expectClose(
      top.map((one) => one.logprob),
      order.slice(0, 3).map((one) => one.logprob),
      1e-6,
    );
  });

  test("takes presence once and frequency each time from the logits of what the answer has", () => {
    const flat = Float32Array.of(3, 2.5, 2.2, 0);
    const draw = (options: SamplingOptions, n: number): number[] => {
      const sampler = new Sampler([0, 0, 0], options);
      return Array.from({ length: n }, () => nextOf(sampler, flat).id);
    };
    expect(draw({}, 3)).toEqual([0, 0, 0]);
    expect(draw({ presencePenalty: 0.6 }, 4)).toEqual([0, 1, 0, 0]); // 2.4, then 1.9: after that both have paid
    expect(draw({ frequencyPenalty: 0.6 }, 5)).toEqual([0, 1, 0, 2, 1]);
    expect(draw({ repetitionPenalty: 1.3 }, 2)).toEqual([1, 0]); // the prompt has 0: 2.31; then 1 has 1.92
    expect(draw({ logitBias: new Map([[3, 4]]) }, 1)).toEqual([3]);
  });

  test("of the smallest shares leaves the likeliest token", () => {
    const random = new Random(freshSeed());
    const values = Float32Array.from({ length: 50 }, () => random.normal(0, 3));
    const best = values.indexOf(Math.max(...values));
    for (const options of [{ topK: 1 }, { topP: 1e-9 }, { minP: 1 }, { temperature: 1e-6 }])
      expect(nextOf(new Sampler([], { temperature: 1, ...options, seed: random.uint32() }), values).id).toBe(best);
  });

  test("refuses settings out of range", () => {
    for (const [options, message] of [
      [{ temperature: -1 }, "generate: temperature must be a number of at least 0, got -1"],
      [{ topK: 0 }, "generate: topK must be a whole number of at least 1, got 0"],
      [{ topP: 0 }, "generate: topP must be a number above 0 and at most 1, got 0"],
      [{ minP: 2 }, "generate: minP must be a number from 0 to 1, got 2"],
      [{ repetitionPenalty: 0 }, "generate: repetitionPenalty must be a number above 0, got 0"],
      [{ presencePenalty: Number.NaN }, "generate: presencePenalty must be a finite number, got NaN"],
      [
        { frequencyPenalty: Number.POSITIVE_INFINITY },
        "generate: frequencyPenalty must be a finite number, got Infinity",
      ],
    ] as const)
      expect(() => new Sampler([], options)).toThrow(new ShapeError(message));
  });
});
