/** Training steps of several adapters on one base: each in turn, and all in one batch. */
import type { Gpu } from "../../src/gpu/gpu.ts";
import { copyTo } from "../../src/kernels/copy-rows.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachParts } from "../../src/lora/attach.ts";
import { SharedBase } from "../../src/lora/shared-base.ts";
import { Decoder } from "../../src/models/decoder.ts";
import { tensorsIn } from "../../src/tensor/packed.ts";
import { empty, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import type { AdamWSettings } from "../../src/train/adamw.ts";
import { type Batch, collate } from "../../src/train/batches.ts";
import { LaneStep } from "../../src/train/lane-step.ts";
import { TrainingStep } from "../../src/train/step.ts";
import type { Case } from "../harness.ts";
import type { SizedContest } from "./inputs.ts";
import {
  configOf,
  costsOf,
  type Known,
  known,
  largestBytes,
  SCALE,
  type StepKind,
  type StepSizes,
} from "./step-work.ts";
import { bufferOf, joined, onDevice, weightOf } from "./training.ts";

export interface LaneSizes extends StepSizes {
  /** Adapters. */
  readonly lanes: number;
  /** Rows of each in a step. */
  readonly rows: number;
}

/** Milliseconds for a case whose ratio to another is what counts. */
const PATIENCE = 15_000;
/** Results of so many steps are read at a time: a step keeps those of 64. */
const READ_EVERY = 32;

/**
 * As many steps as there are adapters, one after the other, and one step of all of them. B of adapter l is that of the first one over 2ˡ and its
 * alpha 2ˡ times as large, so that all compute the same, while one in another's place shows. Updates are proportional to the gradient: eps is so much larger.
 */
export function togetherOverApart(sizes: LaneSizes, stored?: StepKind["stored"]): SizedContest {
  const { layers, hidden, T, r, lanes, rows } = sizes;
  const kind: StepKind = { trained: "adapter", ...(stored && { stored }) };
  const one = costsOf(sizes, kind);
  const costs = { flops: one.flops * lanes * rows, bytes: one.bytes * lanes * rows };
  return {
    name: `${lanes} adapters together${stored ? ` on ${stored}` : ""} ${layers}×${hidden} ${rows}×${T} r=${r}`,
    group: "lanes-step",
    sizes: { ...sizes, weights: stored ?? "f32" },
    flops: costs.flops,
    maxCaseMs: PATIENCE,
    largestBytes: Math.max(largestBytes(sizes), 4 * lanes * rows * T * Math.max(sizes.inside, sizes.vocab)),
    setup: (gpu) => {
      const { layers: _l, hidden: _h, lanes: _n, rows: _r, ...rest } = sizes;
      const work = known({ layers, hidden, ...rest }, kind);
      const training = new LaneTraining(gpu, sizes, work, stored);
      const check = (result: string, element: number): number => training.expected(Number(result), element);
      const caseOf = (name: string, run: () => void): Case => ({
        ...{ name, ...costs, check },
        run: () => training.run(run),
      });
      return {
        inputs: training.tensors,
        cases: [caseOf("one after the other", () => training.apart()), caseOf("together", () => training.together())],
      };
    },
  };
}

class LaneTraining {
  readonly tensors: readonly Tensor[];
  readonly #gpu: Gpu;
  readonly #work: Known;
  readonly #batch: Batch;
  readonly #adapters: readonly LoraAdapter[];
  /** All of each adapter, and what it was at first. */
  readonly #flat: readonly { readonly now: Tensor; readonly first: Tensor }[];
  readonly #alone: readonly TrainingStep[];
  readonly #shared: LaneStep;
  readonly #learningRate: number;
  readonly #expected: readonly Float64Array[];
  #runs = 0;

  constructor(gpu: Gpu, sizes: LaneSizes, work: Known, stored: StepKind["stored"]) {
    this.#gpu = gpu;
    this.#work = work;
    const weights = new Map(
      [...work.work.weights].map(([name, host]) => [name, weightOf(gpu, sizes, name, host, stored)]),
    );
    const model = new Decoder(gpu, { ...configOf(sizes), contextLength: Math.ceil(sizes.T / 16) * 16 }, weights);
    const ids = Array.from(work.work.ids);
    const row = { inputIds: ids, labels: ids };
    this.#batch = collate(new Array(sizes.rows).fill(row), 0, Math.ceil(sizes.T / 16) * 16);
    const { unit, settings } = this.#update();
    this.#learningRate = settings.eps / unit;
    this.#expected = Array.from({ length: sizes.lanes }, (_, l) => this.#after(l, unit, settings.eps));
    this.#adapters = this.#expected.map((_, l) => attachLane(model, sizes.r, work, l));
    this.#flat = this.#adapters.map(({ parameters }) => {
      const now = bufferOf(parameters);
      const first = empty(gpu, now.shape, "bench");
      copyTo(now, first);
      return { now, first };
    });
    // Each is traced while its adapter alone is enabled.
    for (const adapter of this.#adapters) adapter.disable();
    this.#alone = this.#adapters.map((adapter) => {
      adapter.enable();
      const step = new TrainingStep({ model, parameters: adapter.parameters, ...settings });
      step.reserve([this.#batch]);
      adapter.disable();
      return step;
    });
    const shared = new SharedBase(this.#adapters);
    this.#shared = new LaneStep({ model, shared, lanes: this.#adapters.map(() => settings) });
    this.#shared.reserve(this.#adapters.map(() => this.#batch));
    this.tensors = [
      ...[...weights.values()].flatMap(tensorsIn),
      ...this.#flat.flatMap(({ now, first }) => [now, first]),
    ];
  }

  apart(): void {
    for (const step of this.#alone) step.run([this.#batch], this.#learningRate);
  }

  together(): void {
    this.#shared.run(this.#adapters.map(() => ({ batch: this.#batch, learningRate: this.#learningRate })));
  }

  /** Runs a step of all adapters from where they began, and gives what they are then. */
  run(step: () => void): Record<string, Tensor> {
    for (const { now, first } of this.#flat) copyTo(first, now);
    step();
    if (++this.#runs % READ_EVERY === 0) for (const one of [...this.#alone, this.#shared]) void one.read();
    return Object.fromEntries(this.#adapters.map(({ parameters }, l) => [`${l}`, joined(this.#gpu, parameters)]));
  }

  /** The f64 value of an element of adapter l after a step. */
  expected(l: number, element: number): number {
    return this.#expected[l]?.[element] ?? Number.NaN;
  }

  /** A step size at which the gradients' root mean square moves a parameter by 1, and settings by which the update goes with the gradient. */
  #update(): { readonly unit: number; readonly settings: Required<Pick<AdamWSettings, "eps">> } {
    const all = [...this.#work.expected.gradients.values()].flatMap((g) => [...g]);
    return { unit: Math.sqrt(all.reduce((sum, g) => sum + g * g, 0) / all.length), settings: { eps: 1e3 } };
  }

  /** p − lr·g/(|g| + eps): the first step of AdamW, and every later one of the same gradient. */
  #after(l: number, unit: number, eps: number): Float64Array {
    const { work, expected } = this.#work;
    const part = (name: string, values: Float32Array, factor: number): number[] => {
      const g = expected.gradients.get(name);
      if (!g) throw new Error(`bench: there must be a gradient of ${name}, got ${expected.gradients.size} others`);
      return Array.from(values, (p, i) => {
        const own = factor * (g[i] ?? Number.NaN);
        return p / factor - ((eps / unit) * own) / (Math.abs(own) + eps);
      });
    };
    return Float64Array.from(
      [...work.adapter].flatMap(([name, { A, B }]) => [
        ...part(`A of ${name}`, A.values, 1),
        ...part(`B of ${name}`, B.values, 2 ** l),
      ]),
    );
  }
}

/** The adapter of the work, B over 2ˡ and alpha 2ˡ times as large. */
function attachLane(model: Decoder, r: number, { work }: Known, l: number): LoraAdapter {
  const settings = { r, alpha: SCALE * r * 2 ** l, targetModules: "all-linear" };
  return attachParts(model, settings, {
    linear: ({ name }) => {
      const pair = work.adapter.get(name);
      if (!pair) throw new Error(`bench: the step must have an A and a B for ${name}`);
      const B = tensor(
        model.gpu,
        pair.B.values.map((b) => b / 2 ** l),
        [pair.B.rows, pair.B.columns],
      );
      return { A: onDevice(model.gpu, pair.A), B };
    },
  });
}
