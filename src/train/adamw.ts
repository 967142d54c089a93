import type { Gradients } from "../autograd/engine.ts";
import { type Uniform, uniformValue } from "../gpu/kernel.ts";
import { adamwStep } from "../kernels/adamw.ts";
import { addInto } from "../kernels/axpy.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { globalNorm } from "../kernels/global-norm.ts";
import { matmul } from "../kernels/matmul.ts";
import { ShapeError } from "../tensor/errors.ts";
import { readAll, slice, Tensor, tensor, VIEW_ALIGNMENT } from "../tensor/tensor.ts";

export interface AdamWSettings {
  /** 0.9 unless given. */
  readonly beta1?: number;
  /** 0.999 unless given. */
  readonly beta2?: number;
  /** 1e-8 unless given. */
  readonly eps?: number;
  /** Of matrices alone: what has one axis, such as biases and magnitudes, does not decay. 0 unless given. */
  readonly weightDecay?: number;
  /** Gradients are scaled down to this global norm; 0, or none, leaves them as they are. */
  readonly maxGradNorm?: number;
  /** What the learning rate is multiplied by for some of the parameters: see `LoraAdapter.rates`. */
  readonly rates?: ReadonlyMap<Tensor, number> | undefined;
  /** P [r,r] by parameter [N,r], whose gradient is g·P in the update; norm and clipping are those of g. See `loraFa`. */
  readonly projections?: ReadonlyMap<Tensor, Tensor> | undefined;
}

/** An optimizer on the host, to the last bit. */
export interface AdamWState {
  readonly stepCount: number;
  /** Parameters and moments of each run of neighbours, with what alignment puts between them. */
  readonly runs: readonly Readonly<Record<"p" | "m" | "v", Float32Array>>[];
}

/** Parameters that lie side by side in one buffer, and as one tensor each: they, their gradient and its two moments. */
interface Run {
  readonly p: Tensor;
  readonly g: Tensor;
  readonly m: Tensor;
  readonly v: Tensor;
  /** Factor on the learning rate. */
  readonly rate: number;
  readonly weightDecay: number;
  /** Where gradients of a further batch go before they are added to g. */
  readonly more: Tensor | undefined;
  readonly members: readonly { readonly parameter: Tensor; readonly first: number }[];
}

/**
 * AdamW (arXiv:1711.05101) with a gradient and two moments per trainable element, and nothing for what is frozen. PyTorch's formula and defaults.
 *
 * Parameters that are views of one buffer, one behind the other, are updated together: all of an adapter in one dispatch.
 */
export class AdamW {
  readonly parameters: readonly Tensor[];
  /** Steps counted so far: what the bias corrections go by. */
  stepCount = 0;
  readonly #settings: Required<Omit<AdamWSettings, "rates" | "projections">>;
  readonly #projections: ReadonlyMap<Tensor, Tensor>;
  readonly #runs: readonly Run[];

