/** What a decoder's `config.json` says, in one shape for all architectures: Llama's, and how the others differ from it. */
import type { JsonObject } from "../io/json.ts";
import type { Activation } from "../nn/activation.ts";
import type { RopeSettings } from "../nn/rope.ts";
import { ConfigReader, tokenIds } from "./config-reader.ts";

/** What every model that predicts tokens has. Sizes by the letters of the field: B T C H V. */
export interface CausalConfig {
  /** As in `config.json`: "llama", "qwen2" … */
  readonly modelType: string;
  readonly vocabSize: number;
  /** Width of the residual stream. */
  readonly hiddenSize: number;
  readonly layers: number;
  readonly heads: number;
  /** Key and value heads; fewer than `heads` is grouped-query attention. */
  readonly kvHeads: number;
  readonly headDim: number;
  /** Positions the model was made for: rows may be no longer. */
  readonly contextLength: number;
  /** The output projection is the embedding itself. */
  readonly tiedEmbeddings: boolean;
  readonly bosId: number | undefined;
  readonly eosIds: readonly number[];
}

/** The settings of a decoder with RMSNorm, RoPE and a gated MLP. What may be missing is as in Llama where it is. */
export interface DecoderConfig extends CausalConfig {
  /** Width of the MLP's inside. */
  readonly intermediateSize: number;
  readonly rmsNormEps: number;
  readonly activation: Activation;
  readonly rope: RopeSettings;
  /** Of q, k, v and o, or of q, k and v alone. */
  readonly attentionBias: boolean | "qkv";
  readonly mlpBias: boolean;

  /** Elements of a head that RoPE turns: all of them. */
  readonly rotaryDim?: number;
  /** How many keys up to its own position a query sees, by layer: all of them. */
  readonly windows?: readonly (number | undefined)[];
  /** RoPE of the layers with a window, where it is another one. */
  readonly windowRope?: RopeSettings;
  /** Layers without RoPE. */
  readonly isWithoutRope?: readonly boolean[];
  /** Where attention and MLP have their norms: before them. */
  readonly norms?: "before" | "after" | "both";
  /** What is added to the weight of every norm: 0. */
  readonly normOffset?: number;
  /** RMSNorm of queries and keys, of each head by itself or over all heads at once: none. */
  readonly queryKeyNorm?: "heads" | "all";
  /** q, k and v are one layer, and so are gate and up. */
  readonly isFused?: boolean;
  /** Factor on q·k: 1/√headDim. */
  readonly attentionScale?: number;
  /** c: a score x becomes c·tanh(x/c), and so does a logit. */
  readonly attentionCap?: number;
  readonly logitCap?: number;
  /** Factors on the embedding, on what attention and MLP add, and on the logits: 1. */
  readonly embeddingScale?: number;
  readonly residualScale?: number;
  readonly logitScale?: number;
}

/** How the `config.json` of an architecture is read: what differs from Llama, in its keys and defaults. */
interface Family {
  readonly defaultTheta?: number;
  readonly defaultEps?: number;
  readonly isTied?: boolean;
  /** Its key, and what it is where that is missing. */
  readonly activation?: readonly [key: string, fallback: string];
  readonly bias?: "none" | "qkv";
  readonly differs?: (read: ConfigReader, sizes: Sizes) => Partial<DecoderConfig>;
}

interface Sizes {
  readonly hiddenSize: number;
  readonly headDim: number;
  readonly layers: number;
  readonly contextLength: number;
}

const GEMMA: Family = { isTied: true, activation: ["hidden_activation", "gelu_pytorch_tanh"] };

const gemma = (read: ConfigReader, { hiddenSize, headDim }: Sizes): Partial<DecoderConfig> => ({
  ...{ norms: "both", normOffset: 1, embeddingScale: Math.fround(Math.sqrt(hiddenSize)) },
  attentionScale: read.positive("query_pre_attn_scalar", headDim) ** -0.5,
  ...(read.has("final_logit_softcapping") && { logitCap: read.positive("final_logit_softcapping", 1) }),
});

