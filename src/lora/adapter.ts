/** LoRA adapters on a model: attach, train, switch, merge, detach. */
import { add, scale } from "../autograd/basic-ops.ts";
import type { Uniform } from "../gpu/kernel.ts";
import { axpy, scale as scaled } from "../kernels/axpy.ts";
import { copyTo } from "../kernels/copy-rows.ts";
import { doraNorms } from "../kernels/dora.ts";
import { matmul } from "../kernels/matmul.ts";
import { unpackMatrix } from "../kernels/unpack.ts";
import { type Linear, type LinearAdapter, type LinearGroup, linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, tensorsIn } from "../tensor/packed.ts";
import { Random } from "../tensor/random.ts";
import { empty, slice, type Tensor, tensor, VIEW_ALIGNMENT } from "../tensor/tensor.ts";
import { CLASSIFIER_HEADS, checkConfig, isSaved, type LoraConfig, modulesOf, settingsOf } from "./config.ts";
import { doraLinear, type Magnitude, mergedMagnitude, rowSquares, withMagnitude } from "./dora-linear.ts";
import { type LoraDropout, loraLinear, loraLinears } from "./lora-linear.ts";

/** Anything with named linear layers, such as a model. */
export interface HasLinears {
  readonly linears: ReadonlyMap<string, Linear>;
  /** Modules that read the same input, each list in the order of `linears`: their adapters then read it together. */
  readonly groups?: readonly (readonly string[])[];
  /** Whether files have this weight as [K,N]. */
  isTransposed?(name: string): boolean;
  /** Every weight by name, where some are of no linear layer. */
  readonly weights?: ReadonlyMap<string, Tensor>;
  /** What PEFT calls it; "CAUSAL_LM" unless given. */
  readonly taskType?: string;
}

/** What an adapter has for one module. All of it is trained. */
export interface LoraParts {
  /** [r, K] */
  readonly A: Tensor;
  /** [N, r] */
  readonly B: Tensor;
  /** DoRA's m [N]. */
  readonly magnitude?: Tensor | undefined;
  /** [N], added to B·(A·x) and scaled with it. */
  readonly loraBias?: Tensor | undefined;
  /** [N], in place of the layer's own. */
  readonly bias?: Tensor | undefined;
}

export interface LoraPair extends LoraParts {
  readonly layer: Linear;
  /** s, before `setScale`. */
  readonly scale: number;
}

/** What a layer of `modulesToSave` has instead: the whole of it, trained. */
export interface SavedParts {
  readonly weight: Tensor;
  readonly bias?: Tensor | undefined;
}

export interface SavedLayer extends SavedParts {
  readonly layer: Linear;
}

/** The parts by the names that their kinds have, in one order everywhere. */
const PARTS = ["A", "B", "magnitude", "loraBias", "bias"] as const;

/** What an adapter began with where that was taken from the base: W stands for W₀ − s·B·A of the beginning while it is enabled. */
export interface Beginning {
  readonly A: Tensor;
  readonly B: Tensor;
  /** W₀ − s·B·A */
  readonly residual: Tensor;
  /** W₀ */
  readonly original: Tensor;
}

