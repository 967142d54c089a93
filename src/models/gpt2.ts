/**
 * GPT-2: learned positions, LayerNorm, one layer for q, k and v, and a plain MLP.        Radford et al., 2019
 *
 *     h = h + Wo·attention(split(Wqkv·n))        n = layerNorm(h)
 *     h = h + Wproj·gelu(Wfc·n)                  n = layerNorm(h)
 *
 * Its files store linear layers as Conv1D, [K,N]; here they are [N,K] as everywhere, and turned around on the way in and out.
 */
import { add, reshape, split } from "../autograd/basic-ops.ts";
import { recompute } from "../autograd/engine.ts";
import { layerNorm } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { JsonObject } from "../io/json.ts";
import { type Activation, activate } from "../nn/activation.ts";
import { type Linear, linear } from "../nn/linear.ts";
import { inUse, type Norm } from "../nn/module.ts";
import { embed, type Table } from "../nn/table.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";
import { attend, CausalModel, type HiddenOptions, type Places } from "./causal.ts";
import { ConfigReader, tokenIds } from "./config-reader.ts";
import type { CausalConfig } from "./decoder-config.ts";
import { type Limits, Shapes, type WeightMap, Weights } from "./weights.ts";

export interface Gpt2Config extends CausalConfig {
  readonly modelType: "gpt2";
  readonly intermediateSize: number;
  readonly layerNormEps: number;
  readonly activation: Activation;
  /** Factors on q·k of each layer. */
  readonly attentionScales: readonly number[];
}

interface Block {
  readonly norms: readonly [Norm, Norm];
  readonly qkv: Linear;
  readonly o: Linear;
  readonly fc: Linear;
  readonly down: Linear;
}

/** Whether the file has this weight as Conv1D, [K,N]. */
export const isConv1D = (name: string): boolean => /\.c_(attn|proj|fc)\.weight$/.test(name);

const layerName = (i: number): string => `transformer.h.${i}`;

/** Throws FormatError naming the key that is missing or wrong. */
export function gpt2Config(json: JsonObject, generation: JsonObject, name: string): Gpt2Config {
  const read = new ConfigReader(json, name);
  const hiddenSize = read.count("n_embd", 768);
  const heads = read.count("n_head", 12);
  if (hiddenSize % (4 * heads) !== 0) read.fail("n_embd", `a multiple of 4 · n_head = ${4 * heads}`);
  const headDim = hiddenSize / heads;
  const layers = read.count("n_layer", 12);
  const isScaled = read.flag("scale_attn_weights", true);
  const byLayer = read.flag("scale_attn_by_inverse_layer_idx");
  return {
    modelType: "gpt2",
    vocabSize: read.count("vocab_size", 50257),
    hiddenSize,
    intermediateSize: read.count("n_inner", 4 * hiddenSize),
    layers,
    heads,
    kvHeads: heads,
    headDim,
    contextLength: read.count("n_positions", 1024),
    layerNormEps: read.positive("layer_norm_epsilon", 1e-5),
    activation: read.activation("activation_function", "gelu_new"),
    attentionScales: Array.from({ length: layers }, (_, i) => (isScaled ? headDim ** -0.5 : 1) / (byLayer ? i + 1 : 1)),
    tiedEmbeddings: read.flag("tie_word_embeddings", true),
    bosId: tokenIds(json.bos_token_id ?? generation.bos_token_id)[0],
    eosIds: tokenIds(generation.eos_token_id ?? json.eos_token_id),
  };
}

export class Gpt2 extends CausalModel<Gpt2Config> {
  readonly groups: readonly (readonly string[])[] = [];
  readonly #tokens: Table;
  readonly #positions: Table;
  readonly #blocks: readonly Block[];
  readonly #norm: Norm;

