import { expect, test } from "vitest";
import { stepInF64 } from "../../bench/cases/llama-f64.ts";
import type { HostMatrix, LlamaStep } from "../../bench/peers/peer.ts";
import { Random } from "../../src/tensor/random.ts";

/** One layer of 8 with 2 heads of 4 that share one key and value head, 5 tokens of 7 words. */
function small(): LlamaStep {
  const random = new Random(3);
  const matrix = (rows: number, columns: number): HostMatrix => ({
    rows,
    columns,
    values: Float32Array.from({ length: rows * columns }, () => random.normal(0, 0.5)),
  });
  const layers = { q: [8, 8], k: [4, 8], v: [4, 8], o: [8, 8] } as const;
  const mlp = { gate: [6, 8], up: [6, 8], down: [8, 6] } as const;
  const linears = [
    ...Object.entries(layers).map(([name, shape]) => [`model.layers.0.self_attn.${name}_proj`, shape] as const),
    ...Object.entries(mlp).map(([name, shape]) => [`model.layers.0.mlp.${name}_proj`, shape] as const),
  ];
  const norms = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"];
  const weights = new Map<string, HostMatrix>([
    ["model.embed_tokens.weight", matrix(7, 8)],
    ...norms.map((name) => [`${name}.weight`, matrix(1, 8)] as const),
    ...linears.map(([name, [N, K]]) => [`${name}.weight`, matrix(N, K)] as const),
  ]);
  const adapter = new Map(linears.map(([name, [N, K]]) => [name, { A: matrix(2, K), B: matrix(N, 2) }] as const));
  const angles = (f: (x: number) => number): HostMatrix => ({
    rows: 5,
    columns: 2,
    values: Float32Array.from({ length: 10 }, (_, i) => f(Math.floor(i / 2) / (1 + (i % 2)))),
  });
  return {
    ...{ layers: 1, heads: 2, kvHeads: 1, headDim: 4, rmsNormEps: 1e-5, scale: 2, gradients: new Map() },
    ...{ weights, adapter, ids: Int32Array.of(3, 1, 4, 1, 6), cos: angles(Math.cos), sin: angles(Math.sin) },
    adamw: { learningRate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 },
  };
}

/** The same with magnitudes, and norms that are constants to the gradient. */
function smallDora(): LlamaStep {
  const step = small();
  const random = new Random(4);
  const positive = (n: number) => Float32Array.from({ length: n }, () => random.uniform(0.5, 1.5));
  const adapter = new Map(
    [...step.adapter].map(([name, { A, B }]) => {
      const m = { rows: 1, columns: B.rows, values: positive(B.rows) };
      return [name, { A, B, magnitude: { m, norms: Float64Array.from(positive(B.rows)) } }] as const;
    }),
  );
  return { ...step, adapter };
}

test.each([
  ["adapter", "adapter", small()],
  ["adapter with magnitudes", "adapter", smallDora()],
  ["weights", "weights", small()],
] as const)("the f64 step's gradients are its differences, %s trained", (_, trained, step) => {
  const { gradients } = stepInF64(step, trained);
  const trainable = new Map<string, HostMatrix>(
    trained === "weights"
      ? step.weights
      : [...step.adapter].flatMap(([name, { A, B, magnitude }]) => [
          [`A of ${name}`, A] as const,
          [`B of ${name}`, B] as const,
          ...(magnitude ? [[`m of ${name}`, magnitude.m] as const] : []),
        ]),
  );
  expect(new Set(gradients.keys())).toEqual(new Set(trainable.keys()));
  for (const [name, { values }] of trainable)
    for (const element of [0, values.length >> 1, values.length - 1]) {
      const before = values[element] ?? 0;
      const lossAt = (value: number): [at: number, loss: number] => {
        values[element] = value;
        return [values[element] ?? 0, stepInF64(step, trained).loss];
      };
      const [high, above] = lossAt(before + 2 ** -12);
      const [low, below] = lossAt(before - 2 ** -12);
      values[element] = before;
      const difference = (above - below) / (high - low);
      const gradient = gradients.get(name)?.[element] ?? Number.NaN;
      expect(Math.abs(gradient - difference), `${name}[${element}]`).toBeLessThanOrEqual(
        1e-5 * (1 + Math.abs(gradient)),
      );
    }
});
