/** LoRA adapters on a model: attach, train, switch, merge, detach. */
import type { Uniform } from "../gpu/kernel.ts";
import { axpy } from "../kernels/axpy.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { matmul } from "../kernels/matmul.ts";
import { type Linear, type LinearGroup, linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { slice, type Tensor, tensor, VIEW_ALIGNMENT } from "../tensor/tensor.ts";
import { type LoraDropout, loraLinear, loraLinears } from "./lora-linear.ts";
import { matchModules, type TargetModules } from "./target-modules.ts";

/** Anything with named linear layers, such as a model. */
export interface HasLinears {
  readonly linears: ReadonlyMap<string, Linear>;
  /** Modules that read the same input, each list in the order of `linears`: their adapters then read it together. */
  readonly groups?: readonly (readonly string[])[];
}

/** The settings of an adapter, in PEFT's meaning. */
export interface LoraConfig {
  /** Rank of the update. */
  readonly r: number;
  /** The update is scaled by s = alpha / r. */
  readonly alpha: number;
  readonly targetModules: TargetModules;
  /** s = alpha / √r instead (rsLoRA, arXiv:2312.03732). */
  readonly useRslora?: boolean;
  /** Probability that an element of a branch's input is dropped in training; each module has its own mask. */
  readonly dropout?: number;
}

export interface LoraPair {
  readonly layer: Linear;
  /** [r, K] */
  readonly A: Tensor;
  /** [N, r] */
  readonly B: Tensor;
}

/** Layers on one input, and their A's [ΣR,K] as one. */
interface Group {
  readonly names: readonly string[];
  readonly A: Tensor;
}

/**
 * One adapter on one model. It is made enabled: the model's linear layers compute through it until `disable`, `merge` or
 * `detach`. A layer takes one enabled adapter at a time.
 */
export class LoraAdapter {
  readonly config: LoraConfig;
  /** The adapted layers by module name, such as "model.layers.0.self_attn.q_proj". */
  readonly pairs: ReadonlyMap<string, LoraPair>;
  /** Set while a training step is made: `config.dropout` is on, its masks made from the seed and the number of the batch. */
  training: { readonly seed: number; readonly step: Uniform } | undefined;
  #factor = 1;
  #state: "enabled" | "disabled" | "merged" | "detached" = "disabled";
  readonly #originals = new Map<Linear, Tensor>();

  /** All A and B, one behind the other: what `parameters` are views of. */
  readonly #flat: Tensor;
  readonly #groups: ReadonlyMap<string, LinearGroup>;

  constructor(config: LoraConfig, pairs: ReadonlyMap<string, LoraPair>, flat: Tensor, groups: readonly Group[] = []) {
    this.config = config;
    this.pairs = pairs;
    this.#flat = flat;
    this.#groups = new Map(groups.flatMap((group) => this.#linearGroup(group)));
    this.enable();
  }

  /** The trainable tensors: every A and B. */
  get parameters(): Tensor[] {
    return [...this.pairs.values()].flatMap(({ A, B }) => [A, B]);
  }

  get state(): "enabled" | "disabled" | "merged" | "detached" {
    return this.#state;
  }

  /** s: what B·A is multiplied by, `alpha / r` times what `setScale` was given. */
  get scale(): number {
    const { r, alpha, useRslora = false } = this.config;
    return (this.#factor * alpha) / (useRslora ? Math.sqrt(r) : r);
  }

  /** Multiplies the adapter's effect: 0 is the base model, 1 the adapter as trained. Not while merged. */
  setScale(factor: number): void {
    if (!Number.isFinite(factor)) throw new ShapeError(`setScale: the factor must be a finite number, got ${factor}`);
    this.#demand("setScale", "enabled", "disabled");
    this.#factor = factor;
  }

  /** Puts the adapter to work. Throws ShapeError if another one is enabled on one of its layers. */
  enable(): void {
    if (this.#state === "enabled") return;
    this.#demand("enable", "disabled");
    for (const [name, { layer }] of this.pairs)
      if (layer.adapter)
        throw new ShapeError(`enable: a layer takes one enabled adapter, got a second on ${name}. Disable the first`);
    [...this.pairs].forEach(([name, { layer, A, B }], i) => {
      layer.adapter = {
        apply: (x, W, bias) => loraLinear(x, W, A, B, this.scale, bias, this.#dropout(i)),
        group: this.#groups.get(name),
      };
    });
    this.#state = "enabled";
  }

  /** That of the i-th module. */
  #dropout(i: number): LoraDropout | undefined {
    const { dropout: p = 0 } = this.config;
    return this.training && p > 0 ? { p, key: { ...this.training, stream: i } } : undefined;
  }

  #linearGroup({ names, A }: Group): [name: string, group: LinearGroup][] {
    const pairs = names.flatMap((name) => this.pairs.get(name) ?? []);
    const layers = pairs.map(({ layer }) => layer);
    const apply = (x: Tensor): Tensor[] => {
      if (this.#dropout(0)) return layers.map((layer) => linear(layer, x)); // masks differ, so what they read does
      const members = pairs.map(({ layer, ...pair }) => ({ W: layer.weight, bias: layer.bias, ...pair }));
      return loraLinears(x, members, A, this.scale);
    };
    return names.map((name) => [name, { layers, apply }]);
  }

  /** The model computes as if the adapter were not there. */
  disable(): void {
    if (this.#state === "disabled") return;
    this.#demand("disable", "enabled");
    for (const { layer } of this.pairs.values()) layer.adapter = undefined;
    this.#state = "disabled";
  }

  /** W ← W + s·B·A in every adapted layer, at no cost per token from then on. The original weights are kept for `unmerge`. */
  merge(): void {
    this.disable();
    for (const { layer, A, B } of this.pairs.values()) {
      this.#originals.set(layer, layer.weight);
      const merged = layer.weight.gpu.scope(() => axpy(1, layer.weight, 1, matmul(B, A, "nn", { scale: this.scale })));
      layer.weight = merged;
    }
    this.#state = "merged";
  }

  /** Puts the original weights back, bit for bit, and enables the adapter. */
  unmerge(): void {
    this.#demand("unmerge", "merged");
    for (const [layer, original] of this.#originals) {
      layer.weight.gpu.release(layer.weight);
      layer.weight = original;
    }
    this.#originals.clear();
    this.#state = "disabled";
    this.enable();
  }

  /** Takes the adapter off and frees its tensors. A merged adapter stays merged into the weights, for good. */
  detach(): void {
    if (this.#state === "detached") return;
    if (this.#state === "merged") for (const original of this.#originals.values()) original.gpu.release(original);
    else this.disable();
    this.#flat.gpu.release(this.#flat);
    this.#originals.clear();
    this.#state = "detached";
  }

  #demand(call: string, ...states: string[]): void {
    if (!states.includes(this.#state))
      throw new ShapeError(`${call}: the adapter must be ${states.join(" or ")}, got ${this.#state}`);
  }
}

/**
 * Adds a fresh adapter to the modules that `targetModules` names: A uniform in ±1/√K (Kaiming, as PEFT), B zero, so that the
 * model's output is unchanged at first. The base weights are frozen by not requiring gradients; A and B require them.
 *
 * Throws ShapeError for a rank below 1 and for a target that matches nothing.
 */
export function attachLora(model: HasLinears, config: LoraConfig, seed = 0): LoraAdapter {
  checkConfig(config);
  const random = new Random(seed);
  return attachPairs(model, config, ({ layer }) => {
    const [N = 0, K = 0] = layer.weight.shape;
    const { gpu } = layer.weight;
    const bound = 1 / Math.sqrt(K);
    const A = Float32Array.from({ length: config.r * K }, () => random.uniform(-bound, bound));
    return { A: tensor(gpu, A, [config.r, K]), B: tensor(gpu, new Float32Array(N * config.r), [N, config.r]) };
  });
}

/**
 * Attaches the pairs that `make` gives for the matched modules. They move into one buffer, one behind the other, so that an optimizer can
 * go over all of them at once; what is between them, for alignment, is zero. The A's of a group of the model come in a row, which makes them
 * one matrix, unless there is something between them.
 */
export function attachPairs(
  model: HasLinears,
  config: LoraConfig,
  make: (module: { readonly name: string; readonly layer: Linear }) => { readonly A: Tensor; readonly B: Tensor },
): LoraAdapter {
  const modules = matchModules(config.targetModules, [...model.linears.keys()]).flatMap((name) => {
    const layer = model.linears.get(name);
    return layer ? [{ name, layer, ...make({ name, layer }) }] : [];
  });
  const [
    {
      layer: {
        weight: { gpu },
      },
    } = { layer: { weight: {} } },
  ] = modules;
  if (!gpu) throw new ShapeError("lora: an adapter needs a layer, got none");
  const step = VIEW_ALIGNMENT / 4;
  const starts = new Map<Tensor, number>();
  let size = 0;
  const place = (t: Tensor): void => {
    if (starts.has(t)) return;
    starts.set(t, size);
    size += Math.ceil(t.size / step) * step;
  };
  const groups = (model.groups ?? []).map((names) => modules.filter(({ name }) => names.includes(name)));
  for (const module of modules) {
    for (const { A } of groups.find((group) => group.includes(module)) ?? []) place(A);
    place(module.A);
    place(module.B);
  }
  const flat = tensor(gpu, new Float32Array(size), [size]);
  const move = (t: Tensor): Tensor => {
    const moved = slice(flat, starts.get(t) ?? 0, t.shape);
    copyTo(t, moved);
    gpu.release(t);
    moved.requiresGrad = true;
    return moved;
  };
  const pairs = modules.map(({ name, layer, A, B }) => [name, { layer, A: move(A), B: move(B) }] as const);
  const stacked = groups.flatMap((members): Group[] => {
    const [first] = members;
    if (!first || members.length < 2 || members.some(({ A }) => A.size % step !== 0)) return [];
    const [r = 0, K = 0] = first.A.shape;
    const names = members.map(({ name }) => name);
    return [{ names, A: slice(flat, starts.get(first.A) ?? 0, [members.length * r, K]) }];
  });
  return new LoraAdapter(config, new Map(pairs), flat, stacked);
}

/** Throws ShapeError unless r is a whole number above 0, alpha a positive number and dropout a probability below 1. */
export function checkConfig({ r, alpha, dropout = 0 }: LoraConfig): void {
  if (!Number.isInteger(r) || r < 1) throw new ShapeError(`lora: r must be a whole number of at least 1, got ${r}`);
  if (!(alpha > 0) || !Number.isFinite(alpha))
    throw new ShapeError(`lora: alpha must be a positive number, got ${alpha}`);
  if (!(dropout >= 0 && dropout < 1))
    throw new ShapeError(`lora: dropout must be at least 0 and below 1, got ${dropout}`);
}
