/** Whole training steps of a small Llama: LoRA's against the peers', and LoRA's against that of all weights. */
import { backward } from "../../src/autograd/engine.ts";
import { Gpu } from "../../src/gpu/gpu.ts";
import { scale } from "../../src/kernels/axpy.ts";
import { copyTo } from "../../src/kernels/copy-rows.ts";
import { doraNorms } from "../../src/kernels/dora.ts";
import { attachPairs } from "../../src/lora/adapter.ts";
import { rowSquares } from "../../src/lora/dora-linear.ts";
import { Decoder } from "../../src/models/decoder.ts";
import type { DecoderConfig } from "../../src/models/decoder-config.ts";
import { weightShapes } from "../../src/models/load.ts";
import { inverseFrequencies } from "../../src/nn/rope.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, slice, Tensor, tensor, VIEW_ALIGNMENT } from "../../src/tensor/tensor.ts";
import { AdamW } from "../../src/train/adamw.ts";
import { collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss, type Inputs } from "../../src/train/loss.ts";
import type { Case } from "../harness.ts";
import { memoryOf } from "../peers/memory.ts";
import { type HostMatrix, type LlamaStep, parametersOf } from "../peers/peer.ts";
import type { SizedContest } from "./inputs.ts";
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
}

const RANK = 8;
const ALPHA = 16;
const ADAMW = { learningRate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
const ROPE = { type: "default", theta: 10_000 } as const;

/** A and B trained, all else frozen: made anew in each run, and replayed; and the same step written in jax-js and in tfjs. */
export function llamaStep(sizes: StepSizes): SizedContest {
  const { layers, hidden, T } = sizes;
  const costs = costsOf(sizes, "adapter");
  return {
    name: `Llama LoRA step ${layers}×${hidden} T=${T} r=${RANK}`,
    group: "llama-step",
    against: "replayed",
    sizes: { ...sizes, r: RANK },
    flops: costs.flops,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const { work, expected } = known(sizes, "adapter");
      const training = new Training(gpu, sizes, work, "adapter", true);
      const check = checkOf(work, expected, training);
      const one = (name: string, run: () => void): Case => ({
        ...{ name, ...costs, check },
        run: () => {
          run();
          return training.results();
        },
      });
      const replayed: Case = {
        ...one("replayed", () => training.replay()),
        ...measured(gpu, (own) => new Training(own, sizes, work, "adapter", true)),
      };
      return {
        inputs: training.tensors,
        cases: [one("made anew", () => training.eager()), replayed],
        work: { op: "llama-step", ...work },
      };
    },
  };
}

/** The same model and batch with every weight trained, and with A and B alone. */
export function loraOverFull(sizes: StepSizes): SizedContest {
  const { layers, hidden, T } = sizes;
  const full = costsOf(sizes, "weights");
  return {
    name: `Llama step, full and LoRA ${layers}×${hidden} T=${T} r=${RANK}`,
    group: "llama-full-step",
    sizes: { ...sizes, r: RANK },
    flops: full.flops,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const one = (name: string, trained: "weights" | "adapter"): [Case, Training] => {
        const { work, expected } = known(sizes, trained);
        const train = (on: Gpu): Training => new Training(on, sizes, work, trained, false);
        const training = train(gpu);
        const run = (): Record<string, Tensor> => {
          training.replay();
          return training.results();
        };
        const check = checkOf(work, expected, training);
        return [{ name, ...costsOf(sizes, trained), check, run, ...measured(gpu, train) }, training];
      };
      const [fullCase, fullTraining] = one("full", "weights");
      const [loraCase, loraTraining] = one("LoRA", "adapter");
      return { inputs: [...fullTraining.tensors, ...loraTraining.tensors], cases: [fullCase, loraCase] };
    },
  };
}

/** A and B trained, and A, B and m, with m what leaves the model as it is: gradients of A and B are then the same, but for the gain of 1. */
export function doraOverLora(sizes: StepSizes): SizedContest {
  const { layers, hidden, T } = sizes;
  const costs = costsOf(sizes, "adapter");
  return {
    name: `Llama step, LoRA and DoRA ${layers}×${hidden} T=${T} r=${RANK}`,
    group: "llama-dora-step",
    sizes: { ...sizes, r: RANK },
    flops: costs.flops,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const { work, expected } = known(sizes, "adapter");
      const one = (name: string, trained: "adapter" | "dora"): [Case, Training] => {
        const training = new Training(gpu, sizes, work, trained, false);
        const run = (): Record<string, Tensor> => {
          training.replay();
          return training.results();
        };
        return [{ name, ...costs, check: checkOf(work, expected, training), run }, training];
      };
      const [loraCase, loraTraining] = one("LoRA", "adapter");
      const [doraCase, doraTraining] = one("DoRA", "dora");
      return { inputs: [...loraTraining.tensors, ...doraTraining.tensors], cases: [loraCase, doraCase] };
    },
  };
}