/** By `model_type`. */
const FAMILIES: Readonly<Record<string, Family>> = {
  llama: {},
  mistral: {
    bias: "none",
    differs: (read, { layers }) => ({ windows: windowsOf(read, layers, () => read.has("sliding_window")) }),
  },
  qwen2: { bias: "qkv", differs: qwenWindows },
  qwen3: { differs: (read, sizes) => ({ ...qwenWindows(read, sizes), queryKeyNorm: "heads" }) },
  smollm3: {
    ...{ isTied: true, defaultTheta: 2_000_000 },
    differs: (read, { layers }) => {
      const interval = read.count("no_rope_layer_interval", 4);
      const given = read.perLayer("no_rope_layers", layers); // 1 where there is RoPE
      const hasRope = (i: number): boolean => (given ? given[i] === 1 : (i + 1) % interval !== 0);
      return {
        isWithoutRope: Array.from({ length: layers }, (_, i) => !hasRope(i)),
        windows: windowsOf(read, layers, (i) => read.flag("use_sliding_window") && !hasRope(i)),
      };
    },
  },
  gemma2: {
    ...GEMMA,
    differs: (read, sizes) => ({
      ...gemma(read, sizes),
      ...(read.has("attn_logit_softcapping") && { attentionCap: read.positive("attn_logit_softcapping", 1) }),
      windows: windowsOf(read, sizes.layers, (i) => i % 2 === 0),
    }),
  },
  gemma3_text: {
    ...{ ...GEMMA, defaultTheta: 1_000_000 },
    differs: (read, sizes) => {
      const pattern = read.count("sliding_window_pattern", 6);
      return {
        ...{ ...gemma(read, sizes), queryKeyNorm: "heads" },
        windows: windowsOf(read, sizes.layers, (i) => (i + 1) % pattern !== 0),
        windowRope: gemmaWindowRope(read, sizes),
      };
    },
  },
  phi3: {
    ...{ bias: "none", defaultEps: 1e-5 },
    differs: (read, { layers }) => ({
      isFused: true,
      windows: windowsOf(read, layers, () => read.has("sliding_window")),
    }),
  },
  olmo2: { defaultEps: 1e-5, differs: () => ({ norms: "after", queryKeyNorm: "all" }) },
  granite: {
    differs: (read) => ({
      attentionScale: read.positive("attention_multiplier", 1),
      embeddingScale: read.positive("embedding_multiplier", 1),
      residualScale: read.positive("residual_multiplier", 1),
      logitScale: 1 / read.positive("logits_scaling", 1),
    }),
  },
};

/** What `decoderConfig` reads. */
export const DECODER_TYPES: readonly string[] = Object.keys(FAMILIES);

/** The window of each layer: `layer_types` says which have one, or else `isSliding`. */
function windowsOf(read: ConfigReader, layers: number, isSliding: (layer: number) => boolean): (number | undefined)[] {
  const types = read.perLayer("layer_types", layers);
  return Array.from({ length: layers }, (_, i) => {
    const slides = types ? types[i] === "sliding_attention" : isSliding(i);
    if (types && !slides && types[i] !== "full_attention")
      read.fail("layer_types", "a list of full_attention and sliding_attention");
    return slides ? read.count("sliding_window") : undefined;
  });
}

function qwenWindows(read: ConfigReader, { layers }: Sizes): Partial<DecoderConfig> {
  const first = read.json.max_window_layers ?? 28;
  return { windows: windowsOf(read, layers, (i) => read.flag("use_sliding_window") && i >= Number(first)) };
}

function gemmaWindowRope(read: ConfigReader, { contextLength }: Sizes): RopeSettings {
  const base = read.positive("rope_local_base_freq", 10_000);
  const isOld = !read.has("rope_parameters");
  return isOld
    ? { type: "default", theta: base }
    : read.rope({ length: contextLength, defaultTheta: base }, "sliding_attention");
}

/**
 * The positions that RoPE was extended to. YaRN's are its original context times its factor, as in vLLM; `length`, max_position_embeddings, is the
 * one or the other.
 */
function extended(length: number, rope: RopeSettings): number {
  if (rope.type === "dynamic") return Math.floor(length * rope.factor);
  return rope.type === "yarn" ? Math.max(length, Math.floor(rope.originalLength * rope.factor)) : length;
}

/** Throws FormatError naming the key that is missing or wrong. */
export function decoderConfig(json: JsonObject, generation: JsonObject, name: string): DecoderConfig {
  const read = new ConfigReader(json, name);
  const modelType = String(json.model_type);
  const family = FAMILIES[modelType] as Family;
  const { defaultTheta = 10_000, defaultEps = 1e-6, isTied = false, bias, differs } = family;
  const { activation = ["hidden_act", "silu"] } = family;
  const hiddenSize = read.count("hidden_size");
  const heads = read.count("num_attention_heads");
  const kvHeads = read.count("num_key_value_heads", heads);
  if (heads % kvHeads !== 0) read.fail("num_key_value_heads", `a divisor of num_attention_heads = ${heads}`);
  const headDim = read.count("head_dim", Math.floor(hiddenSize / heads));
  if (headDim % 4 !== 0) read.fail("head_dim", "a multiple of 4");
  const length = read.count("max_position_embeddings", 2048);
  const rope = read.rope({ length, defaultTheta }, "full_attention");
  const contextLength = extended(length, rope);
  const rotaryDim = Math.floor(headDim * read.partialRotary());
  if (rotaryDim % 2 !== 0) read.fail("partial_rotary_factor", `such that it turns an even share of ${headDim}`);
  const layers = read.count("num_hidden_layers");
  return {
    modelType,
    vocabSize: read.count("vocab_size"),
    hiddenSize,
    intermediateSize: read.count("intermediate_size"),
    layers,
    heads,
    kvHeads,
    headDim,
    contextLength,
    rmsNormEps: read.positive("rms_norm_eps", defaultEps),
    activation: read.activation(...activation),
    rope,
    attentionBias: bias === undefined ? read.flag("attention_bias") : bias === "qkv" ? "qkv" : false,
    mlpBias: bias === undefined && read.flag("mlp_bias"),
    tiedEmbeddings: read.flag("tie_word_embeddings", isTied),
    bosId: tokenIds(json.bos_token_id ?? generation.bos_token_id)[0],
    eosIds: tokenIds(generation.eos_token_id ?? json.eos_token_id),
    ...(rotaryDim < headDim && { rotaryDim }),
    ...differs?.(read, { hiddenSize, headDim, layers, contextLength }),
  };
}