/** Layers on one input, of one rank and scale, and their A's [ΣR,K] as one. */
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
  /** The layers that are trained whole, by module name. `setScale` does not change them. */
  readonly saved: ReadonlyMap<string, SavedLayer>;
  /** Set while a training step is made: `config.dropout` is on, its masks made from the seed and the number of the batch. */
  training: { readonly seed: number; readonly step: Uniform } | undefined;
  #factor = 1;
  #state: "enabled" | "disabled" | "merged" | "detached" = "disabled";
  readonly #originals = new Map<Linear, Pick<Linear, "weight" | "bias">>();

  /** All parts, one behind the other: what `parameters` are views of. */
  readonly #flat: Tensor;
  readonly #groups: ReadonlyMap<string, LinearGroup>;
  /** ‖W‖² of the rows of each layer, where there are magnitudes. */
  #squares: ReadonlyMap<LoraPair, Tensor> = new Map();
  readonly #beginnings = new Map<LoraPair, Beginning>();

  /** Use `attachLora` or `attachPairs`. */
  constructor(
    config: LoraConfig,
    pairs: ReadonlyMap<string, LoraPair>,
    flat: Tensor,
    groups: readonly Group[] = [],
    saved: ReadonlyMap<string, SavedLayer> = new Map(),
  ) {
    this.config = config;
    this.pairs = pairs;
    this.saved = saved;
    this.#flat = flat;
    this.#groups = new Map(groups.flatMap((group) => this.#linearGroup(group)));
    this.enable();
    this.#takeSquares();
  }

  /** The trainable tensors: every A and B, and what else there is. */
  get parameters(): Tensor[] {
    const parts = [...this.pairs.values()].flatMap((pair) => PARTS.flatMap((part) => pair[part] ?? []));
    return [...parts, ...[...this.saved.values()].flatMap(({ weight, bias }) => [weight, ...(bias ? [bias] : [])])];
  }

  /**
   * LoRA+ (arXiv:2402.12354): B and what has one axis learn `ratio` times as fast as A, which is what the optimizer's `rates` take.
   *
   * Throws ShapeError unless the ratio is above 0.
   */
  rates(ratio: number): Map<Tensor, number> {
    if (!(ratio > 0) || !Number.isFinite(ratio))
      throw new ShapeError(`rates: the ratio must be a number above 0, got ${ratio}`);
    const slow = new Set([...this.pairs.values()].map(({ A }) => A));
    return new Map(this.parameters.filter((p) => !slow.has(p)).map((p) => [p, ratio]));
  }

  get state(): "enabled" | "disabled" | "merged" | "detached" {
    return this.#state;
  }

  /** What was taken from the base, by module name: see `start`. */
  get beginnings(): ReadonlyMap<string, Beginning> {
    return new Map(
      [...this.pairs].flatMap(([name, pair]) => {
        const beginning = this.#beginnings.get(pair);
        return beginning ? [[name, beginning] as const] : [];
      }),
    );
  }

  /**
   * Puts these values into A and B of the modules. With `takesFromBase` what they stand for is taken from the weights, W − s·B·A, as long as
   * the adapter is enabled: the model's output stays what it is, and the original weights are kept beside.
   *
   * Throws ShapeError where the adapter is merged, was started so before, or its scale was changed.
   */
  start(values: ReadonlyMap<string, Readonly<Record<"A" | "B", Float32Array>>>, takesFromBase: boolean): void {
    this.#demand("start", "enabled");
    if (this.#beginnings.size > 0 || this.#factor !== 1)
      throw new ShapeError("start: an adapter starts once, at its own scale, got one that did. Attach a fresh one");
    const started = [...values].map(([name, { A, B }]) => {
      const pair = this.pairs.get(name);
      if (!pair) throw new ShapeError(`start: modules must be the adapter's, got ${name}`);
      const original = pair.layer.weight;
      if (takesFromBase && isPacked(original))
        throw new ShapeError(
          `start: a part of the base is taken from f32 weights, got ${original.format}. Load it as f32`,
        );
      return { pair, A, B, original };
    });
    for (const { pair, A, B, original } of started) {
      const { layer } = pair;
      const { gpu } = pair.A;
      gpu.write(pair.A, A);
      gpu.write(pair.B, B);
      if (!takesFromBase || isPacked(original)) continue;
      const residual = gpu.scope(() => axpy(1, original, -1, matmul(pair.B, pair.A, "nn", { scale: pair.scale })));
      const [A0, B0] = [scaled(pair.A, 1), scaled(pair.B, 1)];
      this.#beginnings.set(pair, { A: A0, B: B0, residual, original });
      layer.weight = residual;
    }
    this.#takeSquares();
  }

  /** Of the weights as they are now. */
  #takeSquares(): void {
    for (const t of this.#squares.values()) t.gpu.release(t);
    const withNorms = [...this.pairs.values()].filter(({ magnitude }) => magnitude);
    this.#squares = new Map(withNorms.map((pair) => [pair, rowSquares(pair.layer.weight)]));
  }

  /** s of a module whose rank and alpha no pattern changes, times what `setScale` was given. */
  get scale(): number {
    return this.#factor * settingsOf({ ...this.config, rankPattern: {}, alphaPattern: {} }, "").scale;
  }

  /** Multiplies s: 1 is the adapter as trained, 0 leaves B·A out (magnitudes, biases and what was taken from the base stay). Not while merged. */
  setScale(factor: number): void {
    if (!Number.isFinite(factor)) throw new ShapeError(`setScale: the factor must be a finite number, got ${factor}`);
    this.#demand("setScale", "enabled", "disabled");
    this.#factor = factor;
  }

  /** Puts the adapter to work. Throws ShapeError if another one is enabled on one of its layers. */
  enable(): void {
    if (this.#state === "enabled") return;
    this.#demand("enable", "disabled");
    for (const [name, { layer }] of [...this.pairs, ...this.saved])
      if (layer.adapter)
        throw new ShapeError(`enable: a layer takes one enabled adapter, got a second on ${name}. Disable the first`);
    [...this.pairs].forEach(([name, pair], i) => {
      pair.layer.weight = this.#beginnings.get(pair)?.residual ?? pair.layer.weight;
      pair.layer.adapter = { apply: this.#applyOf(pair, i), group: this.#groups.get(name) };
    });
    for (const { layer, weight, bias } of this.saved.values())
      layer.adapter = { apply: (x) => linear({ weight, bias }, x) };
    this.#state = "enabled";
  }

  /** What stands in for the i-th module's product. */
  #applyOf(pair: LoraPair, i: number): LinearAdapter["apply"] {
    return (x, W, bias) => {
      const layer = { W, A: pair.A, B: pair.B, bias: this.#biasOf(pair, bias) };
      const [s, drop, magnitude] = [this.#factor * pair.scale, this.#dropout(i), this.#magnitudeOf(pair)];
      return magnitude
        ? doraLinear(x, layer, magnitude, s, drop)
        : loraLinear(x, W, layer.A, layer.B, s, layer.bias, drop);
    };
  }

  #magnitudeOf(pair: LoraPair): Magnitude | undefined {
    const squares = this.#squares.get(pair);
    return pair.magnitude && squares && { m: pair.magnitude, squares };
  }

  /** The bias of the layer with the adapter's own. */
  #biasOf({ bias, loraBias, scale: s }: LoraPair, original: Tensor | undefined): Tensor | undefined {
    const base = bias ?? original;
    if (!loraBias) return base;
    const own = scale(loraBias, this.#factor * s);
    return base ? add(base, own) : own;
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
      const s = this.#factor * (pairs[0]?.scale ?? 1);
      const members = pairs.map((pair) => ({
        ...{ W: pair.layer.weight, A: pair.A, B: pair.B },
        bias: this.#biasOf(pair, pair.layer.bias),
      }));
      const plain = members.map(({ bias, ...member }, i) => (pairs[i]?.magnitude ? member : { ...member, bias }));
      return loraLinears(x, plain, A, s).map((z, i) => {
        const [pair, member] = [pairs[i] as LoraPair, members[i]];
        const magnitude = this.#magnitudeOf(pair);
        return magnitude && member ? withMagnitude(z, member, magnitude, s) : z;
      });
    };
    return names.map((name) => [name, { layers, apply }]);
  }

  /** The model computes as if the adapter were not there. */
  disable(): void {
    if (this.#state === "disabled") return;
    this.#demand("disable", "enabled");
    for (const pair of this.pairs.values()) {
      pair.layer.adapter = undefined;
      pair.layer.weight = this.#beginnings.get(pair)?.original ?? pair.layer.weight;
    }
    for (const { layer } of this.saved.values()) layer.adapter = undefined;
    this.#state = "disabled";
  }

  /**
   * W ← W + s·B·A in every adapted layer (DoRA: its rows scaled to their magnitudes), and biases likewise, at no cost per token from then
   * on, packed weights as f32. What was there is kept for `unmerge`. Throws ShapeError where the adapter has a bias for a layer that has none.
   */
  merge(): void {
    for (const [name, { layer, loraBias }] of this.pairs)
      if (loraBias && !layer.bias)
        throw new ShapeError(`merge: a bias needs a layer with one, got ${name} without. Keep the adapter apart`);
    this.disable();
    for (const pair of this.pairs.values()) {
      const { layer, A, B } = pair;
      const s = this.#factor * pair.scale;
      this.#originals.set(layer, { weight: layer.weight, bias: layer.bias });
      const W = this.#beginnings.get(pair)?.residual ?? layer.weight;
      layer.weight = W.gpu.scope(() => {
        const wide = isPacked(W) ? unpackMatrix(W) : W;
        const sum = axpy(1, wide, 1, matmul(B, A, "nn", { scale: s }));
        const magnitude = this.#magnitudeOf(pair);
        return magnitude ? mergedMagnitude(sum, { W, A, B }, magnitude, s) : sum;
      });
      layer.bias = this.#mergedBias(pair);
    }
    for (const { layer, weight, bias } of this.saved.values()) {
      this.#originals.set(layer, { weight: layer.weight, bias: layer.bias });
      layer.weight = scaled(weight, 1);
      layer.bias = bias && scaled(bias, 1);
    }
    this.#state = "merged";
  }

  #mergedBias({ layer, bias = layer.bias, loraBias, scale: s }: LoraPair): Tensor | undefined {
    if (!bias || (bias === layer.bias && !loraBias)) return layer.bias;
    return loraBias ? axpy(1, bias, this.#factor * s, loraBias) : scaled(bias, 1);
  }

  /** Puts the original weights back, bit for bit, and enables the adapter. */
  unmerge(): void {
    this.#demand("unmerge", "merged");
    for (const [layer, { weight, bias }] of this.#originals) {
      const merged = [...tensorsIn(layer.weight), ...(layer.bias && layer.bias !== bias ? [layer.bias] : [])];
      layer.weight.gpu.release(...merged);
      layer.weight = weight;
      layer.bias = bias;
    }
    this.#originals.clear();
    this.#state = "disabled";
    this.enable();
  }

  /** Takes the adapter off and frees its tensors. A merged adapter stays merged into the weights, for good. */
  detach(): void {
    if (this.#state === "detached") return;
    if (this.#state === "merged")
      for (const [layer, { weight, bias }] of this.#originals)
        weight.gpu.release(...tensorsIn(weight), ...(bias && bias !== layer.bias ? [bias] : []));
    else this.disable();
    const begun = [...this.#beginnings.values()].flatMap(({ A, B, residual }) => [A, B, residual]);
    this.#flat.gpu.release(this.#flat, ...this.#squares.values(), ...begun);
    this.#originals.clear();
    this.#state = "detached";
  }

  #demand(call: string, ...states: string[]): void {
    if (!states.includes(this.#state))
      throw new ShapeError(`${call}: the adapter must be ${states.join(" or ")}, got ${this.#state}`);
  }
}

/**
 * Adds a fresh adapter to the modules that `config` names: A uniform in ±1/√K (Kaiming, as PEFT), B zero, and DoRA's magnitudes the norms of
 * the rows, so that the model's output is unchanged at first; a classifier's head is trained whole. The base weights are frozen by not requiring gradients; the adapter's parts
 * require them.
 *
 * Throws ShapeError for settings out of range and for a target that matches nothing.
 */
export function attachLora(model: HasLinears, settings: LoraConfig, seed = 0): LoraAdapter {
  const config = model.taskType === "SEQ_CLS" ? { modulesToSave: CLASSIFIER_HEADS, ...settings } : settings;
  checkConfig(config);
  const random = new Random(seed);
  return attachPairs(model, config, ({ name, layer }) => {
    const { r, scale: s } = settingsOf(config, name);
    const [N = 0, K = 0] = layer.weight.shape;
    const { gpu } = layer.weight;
    const bound = 1 / Math.sqrt(K);
    const A = tensor(
      gpu,
      Float32Array.from({ length: r * K }, () => random.uniform(-bound, bound)),
      [r, K],
    );
    const B = tensor(gpu, new Float32Array(N * r), [N, r]);
    const bias = config.bias === "lora_only" && layer.bias ? empty(gpu, [N], "bias") : undefined;
    if (bias && layer.bias) copyTo(layer.bias, bias);
    return {
      ...{ A, B, bias },
      loraBias: config.loraBias ? tensor(gpu, new Float32Array(N), [N]) : undefined,
      magnitude: config.useDora
        ? gpu.scope(() => doraNorms(layer.weight, A, B, rowSquares(layer.weight), s).gain)
        : undefined,
    };
  });
}

/**
 * Attaches the parts that `make` gives for the matched modules. They move into one buffer, one behind the other, so that an optimizer can
 * go over all of them at once: first every A, then the others; what is between them, for alignment, is zero. The A's of a group of the
 * model come in a row, which makes them one matrix, unless there is something between them or their ranks or scales differ. What `save` gives
 * for the layers that are trained whole, copies unless given, comes last.
 */
export function attachPairs(
  model: HasLinears,
  config: LoraConfig,
  make: (module: { readonly name: string; readonly layer: Linear }) => LoraParts,
  save: (module: { readonly name: string; readonly layer: Linear }) => SavedParts = copyOf,
): LoraAdapter {
  const savedNames = savedModulesOf(config, model);
  const modules = modulesOf(config, [...model.linears.keys()]).flatMap((name) => {
    const layer = model.linears.get(name);
    return layer ? [{ name, layer, parts: make({ name, layer }), scale: settingsOf(config, name).scale }] : [];
  });
  const whole = savedNames.flatMap((name) => {
    const layer = model.linears.get(name);
    return layer ? [{ name, layer, parts: save({ name, layer }) }] : [];
  });
  const gpu = modules[0]?.layer.weight.gpu;
  if (!gpu) throw new ShapeError("lora: an adapter needs a layer, got none");
  const step = VIEW_ALIGNMENT / 4;
  const starts = new Map<Tensor, number>();
  let size = 0;
  const place = (t: Tensor | undefined): void => {
    if (!t || starts.has(t)) return;
    starts.set(t, size);
    size += Math.ceil(t.size / step) * step;
  };
  const groups = (model.groups ?? []).map((names) => modules.filter(({ name }) => names.includes(name)));
  for (const module of modules) {
    for (const { parts } of groups.find((group) => group.includes(module)) ?? []) place(parts.A);
    place(module.parts.A);
  }
  for (const { parts } of modules) for (const part of PARTS) place(parts[part]);
  for (const { parts } of whole) [parts.weight, parts.bias].forEach(place);
  const flat = tensor(gpu, new Float32Array(size), [size]);
  const move = (t: Tensor): Tensor => {
    const moved = slice(flat, starts.get(t) ?? 0, t.shape);
    copyTo(t, moved);
    gpu.release(t);
    moved.requiresGrad = true;
    return moved;
  };
  const pairs = modules.map(({ name, layer, parts, scale: s }) => {
    const moved = Object.fromEntries(PARTS.flatMap((part) => (parts[part] ? [[part, move(parts[part])]] : [])));
    return [name, { layer, scale: s, ...(moved as unknown as LoraParts) }] as const;
  });
  const stacked = groups.flatMap((members): Group[] => {
    const [first] = members;
    if (!first || members.length < 2 || members.some(({ parts }) => parts.A.size % step !== 0)) return [];
    const [r = 0, K = 0] = first.parts.A.shape;
    if (members.some(({ parts, scale: s }) => parts.A.shape[0] !== r || s !== first.scale)) return [];
    const names = members.map(({ name }) => name);
    return [{ names, A: slice(flat, starts.get(first.parts.A) ?? 0, [members.length * r, K]) }];
  });
  const saved = whole.map(({ name, layer, parts: { weight, bias } }) => {
    return [name, { layer, weight: move(weight), bias: bias && move(bias) }] as const;
  });
  const fanInFanOut = modules.some(({ name }) => model.isTransposed?.(`${name}.weight`));
  const { taskType = "CAUSAL_LM" } = model;
  try {
    return new LoraAdapter({ ...config, fanInFanOut, taskType }, new Map(pairs), flat, stacked, new Map(saved));
  } catch (error) {
    gpu.release(flat);
    throw error;
  }
}

function copyOf({ layer: { weight, bias } }: { readonly layer: Linear }): SavedParts {
  if (isPacked(weight))
    throw new ShapeError(
      `lora: modules_to_save are trained as f32, got one packed as ${weight.format}. Load it as f32`,
    );
  return { weight: scaled(weight, 1), bias: bias && scaled(bias, 1) };
}

/**
 * The layers that `modulesToSave` names. Throws ShapeError where an entry names none, unless it is one that PEFT adds, or something that is
 * not a linear layer, such as an embedding, and cannot be trained whole yet.
 */
export function savedModulesOf(config: LoraConfig, model: HasLinears): string[] {
  const { modulesToSave = [] } = config;
  const names = [...model.linears.keys()].filter((name) => isSaved(modulesToSave, name));
  const owners = [...(model.weights?.keys() ?? [])].map((key) => key.replace(/\.[^.]*$/, ""));
  const bad =
    owners.find((name) => isSaved(modulesToSave, name) && !model.linears.has(name)) ??
    names.find((name) => model.isTransposed?.(`${name}.weight`)) ??
    modulesToSave.find(
      (entry) =>
        !names.some((name) => isSaved([entry], name)) && !(names.length > 0 && CLASSIFIER_HEADS.includes(entry)),
    );
  if (bad !== undefined)
    throw new ShapeError(
      `lora: modules_to_save must name linear layers that files have as [N,K], got "${bad}". Others cannot be trained whole yet`,
    );
  return names;
}