interface Trained {
  readonly model: Decoder;
  readonly optimizer: AdamW;
  readonly inputs: Inputs;
  /** Targets of the batch. */
  readonly tokens: number;
}

/**
 * Ours: forward, backward, global norm and AdamW, as `TrainingStep` has them. Gives what the harness compares: the loss, [norm, clip factor]
 * and the gradients. `optimizer.stepCount` counts outside, for this is encoded once where it is replayed.
 */
function lowrankStep({ model, optimizer, inputs, tokens }: Trained, learningRate: number) {
  const loss = batchLoss(model, inputs, 1 / tokens);
  const gradients = backward(loss);
  optimizer.take(gradients);
  const clip = optimizer.norm();
  optimizer.update(clip, learningRate);
  return { loss, clip, gradients };
}

/**
 * A model with what it takes to train it. Each run starts from the same parameters: they are put back (`restores`), or the learning rate
 * is 0, which takes the same work. The gradient is then the same in every run, and so are the moments after bias correction, so
 * every run is a first step.
 */
class Training {
  readonly tensors: readonly Tensor[];
  readonly #gpu: Gpu;
  readonly #trains: "adapter" | "dora" | "weights";
  readonly #trained: Trained;
  readonly #parameters: readonly Tensor[];
  readonly #named: ReadonlyMap<string, Tensor>;
  readonly #units: ReadonlyMap<string, number>;
  /** Of the last run; a replayed step computes in the same places each time. */
  readonly #last: { readonly loss: Tensor; readonly clip: Tensor; readonly gradients: ReadonlyMap<string, Tensor> };
  /** All of the adapter as one tensor, and what it was at first. */
  readonly #flat: Tensor | undefined;
  readonly #first: Tensor | undefined;
  readonly #learningRate: number;
  readonly #workspace: GPUBuffer[] = [];
  readonly #plan: { run(): void };
  #foreignBytes = 0;

