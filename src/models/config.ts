/** `config.json` of a Hugging Face model, checked key by key. */
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { isObject, type JsonObject, readJson } from "../io/json.ts";
import type { RopeSettings } from "../nn/rope.ts";

/** The settings of a Llama-architecture decoder. Sizes by the letters of the field: B T C H V. */
export interface LlamaConfig {
  readonly modelType: "llama";
  readonly vocabSize: number;
  /** Width of the residual stream. */
  readonly hiddenSize: number;
  /** Width of the MLP's inside. */
  readonly intermediateSize: number;
  readonly layers: number;
  readonly heads: number;
  /** Key and value heads; fewer than `heads` is grouped-query attention. */
  readonly kvHeads: number;
  readonly headDim: number;
  /** Positions the model was made for: rows may be no longer. */
  readonly contextLength: number;
  readonly rmsNormEps: number;
  readonly activation: "silu" | "gelu" | "geluTanh";
  readonly rope: RopeSettings;
  readonly attentionBias: boolean;
  readonly mlpBias: boolean;
  /** The output projection is the embedding itself. */
  readonly tiedEmbeddings: boolean;
  readonly bosId: number | undefined;
  readonly eosIds: readonly number[];
}

const ACTIVATIONS = { silu: "silu", gelu: "gelu", gelu_pytorch_tanh: "geluTanh", gelu_new: "geluTanh" } as const;

/** Reads `config.json` and `generation_config.json`. Throws FormatError for a model this engine has not, naming those it has. */
export async function readConfig(directory: Directory): Promise<LlamaConfig> {
  const name = `${directory.name}/config.json`;
  const json = await readJson(directory, "config.json");
  if (!json) throw new FormatError(`${name}: a model directory must have it, got no such file. Check the path`);
  const generation = (await readJson(directory, "generation_config.json")) ?? {};
  if (json.model_type !== "llama")
    throw new FormatError(
      `${name}: "model_type" must be "llama", got ${JSON.stringify(json.model_type)}. No other architecture is supported yet`,
    );
  return llamaConfig(json, generation, name);
}

function llamaConfig(json: JsonObject, generation: JsonObject, name: string): LlamaConfig {
  const fail = (key: string, rule: string): never => {
    throw new FormatError(`${name}: "${key}" must be ${rule}, got ${JSON.stringify(json[key])}`);
  };
  const count = (key: string, fallback?: number): number => {
    const value = json[key] ?? fallback;
    return typeof value === "number" && Number.isInteger(value) && value > 0
      ? value
      : fail(key, "a whole number above 0");
  };
  const positive = (key: string, fallback: number): number => {
    const value = json[key] ?? fallback;
    return typeof value === "number" && value > 0 ? value : fail(key, "a number above 0");
  };
  const flag = (key: string): boolean => {
    const value = json[key] ?? false;
    return typeof value === "boolean" ? value : fail(key, "true or false");
  };
  const hiddenSize = count("hidden_size");
  const heads = count("num_attention_heads");
  const kvHeads = count("num_key_value_heads", heads);
  if (heads % kvHeads !== 0) fail("num_key_value_heads", `a divisor of num_attention_heads = ${heads}`);
  const headDim = count("head_dim", Math.floor(hiddenSize / heads));
  if (headDim % 4 !== 0) fail("head_dim", "a multiple of 4");
  const contextLength = count("max_position_embeddings", 2048);
  const activation =
    ACTIVATIONS[(json.hidden_act ?? "silu") as keyof typeof ACTIVATIONS] ??
    fail("hidden_act", `one of ${Object.keys(ACTIVATIONS).join(", ")}`);
  const ids = (value: unknown): number[] =>
    (Array.isArray(value) ? value : [value]).filter((id) => typeof id === "number");
  return {
    modelType: "llama",
    vocabSize: count("vocab_size"),
    hiddenSize,
    intermediateSize: count("intermediate_size"),
    layers: count("num_hidden_layers"),
    heads,
    kvHeads,
    headDim,
    contextLength,
    rmsNormEps: positive("rms_norm_eps", 1e-6),
    activation,
    rope: ropeSettings(json, contextLength, name),
    attentionBias: flag("attention_bias"),
    mlpBias: flag("mlp_bias"),
    tiedEmbeddings: flag("tie_word_embeddings"),
    bosId: ids(json.bos_token_id ?? generation.bos_token_id)[0],
    eosIds: ids(generation.eos_token_id ?? json.eos_token_id),
  };
}

/**
 * RoPE in both spellings: transformers 5 writes `rope_parameters` with the base inside, before it were `rope_theta` and
 * `rope_scaling`. Where a file has both, `rope_scaling` counts, as in transformers.
 */
function ropeSettings(json: JsonObject, contextLength: number, name: string): RopeSettings {
  const key = isObject(json.rope_scaling) ? "rope_scaling" : "rope_parameters";
  const settings = isObject(json[key]) ? json[key] : {};
  const number = (field: string, fallback: unknown): number => {
    const value = settings[field] ?? fallback;
    if (typeof value !== "number" || !(value > 0))
      throw new FormatError(`${name}: "${field}" of ${key} must be a number above 0, got ${JSON.stringify(value)}`);
    return value;
  };
  const theta = number("rope_theta", json.rope_theta ?? 10000);
  const type = settings.rope_type ?? settings.type ?? "default";
  if (type === "default") return { type, theta };
  if (type !== "llama3")
    throw new FormatError(
      `${name}: "rope_type" must be "default" or "llama3", got ${JSON.stringify(type)}. Other scalings are not supported yet`,
    );
  return {
    type,
    theta,
    factor: number("factor", undefined),
    lowFreqFactor: number("low_freq_factor", undefined),
    highFreqFactor: number("high_freq_factor", undefined),
    originalLength: number("original_max_position_embeddings", contextLength),
  };
}
