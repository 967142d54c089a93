/**
 * Decoders with RMSNorm, RoPE and a gated MLP: Llama, and what differs from it by its configuration (Mistral, Qwen, SmolLM, Gemma, Phi,
 * OLMo, Granite).
 *
 *     h = h + Wo·attention(rope(Wq·n), rope(Wk·n), Wv·n)     n = rmsNorm(h)
 *     h = h + Wdown·(act(Wgate·n) ∘ Wup·n)                    n = rmsNorm(h)
 *
 * Shapes: B rows, T positions, C = hiddenSize, H heads of D, G key-value heads, V words. arXiv:2302.13971, 2307.09288.
 */
import { add, reshape, scale, split } from "../autograd/basic-ops.ts";
import { recompute } from "../autograd/engine.ts";
import { addRmsNorm, gated, rmsNorm, rope } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import { type Linear, linear, linears } from "../nn/linear.ts";
import { inUse, type Norm } from "../nn/module.ts";
import { dependsOnLength, type RopeSettings, ropeTables } from "../nn/rope.ts";
import { embed, type Table } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { attend, CausalModel, type HiddenOptions, type Places } from "./causal.ts";
import type { DecoderConfig } from "./decoder-config.ts";
import { type Limits, Shapes, type WeightMap, Weights } from "./weights.ts";

/** The norms around a part of a block; after it means: of what it adds. */
interface Norms {
  readonly before: Norm | undefined;
  readonly after: Norm | undefined;
}

interface Block {
  readonly attention: {
    readonly norms: Norms;
    /** q, k and v, or one layer that is all of them. */
    readonly inputs: readonly Linear[];
    readonly queryNorm: Norm | undefined;
    readonly keyNorm: Norm | undefined;
    readonly o: Linear;
    readonly window: number | undefined;
    readonly rope: Rope | undefined;
  };
  readonly mlp: {
    readonly norms: Norms;
    /** gate and up, or one layer that is both. */
    readonly inputs: readonly Linear[];
    readonly down: Linear;
  };
}

interface Rope {
  readonly settings: RopeSettings;
  readonly tables: { readonly cos: Tensor; readonly sin: Tensor };
  /** "longrope": those of rows beyond the original length, which are the same for all. */
  readonly long: Rope["tables"] | undefined;
}

/** Where the norms of a block are, and what they go by. */
const NORMS = {
  before: { attention: ["input_layernorm", undefined], mlp: ["post_attention_layernorm", undefined] },
  after: { attention: [undefined, "post_attention_layernorm"], mlp: [undefined, "post_feedforward_layernorm"] },
  both: {
    attention: ["input_layernorm", "post_attention_layernorm"],
    mlp: ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
  },
} as const;

/** What the layers that read the residual stream go by. */
const inputNames = (at: string, isFused = false) =>
  isFused
    ? { attention: [`${at}.self_attn.qkv_proj`], mlp: [`${at}.mlp.gate_up_proj`] }
    : {
        attention: ["q", "k", "v"].map((one) => `${at}.self_attn.${one}_proj`),
        mlp: ["gate", "up"].map((one) => `${at}.mlp.${one}_proj`),
      };

const layerName = (i: number): string => `model.layers.${i}`;

export class Decoder extends CausalModel<DecoderConfig> {
  readonly groups: readonly (readonly string[])[];
  readonly #embedding: Table;
  readonly #blocks: readonly Block[];
  readonly #norm: Norm;
  readonly #ropes: readonly Rope[];

  /** `weights` by Hugging Face name, complete and in the order of `decoderShapes`. */
  constructor(gpu: Gpu, config: DecoderConfig, weights: WeightMap) {
    const all = new Weights(weights);
    const tokens = all.table("model.embed_tokens");
    const ropeOf = (settings: RopeSettings): Rope => {
      const of = (length: number) =>
        ropeTables(gpu, config.rotaryDim ?? config.headDim, config.contextLength, settings, length);
      const isLong = settings.type === "longrope" && dependsOnLength(settings, config.contextLength);
      return { settings, tables: of(0), long: isLong ? of(config.contextLength) : undefined };
    };
    const whole = ropeOf(config.rope);
    const windowed = config.windowRope ? ropeOf(config.windowRope) : whole;
    const blocks = Array.from({ length: config.layers }, (_, i) => {
      const window = config.windows?.[i];
      const hasRope = !config.isWithoutRope?.[i];
      return block(all, config, i, window, hasRope ? (window === undefined ? whole : windowed) : undefined);
    });
    const norm = all.norm("model.norm");
    const head = all.table("lm_head", "head", config.tiedEmbeddings ? tokens : undefined);
    super(gpu, config, all, head, config.logitCap);
    this.groups = blocks.flatMap((_, i) => Object.values(inputNames(layerName(i), config.isFused)));
    this.#embedding = tokens;
    this.#blocks = blocks;
    this.#norm = norm;
    this.#ropes = [...new Set([whole, windowed])];
  }

