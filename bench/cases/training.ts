/** A small Llama that is trained, for the contests of steps. */
import { backward } from "../../src/autograd/engine.ts";
import { Gpu } from "../../src/gpu/gpu.ts";
import { scale } from "../../src/kernels/axpy.ts";
import { copyTo } from "../../src/kernels/copy-rows.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { attachParts } from "../../src/lora/attach.ts";
import { Decoder } from "../../src/models/decoder.ts";
import { weightShapes } from "../../src/models/load.ts";
import { isPacked, type PackedMatrix, tensorsIn } from "../../src/tensor/packed.ts";
import { empty, slice, Tensor, tensor, VIEW_ALIGNMENT } from "../../src/tensor/tensor.ts";
import { AdamW } from "../../src/train/adamw.ts";
import { collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss, type Inputs } from "../../src/train/loss.ts";
import { memoryOf } from "../peers/memory.ts";
import type { HostMatrix, LlamaStep } from "../peers/peer.ts";
import { ADAMW, configOf, SCALE, type StepKind, type StepSizes } from "./step-work.ts";

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
export class Training {
  readonly tensors: readonly Tensor[];
  readonly #gpu: Gpu;
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

  constructor(gpu: Gpu, sizes: StepSizes, work: LlamaStep, { trained, stored }: StepKind, restores: boolean) {
    this.#gpu = gpu;
    const weights = new Map([...work.weights].map(([name, host]) => [name, weightOf(gpu, sizes, name, host, stored)]));
    const model = new Decoder(gpu, configOf(sizes), weights);
    if (trained !== "weights") {
      const settings = { r: sizes.r, alpha: SCALE * sizes.r, targetModules: "all-linear", useDora: trained === "dora" };
      const { pairs } = attachParts(model, settings, {
        linear: ({ name }) => {
          const pair = work.adapter.get(name);
          if (!pair) throw new Error(`bench: the step must have an A and a B for ${name}`);
          const m = pair.magnitude?.m;
          const magnitude = m && tensor(gpu, m.values, [m.columns]);
          return { A: onDevice(gpu, pair.A), B: onDevice(gpu, pair.B), magnitude };
        },
      });
      const entries = [...pairs].flatMap(([name, { A, B, magnitude }]) => [
        [`A of ${name}`, A] as const,
        [`B of ${name}`, B] as const,
        ...(magnitude ? [[`m of ${name}`, magnitude] as const] : []),
      ]);
      this.#named = new Map(entries);
    } else {
      this.#named = new Map([...weights].flatMap(([name, w]) => (isPacked(w) ? [] : [[name, w] as const])));
      for (const weight of this.#named.values()) weight.requiresGrad = true;
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
    this.tensors = [...[...weights.values()].flatMap(tensorsIn), ...adapterBuffer, ...inputs.tensors, ...own];
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
      "grad norm": copied(slice(clip, 0, [1])),
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
export function measured(gpu: Gpu, make: (own: Gpu) => Training): { readonly peakBytes: number } {
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

export const onDevice = (gpu: Gpu, { values, rows, columns }: HostMatrix): Tensor =>
  tensor(gpu, values, [rows, columns]);

/** A weight; that of a linear layer as it is to be stored, NF4 with its scales quantised too, as models are loaded. */
export function weightOf(
  gpu: Gpu,
  sizes: StepSizes,
  name: string,
  { values }: HostMatrix,
  stored: StepKind["stored"],
): Tensor | PackedMatrix {
  const shape = weightShapes(configOf(sizes)).get(name) ?? [];
  const [N = 0, K] = shape;
  if (!stored || K === undefined || name === "model.embed_tokens.weight") return tensor(gpu, values, shape);
  return packMatrix(gpu, values, [N, K], stored, { doubleQuant: stored === "nf4" });
}

/** The whole buffer that these tensors are in, as one tensor. */
export function bufferOf(parts: readonly Tensor[]): Tensor {
  const [one] = parts as [Tensor];
  if (parts.some(({ buffer }) => buffer !== one.buffer)) throw new Error("bench: A and B must lie in one buffer");
  const end = Math.max(...parts.map(({ offsetBytes, sizeBytes }) => offsetBytes + sizeBytes));
  return new Tensor(one.gpu, one.buffer, [end / 4], "f32");
}

/** Copies of tensors, one behind the other. */
export function joined(gpu: Gpu, parts: readonly Tensor[]): Tensor {
  const y = empty(gpu, [parts.reduce((sum, { size }) => sum + size, 0)], "bench");
  let at = 0;
  for (const part of parts) {
    copyTo(part, slice(y, at, part.shape));
    at += part.size;
  }
  return y;
}