  /** `weights` by Hugging Face name, complete and in the order of `gpt2Shapes`, linear layers [N,K]. */
  constructor(gpu: Gpu, config: Gpt2Config, weights: WeightMap) {
    const all = new Weights(weights);
    const norm = (name: string): Norm => all.norm(name);
    const tokens = all.table("transformer.wte");
    const blocks = Array.from({ length: config.layers }, (_, i): Block => {
      const at = layerName(i);
      return {
        norms: [norm(`${at}.ln_1`), norm(`${at}.ln_2`)],
        qkv: all.linear(`${at}.attn.c_attn`),
        o: all.linear(`${at}.attn.c_proj`),
        fc: all.linear(`${at}.mlp.c_fc`),
        down: all.linear(`${at}.mlp.c_proj`),
      };
    });
    const positions = all.table("transformer.wpe");
    const last = norm("transformer.ln_f");
    super(gpu, config, all, all.table("lm_head", "head", config.tiedEmbeddings ? tokens : undefined));
    this.#tokens = tokens;
    this.#positions = positions;
    this.#blocks = blocks;
    this.#norm = last;
  }

  override isTransposed(name: string): boolean {
    return isConv1D(name);
  }

  hidden(ids: Tensor, options: HiddenOptions = {}): Tensor {
    const places = this.places(ids, options);
    const { cache } = options;
    const [, T = 0] = ids.shape;
    const at =
      places.positions ??
      tensor(
        this.gpu,
        Int32Array.from({ length: T }, (_, t) => places.start + t),
        [1, T],
      );
    let sum = add(embed(this.#tokens, ids, options.noise), embed(this.#positions, at));
    this.#blocks.forEach((block, i) => {
      const run = (x: Tensor): Tensor => this.#block(block, i, x, places);
      sum = this.checkpointing && !cache ? recompute(sum, run) : run(sum);
    });
    if (cache) cache.length = places.end;
    return this.#normed(sum, this.#norm);
  }

  #normed(x: Tensor, norm: Norm): Tensor {
    const { weight, bias } = inUse(norm);
    return layerNorm(x, weight, bias as Tensor, this.config.layerNormEps);
  }

  #block({ norms, qkv, o, fc, down }: Block, i: number, x: Tensor, places: Places): Tensor {
    const { heads, headDim, hiddenSize: C, activation, attentionScales } = this.config;
    const [B = 0, T = 0] = x.shape;
    const apart = split(linear(qkv, this.#normed(x, norms[0])), [C, C, C]);
    const [q, k, v] = apart.map((t) => reshape(t, [B, T, heads, headDim])) as [Tensor, Tensor, Tensor];
    const mixed = attend(q, k, v, places, i, { scale: attentionScales[i] ?? 1 });
    const middle = add(x, linear(o, reshape(mixed, [B, T, C])));
    const inner = linear(fc, this.#normed(middle, norms[1]));
    return add(middle, linear(down, activate(inner, activation)));
  }
}

/** See `weightShapes`. */
export function gpt2Shapes(config: Gpt2Config, limits?: Limits): Shapes {
  const { hiddenSize: C, intermediateSize: I, vocabSize: V } = config;
  const shapes = new Shapes(limits);
  const norm = (name: string): void => {
    shapes.add(`${name}.weight`, C);
    shapes.add(`${name}.bias`, C);
  };
  shapes.table("transformer.wte.weight", V, C);
  shapes.add("transformer.wpe.weight", config.contextLength, C);
  for (let i = 0; i < config.layers; i++) {
    const at = layerName(i);
    norm(`${at}.ln_1`);
    shapes.linear(`${at}.attn.c_attn`, 3 * C, C, true);
    shapes.linear(`${at}.attn.c_proj`, C, C, true);
    norm(`${at}.ln_2`);
    shapes.linear(`${at}.mlp.c_fc`, I, C, true);
    shapes.linear(`${at}.mlp.c_proj`, C, I, true);
  }
  norm("transformer.ln_f");
  if (!config.tiedEmbeddings) shapes.table("lm_head.weight", V, C);
  return shapes;
}