  hidden(ids: Tensor, options: HiddenOptions = {}): Tensor {
    const places = this.places(ids, options);
    const { cache } = options;
    const { embeddingScale = 1, logitScale = 1 } = this.config;
    let sum = times(embed(this.#embedding, ids, options.noise), embeddingScale);
    const first = (x: Tensor, norm: Norm | undefined): Tensor => (norm ? this.#normed(x, norm) : x);
    if (this.checkpointing && !cache) {
      this.#blocks.forEach(({ attention: own, mlp }, i) => {
        sum = recompute(sum, (x) => {
          const mixed = this.#attend(own, first(x, own.norms.before), places, i);
          const middle = this.#join(x, mixed, own.norms, mlp.norms.before);
          return this.#join(middle.sum, this.#feedForward(mlp, middle.y), mlp.norms, undefined).sum;
        });
      });
      return times(this.#normed(sum, this.#norm), logitScale);
    }
    let y = first(sum, this.#blocks[0]?.attention.norms.before);
    this.#blocks.forEach(({ attention: own, mlp }, i) => {
      const next = this.#blocks[i + 1];
      const following = next ? next.attention.norms.before : this.#norm;
      ({ sum, y } = this.#join(sum, this.#attend(own, y, places, i), own.norms, mlp.norms.before));
      ({ sum, y } = this.#join(sum, this.#feedForward(mlp, y), mlp.norms, following));
    });
    if (cache) cache.length = places.end;
    return times(y, logitScale);
  }

  override destroy(): void {
    super.destroy();
    const tables = this.#ropes.flatMap((one) => [one.tables, ...(one.long ? [one.long] : [])]);
    this.gpu.release(...tables.flatMap(({ cos, sin }) => [cos, sin]));
  }

  #normed(x: Tensor, norm: Norm): Tensor {
    return rmsNorm(x, inUse(norm).weight, this.config.rmsNormEps, this.config.normOffset);
  }

  /** The residual stream with what a part of a block adds, and what the next part reads: its norm, where it has one. */
  #join(x: Tensor, added: Tensor, { after }: Norms, next: Norm | undefined): { sum: Tensor; y: Tensor } {
    const { rmsNormEps, normOffset, residualScale = 1 } = this.config;
    const delta = times(after ? this.#normed(added, after) : added, residualScale);
    if (next) return addRmsNorm(x, delta, inUse(next).weight, rmsNormEps, normOffset);
    const sum = add(x, delta);
    return { sum, y: sum };
  }

  #attend(
    { inputs, queryNorm, keyNorm, o, window, rope: turn }: Block["attention"],
    n: Tensor,
    places: Places,
    i: number,
  ): Tensor {
    const { heads, kvHeads, headDim, attentionScale, attentionCap } = this.config;
    const [B = 0, T = 0] = n.shape;
    const widths = [heads * headDim, kvHeads * headDim, kvHeads * headDim];
    const [ofQ, ofK, ofV] = parts(inputs, n, widths) as [Tensor, Tensor, Tensor];
    const tables = turn && this.#tables(turn, places);
    const place = (x: Tensor, norm: Norm | undefined, count: number): Tensor => {
      const isWhole = norm?.weight.size === x.shape.at(-1); // of all heads at once
      const apart = reshape(norm && isWhole ? this.#normed(x, norm) : x, [B, T, count, headDim]);
      const y = norm && !isWhole ? this.#normed(apart, norm) : apart;
      return tables ? rope(y, tables.cos, tables.sin, places.positions ?? places.start) : y;
    };
    const queries = place(ofQ, queryNorm, heads);
    const keys = place(ofK, keyNorm, kvHeads);
    const options = { scale: attentionScale, softCap: attentionCap, window };
    const mixed = attend(queries, keys, reshape(ofV, [B, T, kvHeads, headDim]), places, i, options);
    return linear(o, reshape(mixed, [B, T, heads * headDim]));
  }

  /** Those of rows that end before position `end`. */
  #tables({ settings, tables, long }: Rope, { end, paged, packing }: Places): Rope["tables"] {
    if (!dependsOnLength(settings, end)) return tables;
    if (packing && "originalLength" in settings)
      throw new ShapeError(
        `hidden: angles of "${settings.type}" RoPE go by the length of a sequence past ${settings.originalLength} tokens, which a packed row has several of, got rows of ${end}. Leave out --packing, or make rows of at most ${settings.originalLength}`,
      );
    if (long) return long;
    if (paged && settings.type === "dynamic")
      throw new ShapeError(
        `hidden: angles of "dynamic" RoPE change as a sequence grows past ${settings.originalLength} tokens, which pages do not follow, got a context of ${end}. Limit it to ${settings.originalLength}`,
      );
    return ropeTables(this.gpu, this.config.rotaryDim ?? this.config.headDim, end, settings, end);
  }

  #feedForward({ inputs, down }: Block["mlp"], n: Tensor): Tensor {
    const { intermediateSize, activation } = this.config;
    const [gate, up] = parts(inputs, n, [intermediateSize, intermediateSize]) as [Tensor, Tensor];
    return linear(down, gated(gate, up, activation));
  }
}