  constructor(gpu: Gpu, sizes: StepSizes, work: LlamaStep, trained: "adapter" | "dora" | "weights", restores: boolean) {
    this.#gpu = gpu;
    this.#trains = trained;
    const weights = new Map(
      [...work.weights].map(([name, host]) => [name, tensor(gpu, host.values, shapeOf(sizes, name))] as const),
    );
    const model = new Decoder(gpu, configOf(sizes), weights);
    if (trained !== "weights") {
      const useDora = trained === "dora";
      const settings = { r: RANK, alpha: ALPHA, targetModules: "all-linear", useDora };
      const { pairs } = attachPairs(model, settings, ({ name, layer }) => {
        const pair = work.adapter.get(name);
        if (!pair) throw new Error(`bench: the step must have an A and a B for ${name}`);
        const [A, B] = [onDevice(gpu, pair.A), onDevice(gpu, pair.B)];
        const norms = (): Tensor => doraNorms(layer.weight, A, B, rowSquares(layer.weight), ALPHA / RANK).gain;
        return { A, B, magnitude: useDora ? gpu.scope(norms) : undefined };
      });
      const entries = [...pairs].flatMap(([name, { A, B, magnitude }]) => [
        [`A of ${name}`, A] as const,
        [`B of ${name}`, B] as const,
        ...(magnitude ? [[`m of ${name}`, magnitude] as const] : []),
      ]);
      this.#named = new Map(entries);
    } else {
      for (const weight of weights.values()) weight.requiresGrad = true;
      this.#named = weights;
    }
    this.#parameters = [...this.#named.values()];
    this.#units = work.gradients;
    const ids = Array.from(work.ids);
    const batch = collate([{ inputIds: ids, labels: ids }], 0);
    const inputs = batchInputs(gpu, batch);
    this.#trained = { model, inputs, tokens: batch.tokens, optimizer: new AdamW(this.#parameters, ADAMW) };
    this.#learningRate = restores ? ADAMW.learningRate : 0;
    this.#last = {
      loss: empty(gpu, [1], "bench"),
      clip: empty(gpu, [2], "bench"),
      gradients: new Map(
        [...work.gradients.keys()].map((name) => [name, empty(gpu, this.#parameter(name).shape, "bench")] as const),
      ),
    };
    if (restores) {
      this.#flat = bufferOf(this.#parameters);
      this.#first = empty(gpu, this.#flat.shape, "bench");
      copyTo(this.#flat, this.#first);
    }
    this.#plan = gpu.trace(() => this.#encode(), this.#workspace);
    const own = [
      this.#last.loss,
      this.#last.clip,
      ...this.#last.gradients.values(),
      ...(this.#first ? [this.#first] : []),
    ];
    const adapterBuffer = trained === "weights" ? [] : this.#parameters.slice(0, 1);
    this.tensors = [...weights.values(), ...adapterBuffer, ...inputs.tensors, ...own];
  }

  eager(): void {
    this.#trained.optimizer.stepCount++;
    this.#encode();
  }

  replay(): void {
    this.#trained.optimizer.stepCount++;
    this.#plan.run();
  }

  /** Of the last run, in tensors of their own. */
  results(): Record<string, Tensor> {
    const copied = (t: Tensor): Tensor => {
      const y = empty(this.#gpu, t.shape, "bench");
      copyTo(t, y);
      return y;
    };
    const { loss, clip, gradients } = this.#last;
    const scaled = [...gradients].map(([name, g]) => [name, scale(g, 1 / (this.#units.get(name) ?? 1))] as const);
    return {
      loss: copied(loss),
      ...(this.#trains !== "dora" && { "grad norm": copied(slice(clip, 0, [1])) }), // DoRA's has those of m, too
      ...(this.#flat && { adapter: joined(this.#gpu, this.#parameters) }),
      ...Object.fromEntries(scaled),
    };
  }

  /** Bytes of gradients and of the optimizer that are not of what is trained: 0. */
  get frozenBytes(): number {
    const { gradientBytes, sizeBytes } = this.#trained.optimizer;
    // With what lies between parameters, for alignment.
    const aligned = ({ sizeBytes: own }: Tensor): number => Math.ceil(own / VIEW_ALIGNMENT) * VIEW_ALIGNMENT;
    const trainedBytes = this.#parameters.reduce((sum, p) => sum + aligned(p), 0);
    return Math.max(0, gradientBytes + sizeBytes - 3 * trainedBytes) + this.#foreignBytes;
  }

  #encode(): void {
    if (this.#first && this.#flat) copyTo(this.#first, this.#flat);
    const { loss, clip, gradients } = lowrankStep(this.#trained, this.#learningRate);
    const trainable = new Set(this.#parameters);
    this.#foreignBytes = [...gradients].reduce((sum, [of, g]) => sum + (trainable.has(of) ? 0 : g.sizeBytes), 0);
    copyTo(loss, this.#last.loss);
    copyTo(clip, this.#last.clip);
    for (const [name, kept] of this.#last.gradients) {
      const gradient = gradients.get(this.#parameter(name));
      if (!gradient) throw new Error(`bench: ${name} must have a gradient, got none`);
      copyTo(gradient, kept);
    }
  }

  #parameter(name: string): Tensor {
    const found = this.#named.get(name);
    if (!found) throw new Error(`bench: ${name} must be trained, got ${this.#named.size} others`);
    return found;
  }
}

/** The most that two steps hold, on the same device but with a pool of their own, so that nothing held before is counted or used. */
function measured(gpu: Gpu, make: (own: Gpu) => Training): { readonly peakBytes: number } {
  const memory = memoryOf(gpu.device);
  const others = new Set(memory.buffers);
  const before = memory.live;
  memory.restart();
  const { isSoftware, runtime } = gpu;
  const own = new Gpu(gpu.device, gpu.info, { isSoftware, runtime });
  const training = make(own);
  for (let i = 0; i < 2; i++) training.replay();
  const peakBytes = memory.peak - before;
  for (const buffer of memory.buffers) if (!others.has(buffer)) buffer.destroy();
  return { peakBytes };
}

/** Checks against f64, and that nothing is kept for what is frozen. */
function checkOf(work: LlamaStep, expected: StepValues, training: Training): Case["check"] {
  const after = parametersOf(work).flatMap(([name, { values }]) => {
    const g = expected.gradients.get(name);
    const { learningRate, eps } = ADAMW;
    // The first step of AdamW: both moments are those of the gradient alone.
    return g
      ? [Float64Array.from(values, (p, i) => p - (learningRate * (g[i] ?? 0)) / (Math.abs(g[i] ?? 0) + eps))]
      : [];
  });
  const adapter = after.flatMap((values) => [...values]);
  return (result, element) => {
    if (training.frozenBytes !== 0)
      throw new Error(`bench: gradients and moments of frozen weights must take 0 bytes, got ${training.frozenBytes}`);
    if (result === "loss") return expected.loss;
    if (result === "grad norm") return expected.gradNorm;
    if (result === "adapter") return adapter[element] ?? Number.NaN;
    return (expected.gradients.get(result)?.[element] ?? Number.NaN) / (work.gradients.get(result) ?? Number.NaN);
  };
}

interface Known {
  readonly work: LlamaStep;
  readonly expected: StepValues;
}

/** Seconds of arithmetic in f64, which the tuner and the benchmark need not both wait for. */
const cache = new Map<string, Known>();

function known(sizes: StepSizes, trained: "adapter" | "weights"): Known {
  const key = JSON.stringify([sizes, trained]);
  const found = cache.get(key) ?? makeStep(sizes, trained);
  cache.set(key, found);
  return found;
}

function makeStep(sizes: StepSizes, trained: "adapter" | "weights"): Known {
  const config = configOf(sizes);
  const { layers, heads, kvHeads, headDim, rmsNormEps } = config;
  const draw = normals();
  const weights = new Map<string, HostMatrix>();
  const adapter = new Map<string, { A: HostMatrix; B: HostMatrix }>();
  for (const [name, shape] of weightShapes(config)) {
    const [N = 0, K] = shape;
    if (K === undefined) weights.set(name, { ...draw(1, N, 0.1, 1) });
    else weights.set(name, draw(N, K, 1 / Math.sqrt(K)));
    if (K === undefined || name === "model.embed_tokens.weight") continue;
    // B as it may be in the middle of training: were it zero, as at first, A would have no gradient.
    const pair = { A: draw(RANK, K, 1 / Math.sqrt(K)), B: draw(N, RANK, 0.25 / Math.sqrt(RANK)) };
    adapter.set(name.replace(/\.weight$/, ""), pair);
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
  const settings = { layers, heads, kvHeads, headDim, rmsNormEps, scale: ALPHA / RANK, adamw: ADAMW };
  const work: LlamaStep = { ...settings, weights, adapter, ids, cos, sin, gradients: new Map() };
  const expected = stepInF64(work, trained);
  const unit = (name: string): number => {
    const g = expected.gradients.get(name);
    if (!g) throw new Error(`bench: there must be a gradient of ${name}, got ${expected.gradients.size} others`);
    return Math.sqrt(g.reduce((sum, value) => sum + value * value, 0) / g.length);
  };
  const gradients = new Map(comparedOf(layers, trained).map((name) => [name, unit(name)]));
  return { work: { ...work, gradients }, expected };
}

/** The gradients that are compared: of the first and of the last layer, of every kind. */
function comparedOf(layers: number, trained: "adapter" | "weights"): string[] {
  const [first, last] = ["model.layers.0", `model.layers.${layers - 1}`];
  if (trained === "adapter")
    return [`A of ${first}.self_attn.q_proj`, `B of ${first}.self_attn.v_proj`, `A of ${last}.mlp.down_proj`];
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

function configOf({ layers, hidden, inside, heads, kvHeads, vocab, T }: StepSizes): DecoderConfig {
  return {
    ...{ modelType: "llama", bosId: undefined, eosIds: [], activation: "silu", rope: ROPE, rmsNormEps: 1e-5 },
    ...{ vocabSize: vocab, hiddenSize: hidden, intermediateSize: inside, layers, heads, kvHeads },
    ...{ headDim: hidden / heads, contextLength: T, tiedEmbeddings: true, attentionBias: false, mlpBias: false },
  };
}

const shapeOf = (sizes: StepSizes, name: string): number[] => weightShapes(configOf(sizes)).get(name) ?? [];
const onDevice = (gpu: Gpu, { values, rows, columns }: HostMatrix): Tensor => tensor(gpu, values, [rows, columns]);

/** The whole buffer that these tensors are in, as one tensor. */
function bufferOf(parts: readonly Tensor[]): Tensor {
  const [one] = parts as [Tensor];
  if (parts.some(({ buffer }) => buffer !== one.buffer)) throw new Error("bench: A and B must lie in one buffer");
  const end = Math.max(...parts.map(({ offsetBytes, sizeBytes }) => offsetBytes + sizeBytes));
  return new Tensor(one.gpu, one.buffer, [end / 4], "f32");
}

/** Copies of tensors, one behind the other. */
function joined(gpu: Gpu, parts: readonly Tensor[]): Tensor {
  const y = empty(gpu, [parts.reduce((sum, { size }) => sum + size, 0)], "bench");
  let at = 0;
  for (const part of parts) {
    copyTo(part, slice(y, at, part.shape));
    at += part.size;
  }
  return y;
}

const largestBytes = ({ hidden, inside, vocab, T }: StepSizes): number =>
  4 * Math.max(vocab * hidden, inside * hidden, T * vocab);

/**
 * Operations and bytes of the products of a step. T rows, W [N,K] in each of the linear layers: y and dx, and dW where W is trained or
 * u, its part of y, v, its part of dx, dA and dB; the logits and what comes back of them, and dE where it is trained; attention as causal
 * as it is: 2 products forward and 4 back of T²/2 pairs.
 */
function costsOf(sizes: StepSizes, trained: "adapter" | "weights"): { flops: number; bytes: number } {
  const { T, layers } = sizes;
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
    flops += 6 * 2 * RANK * T * ((N + K) / 2);
    bytes += 4 * (2 * RANK * (N + K) + 2 * T * (N + K) + 4 * T * RANK);
  }
  return { flops, bytes };
}
