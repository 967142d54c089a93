/** The work of a Llama's training step, with its f64 values: what the contests of steps are made of. */
import { decodeFloats, encodeFloats } from "../../src/io/dtype.ts";
import type { DecoderConfig } from "../../src/models/decoder-config.ts";
import { weightShapes } from "../../src/models/load.ts";
import { inverseFrequencies } from "../../src/nn/rope.ts";
import { Random } from "../../src/tensor/random.ts";
import type { DoraMagnitude, HostMatrix, LlamaPair, LlamaStep } from "../peers/peer.ts";
import { type StepValues, stepInF64 } from "./llama-f64.ts";

export interface StepSizes {
  readonly layers: number;
  readonly hidden: number;
  readonly inside: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly vocab: number;
  /** Tokens of the one row. */
  readonly T: number;
  /** Rank of every pair. */
  readonly r: number;
}

/** What is trained, and how the weights of the linear layers are stored: as f32 unless given. */
export interface StepKind {
  readonly trained: "adapter" | "dora" | "weights";
  readonly stored?: "f16" | "nf4";
}

/** s */
export const SCALE = 2;
export const ADAMW = { learningRate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
const ROPE = { type: "default", theta: 10_000 } as const;

export interface Known {
  readonly work: LlamaStep;
  readonly expected: StepValues;
}

/** Seconds of arithmetic in f64, which the tuner and the benchmark need not both wait for. */
const cache = new Map<string, Known>();

export function known(sizes: StepSizes, kind: StepKind): Known {
  const key = JSON.stringify([sizes, kind]);
  const found = cache.get(key) ?? makeStep(sizes, kind);
  cache.set(key, found);
  return found;
}

function makeStep(sizes: StepSizes, { trained, stored }: StepKind): Known {
  const { r } = sizes;
  const config = configOf(sizes);
  const { layers, heads, kvHeads, headDim, rmsNormEps } = config;
  const draw = normals();
  const weights = new Map<string, HostMatrix>();
  const adapter = new Map<string, LlamaPair>();
  for (const [name, shape] of weightShapes(config)) {
    const [N = 0, K] = shape;
    if (K === undefined) weights.set(name, { ...draw(1, N, 0.1, 1) });
    else weights.set(name, draw(N, K, 1 / Math.sqrt(K)));
    if (K === undefined || name === "model.embed_tokens.weight") continue;
    const W = stored ? asStored(stored, N, K) : weights.get(name);
    if (W) weights.set(name, W);
    // B as it may be in the middle of training: were it zero, as at first, A would have no gradient.
    const pair = { A: draw(r, K, 1 / Math.sqrt(K)), B: draw(N, r, 0.25 / Math.sqrt(r)) };
    const magnitude = trained === "dora" && W ? magnitudeOf(W, pair) : undefined;
    adapter.set(name.replace(/\.weight$/, ""), { ...pair, ...(magnitude && { magnitude }) });
  }
  const random = new Random(7);
  const ids = Int32Array.from({ length: sizes.T }, () => random.below(sizes.vocab));
  const frequencies = inverseFrequencies(headDim, ROPE).map(Math.fround);
  const table = (f: (angle: number) => number): HostMatrix => ({
    rows: sizes.T,
    columns: headDim / 2,
    values: Float32Array.from({ length: (sizes.T * headDim) / 2 }, (_, i) => {
      const position = Math.floor((2 * i) / headDim);
      return f(Math.fround(position * (frequencies[i % (headDim / 2)] ?? 0)));
    }),
  });
  const [cos, sin] = [table(Math.cos), table(Math.sin)];
  const settings = { layers, heads, kvHeads, headDim, rmsNormEps, scale: SCALE, adamw: ADAMW };
  const work: LlamaStep = { ...settings, weights, adapter, ids, cos, sin, gradients: new Map() };
  const expected = stepInF64(work, trained === "weights" ? "weights" : "adapter");
  const unit = (name: string): number => {
    const g = expected.gradients.get(name);
    if (!g) throw new Error(`bench: there must be a gradient of ${name}, got ${expected.gradients.size} others`);
    return Math.sqrt(g.reduce((sum, value) => sum + value * value, 0) / g.length);
  };
  const gradients = new Map(comparedOf(layers, trained).map((name) => [name, unit(name)]));
  return { work: { ...work, gradients }, expected };
}

/** The gradients that are compared: of the first and of the last layer, of every kind. */
function comparedOf(layers: number, trained: StepKind["trained"]): string[] {
  const [first, last] = ["model.layers.0", `model.layers.${layers - 1}`];
  const adapter = [`A of ${first}.self_attn.q_proj`, `B of ${first}.self_attn.v_proj`, `A of ${last}.mlp.down_proj`];
  if (trained === "adapter") return adapter;
  if (trained === "dora") return [...adapter, `m of ${first}.self_attn.k_proj`, `m of ${last}.mlp.down_proj`];
  return [
    "model.embed_tokens.weight",
    `${first}.input_layernorm.weight`,
    `${first}.self_attn.k_proj.weight`,
    `${last}.mlp.up_proj.weight`,
  ];
}

/** Matrices of normal values, each from where the one before it ended in a table: drawing numbers is slow. */
function normals(): (rows: number, columns: number, deviation: number, mean?: number) => HostMatrix {
  const random = new Random(20_250_202);
  const table = Float32Array.from({ length: 65_537 }, () => random.normal(0, 1)); // prime: rows do not repeat each other
  let next = 0;
  return (rows, columns, deviation, mean = 0) => {
    const values = new Float32Array(rows * columns);
    for (let i = 0; i < values.length; i++) values[i] = mean + deviation * (table[next++ % table.length] ?? 0);
    return { rows, columns, values };
  };
}

/** The 4-bit NormalFloat: Dettmers et al., arXiv:2305.14314, appendix E, to f32. */
// biome-ignore format: as in the paper
const NF4 = [
  -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833234,
  -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
];

/** A matrix that NF4 holds as it is, its levels times one power of two, ±1 in each 64; or that rounded to f16. */
function asStored(format: "f16" | "nf4", rows: number, columns: number): HostMatrix {
  const random = new Random(11);
  const codes = Uint8Array.from({ length: 65_537 }, () => random.below(16));
  const c = 2 ** -Math.round(Math.log2(columns) / 2);
  const values = Float32Array.from({ length: rows * columns }, (_, i) => {
    const code = codes[i % codes.length] ?? 0;
    return c * (NF4[i % 64 === 0 ? (code < 8 ? 0 : 15) : code] ?? Number.NaN);
  });
  return { rows, columns, values: format === "nf4" ? values : decodeFloats("F16", encodeFloats("F16", values)) };
}

/** The norms of the rows of W + s·B·A, and magnitudes that differ from them by up to a quarter. */
function magnitudeOf({ rows, columns, values }: HostMatrix, { A, B }: Pick<LlamaPair, "A" | "B">): DoraMagnitude {
  const r = A.rows;
  const row = new Float64Array(columns);
  const norms = Float64Array.from({ length: rows }, (_, j) => {
    for (let k = 0; k < columns; k++) row[k] = values[j * columns + k] ?? 0;
    for (let i = 0; i < r; i++) {
      const b = SCALE * (B.values[j * r + i] ?? 0);
      for (let k = 0; k < columns; k++) row[k] = (row[k] as number) + b * (A.values[i * columns + k] as number);
    }
    return Math.sqrt(row.reduce((sum, w) => sum + w * w, 0));
  });
  const m = Float32Array.from(norms, (n, j) => n * (0.75 + (j % 8) / 14));
  return { m: { rows: 1, columns: rows, values: m }, norms };
}

export function configOf({ layers, hidden, inside, heads, kvHeads, vocab, T }: StepSizes): DecoderConfig {
  return {
    ...{ modelType: "llama", bosId: undefined, eosIds: [], activation: "silu", rope: ROPE, rmsNormEps: 1e-5 },
    ...{ vocabSize: vocab, hiddenSize: hidden, intermediateSize: inside, layers, heads, kvHeads },
    ...{ headDim: hidden / heads, contextLength: T, tiedEmbeddings: true, attentionBias: false, mlpBias: false },
  };
}

export const largestBytes = ({ hidden, inside, vocab, T }: StepSizes): number =>
  4 * Math.max(vocab * hidden, inside * hidden, T * vocab);

/**
 * Operations and bytes of the products of a step. T rows, W [N,K] in each of the linear layers: y and dx, and dW where W is trained or
 * u, its part of y, v, its part of dx, dA and dB; the logits and what comes back of them, and dE where it is trained; attention as causal
 * as it is: 2 products forward and 4 back of T²/2 pairs.
 */
export function costsOf(sizes: StepSizes, { trained }: StepKind): { flops: number; bytes: number } {
  const { T, layers, r } = sizes;
  const config = configOf(sizes);
  let [flops, bytes] = [layers * 6 * T * T * config.hiddenSize, layers * 4 * 12 * T * config.hiddenSize];
  for (const [name, [N = 0, K]] of weightShapes(config)) {
    if (K === undefined) continue;
    const one = 4 * (T * K + N * K + T * N);
    const isHead = name === "model.embed_tokens.weight";
    const products = trained === "weights" ? 3 : 2;
    flops += products * 2 * T * N * K;
    bytes += products * one;
    if (trained === "weights" || isHead) continue;
    flops += 6 * 2 * r * T * ((N + K) / 2);
    bytes += 4 * (2 * r * (N + K) + 2 * T * (N + K) + 4 * T * r);
  }
  return { flops, bytes };
}