const times = (x: Tensor, factor: number): Tensor => (factor === 1 ? x : scale(x, factor));

/** What several layers give for n, or the columns of what one gives. */
function parts(layers: readonly Linear[], n: Tensor, widths: readonly number[]): readonly Tensor[] {
  const [only, ...more] = layers;
  return only && more.length === 0 ? split(linear(only, n), widths) : linears(layers, n);
}

function block(
  weights: Weights,
  { norms = "before", queryKeyNorm, isFused }: DecoderConfig,
  i: number,
  window: number | undefined,
  turn: Rope | undefined,
): Block {
  const at = layerName(i);
  const inputs = inputNames(at, isFused);
  const normsOf = (part: "attention" | "mlp"): Norms => {
    const [before, after] = NORMS[norms][part].map((name) => name && weights.norm(`${at}.${name}`));
    return { before, after };
  };
  const attentionInputs = inputs.attention.map((name) => weights.linear(name));
  const o = weights.linear(`${at}.self_attn.o_proj`);
  return {
    attention: {
      norms: normsOf("attention"),
      inputs: attentionInputs,
      queryNorm: queryKeyNorm && weights.norm(`${at}.self_attn.q_norm`),
      keyNorm: queryKeyNorm && weights.norm(`${at}.self_attn.k_norm`),
      ...{ o, window, rope: turn },
    },
    mlp: {
      norms: normsOf("mlp"),
      inputs: inputs.mlp.map((name) => weights.linear(name)),
      down: weights.linear(`${at}.mlp.down_proj`),
    },
  };
}

/** See `weightShapes`. */
export function decoderShapes(config: DecoderConfig, limits?: Limits): Shapes {
  const { hiddenSize: C, intermediateSize: I, headDim: D, vocabSize: V, norms = "before", isFused } = config;
  const [Q, KV] = [config.heads * D, config.kvHeads * D];
  const shapes = new Shapes(limits);
  shapes.table("model.embed_tokens.weight", V, C);
  for (let i = 0; i < config.layers; i++) {
    const at = layerName(i);
    const inputs = inputNames(at, isFused);
    const norm = (part: "attention" | "mlp", side: 0 | 1): void => {
      const name = NORMS[norms][part][side];
      if (name) shapes.add(`${at}.${name}.weight`, C);
    };
    const layers = (names: readonly string[], widths: readonly number[], bias: boolean): void => {
      const isOne = names.length === 1;
      names.forEach((name, n) => {
        shapes.linear(name, isOne ? widths.reduce((a, b) => a + b, 0) : (widths[n] ?? 0), C, bias);
      });
    };
    norm("attention", 0);
    layers(inputs.attention, [Q, KV, KV], config.attentionBias !== false);
    if (config.queryKeyNorm) {
      shapes.add(`${at}.self_attn.q_norm.weight`, config.queryKeyNorm === "all" ? Q : D);
      shapes.add(`${at}.self_attn.k_norm.weight`, config.queryKeyNorm === "all" ? KV : D);
    }
    shapes.linear(`${at}.self_attn.o_proj`, C, Q, config.attentionBias === true);
    norm("attention", 1);
    norm("mlp", 0);
    layers(inputs.mlp, [I, I], config.mlpBias);
    shapes.linear(`${at}.mlp.down_proj`, C, I, config.mlpBias);
    norm("mlp", 1);
  }
  shapes.add("model.norm.weight", C);
  if (!config.tiedEmbeddings) shapes.table("lm_head.weight", V, C);
  return shapes;
}