  /** `accumulates`: gradients of several batches will be added up by `take(…, true)`, which takes a second buffer. */
  constructor(parameters: readonly Tensor[], settings: AdamWSettings = {}, accumulates = false) {
    if (parameters.length === 0) throw new ShapeError("AdamW: at least one parameter is needed, got none");
    this.parameters = parameters;
    const { beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weightDecay = 0, maxGradNorm = 0 } = settings;
    this.#projections = settings.projections ?? new Map();
    this.#settings = { beta1, beta2, eps, weightDecay, maxGradNorm };
    const rateOf = (p: Tensor): number => settings.rates?.get(p) ?? 1;
    const decayOf = ({ shape }: Tensor): number => (shape.length > 1 ? weightDecay : 0);
    const isAlike = (p: Tensor, q: Tensor): boolean => rateOf(p) === rateOf(q) && decayOf(p) === decayOf(q);
    this.#runs = sideBySide(parameters, isAlike).map((members) => {
      const [one] = members as [Tensor];
      const first = one.offsetBytes;
      const size = members.reduce((end, p) => Math.max(end, (p.offsetBytes - first) / 4 + p.size), 0);
      const zeros = (): Tensor => tensor(one.gpu, new Float32Array(size), [size]);
      return {
        p: new Tensor(one.gpu, one.buffer, [size], "f32", first),
        ...{ rate: rateOf(one), weightDecay: decayOf(one) },
        ...{ g: zeros(), m: zeros(), v: zeros(), more: accumulates ? zeros() : undefined },
        members: members.map((parameter) => ({ parameter, first: (parameter.offsetBytes - first) / 4 })),
      };
    });
  }

  /** Bytes of optimizer state: the moments. */
  get sizeBytes(): number {
    return this.#runs.reduce((sum, { m, v }) => sum + m.sizeBytes + v.sizeBytes, 0);
  }

  /** Bytes kept for gradients. */
  get gradientBytes(): number {
    return this.#runs.reduce((sum, { g, more }) => sum + g.sizeBytes + (more?.sizeBytes ?? 0), 0);
  }

  /**
   * One update in place; a gradient norm that is not finite leaves the parameters as they are. Returns [norm, clip factor], f32
   * [2], the norm before clipping. Throws ShapeError when a parameter got no gradient: it would stay untrained in silence.
   */
  step(gradients: Gradients, learningRate: number): Tensor {
    this.stepCount++;
    this.take(gradients);
    const clip = this.norm();
    this.update(clip, learningRate);
    return clip;
  }

  /** Takes over the gradients of a batch, in place of those it had or added to them. Throws ShapeError as `step`. */
  take(gradients: Gradients, add = false): void {
    for (const { g, more, members } of this.#runs) {
      const to = add ? more : g;
      if (!to) throw new ShapeError("AdamW: to add up gradients it must be made with accumulates, got none");
      for (const { parameter, first } of members) {
        const gradient = gradients.get(parameter);
        if (!gradient)
          throw new ShapeError(
            `AdamW: every parameter needs a gradient, got none for one of shape [${parameter.shape}]. Is it part of the model?`,
          );
        copyTo(gradient, slice(to, first, parameter.shape));
      }
      if (add) addInto(to, g);
    }
  }

  /** [norm, clip factor] of the gradients it took, each times `scale`: see `globalNorm`. */
  norm(scale: Uniform = 1): Tensor {
    return globalNorm(
      this.#runs.map(({ g }) => g),
      this.#settings.maxGradNorm,
      scale,
    );
  }

  /** Changes the parameters by the gradients it took, as of step `stepCount`. In a traced step both scalars are asked anew in each run. */
  update(clip: Tensor, learningRate: Uniform): void {
    const options = { ...this.#settings, step: () => this.stepCount, clip };
    for (const { p, g, m, v, rate, weightDecay, members } of this.#runs) {
      for (const { parameter, first } of members) this.#project(parameter, slice(g, first, parameter.shape));
      adamwStep(p, g, m, v, { ...options, weightDecay, learningRate: () => rate * uniformValue(learningRate) });
    }
  }

  /** What the next steps depend on besides their gradients, once all that was sent is done. */
  async state(): Promise<AdamWState> {
    const values = await readAll(this.#runs.flatMap(({ p, m, v }) => [p, m, v]));
    const runs = this.#runs.map((_, i) => {
      const [p = NONE, m = NONE, v = NONE] = values.slice(3 * i, 3 * i + 3);
      return { p, m, v };
    });
    return { stepCount: this.stepCount, runs };
  }

  /** Goes on from a state of an optimizer of the same parameters. Throws ShapeError, before anything is changed, where sizes differ. */
  restore({ stepCount, runs }: AdamWState): void {
    const sizes = this.#runs.map(({ p }) => p.size);
    const given = runs.map(({ p, m, v }) => Math.max(p.length, m.length, v.length));
    const fits = runs.every((run, i) => [run.p, run.m, run.v].every(({ length }) => length === sizes[i]));
    if (runs.length !== sizes.length || !fits)
      throw new ShapeError(`AdamW: a state must have runs of [${sizes}] elements, got [${given}]`);
    this.stepCount = stepCount;
    for (const [i, { p, m, v }] of this.#runs.entries()) {
      const run = runs[i];
      if (!run) continue;
      for (const [to, values] of [
        [p, run.p],
        [m, run.m],
        [v, run.v],
      ] as const)
        to.gpu.write(to, values);
    }
  }

  /** g ← g·P, where the parameter has one. */
  #project(parameter: Tensor, g: Tensor): void {
    const P = this.#projections.get(parameter);
    if (P) g.gpu.scope(() => copyTo(matmul(g, P), g));
  }

  /** Frees moments and gradients. */
  destroy(): void {
    for (const { g, m, v, more } of this.#runs) g.gpu.release(g, m, v, ...(more ? [more] : []));
  }
}

const NONE = new Float32Array();

/** Parameters that are alike in runs that follow one another in a buffer, with no more between them than alignment asks for. */
function sideBySide(parameters: readonly Tensor[], isAlike: (p: Tensor, q: Tensor) => boolean): Tensor[][] {
  const buffers = new Map<GPUBuffer, Tensor[]>();
  for (const p of new Set(parameters)) buffers.set(p.buffer, [...(buffers.get(p.buffer) ?? []), p]);
  return [...buffers.values()].flatMap((views) => {
    const runs: Tensor[][] = [];
    let end = Number.NaN;
    for (const p of views.toSorted((a, b) => a.offsetBytes - b.offsetBytes)) {
      const before = runs.at(-1)?.[0];
      if (before && p.offsetBytes === end && isAlike(p, before)) runs.at(-1)?.push(p);
      else runs.push([p]);
      end = Math.ceil((p.offsetBytes + p.sizeBytes) / VIEW_ALIGNMENT) * VIEW_ALIGNMENT;
    }
    return runs;
  });
}
