import { FormatError } from "../io/errors.ts";
import { isObject, type JsonObject } from "../io/json.ts";
import type { Activation } from "../nn/activation.ts";
import type { RopeSettings } from "../nn/rope.ts";

const ACTIVATIONS = {
  silu: "silu",
  swish: "silu",
  gelu: "gelu",
  gelu_pytorch_tanh: "geluTanh",
  gelu_new: "geluTanh",
} as const;

/** What scales angles beyond the context of the pre-training. */
interface RopeContext {
  /** max_position_embeddings */
  readonly length: number;
  readonly defaultTheta: number;
}

/** The keys of a `config.json`, each checked as it is read. Its methods throw FormatError naming file, key, rule and value. */
export class ConfigReader {
  readonly json: JsonObject;
  readonly #name: string;

  constructor(json: JsonObject, name: string) {
    this.json = json;
    this.#name = name;
  }

  /** The value, unless it is null or missing. */
  has(key: string): boolean {
    return (this.json[key] ?? undefined) !== undefined;
  }

  fail(key: string, rule: string, way = ""): never {
    throw new FormatError(`${this.#name}: "${key}" must be ${rule}, got ${JSON.stringify(this.json[key])}${way}`);
  }

  /** A whole number above 0. */
  count(key: string, fallback?: number): number {
    const value = this.json[key] ?? fallback;
    return typeof value === "number" && Number.isInteger(value) && value > 0
      ? value
      : this.fail(key, "a whole number above 0");
  }

  /** A number above 0. */
  positive(key: string, fallback: number): number {
    const value = this.json[key] ?? fallback;
    return typeof value === "number" && value > 0 && Number.isFinite(value)
      ? value
      : this.fail(key, "a number above 0");
  }

  flag(key: string, fallback = false): boolean {
    const value = this.json[key] ?? fallback;
    return typeof value === "boolean" ? value : this.fail(key, "true or false");
  }

  activation(key: string, fallback: string): Activation {
    const value = this.json[key] ?? fallback;
    return Object.hasOwn(ACTIVATIONS, value as string)
      ? ACTIVATIONS[value as keyof typeof ACTIVATIONS]
      : this.fail(key, `one of ${Object.keys(ACTIVATIONS).join(", ")}`);
  }

  /** A list with one entry for each layer, where there is one. */
  perLayer(key: string, layers: number): readonly unknown[] | undefined {
    if (!this.has(key)) return undefined;
    const value = this.json[key];
    return Array.isArray(value) && value.length === layers ? value : this.fail(key, `a list of ${layers} entries`);
  }

  /**
   * RoPE in both spellings: transformers 5 writes `rope_parameters` with the base inside, before it were `rope_theta` and
   * `rope_scaling`. Where a file has both, `rope_scaling` counts, as in transformers. `part` is a part of `rope_parameters` by itself.
   */
  rope({ length, defaultTheta }: RopeContext, part?: string): RopeSettings {
    const key = isObject(this.json.rope_scaling) ? "rope_scaling" : "rope_parameters";
    const whole = isObject(this.json[key]) ? this.json[key] : {};
    const inner = part === undefined ? undefined : whole[part];
    const settings = isObject(inner) ? inner : whole;
    const fail = (field: string, rule: string, value: unknown): never => {
      throw new FormatError(`${this.#name}: "${field}" of ${key} must be ${rule}, got ${JSON.stringify(value)}`);
    };
    const number = (field: string, fallback: unknown): number => {
      const value = settings[field] ?? fallback;
      return typeof value === "number" && value > 0 ? value : fail(field, "a number above 0", value);
    };
    const numbers = (field: string): number[] => {
      const value = settings[field];
      return Array.isArray(value) && value.length > 0 && value.every((n) => typeof n === "number" && n > 0)
        ? value
        : fail(field, "a list of numbers above 0", value);
    };
    const theta = number("rope_theta", this.json.rope_theta ?? defaultTheta);
    const named = String(settings.rope_type ?? settings.type ?? "default");
    const isLongrope = named === "su" || (named === "yarn" && settings.short_factor !== undefined); // Phi-3's first names for it
    const type = isLongrope ? "longrope" : named;
    // Some models say outside what the pre-training's context was.
    const originalLength = (): number =>
      this.has("original_max_position_embeddings")
        ? this.count("original_max_position_embeddings")
        : number("original_max_position_embeddings", length);
    switch (type) {
      case "default":
        return { type, theta };
      case "linear":
        return { type, theta, factor: number("factor", undefined) };
      case "dynamic":
        return { type, theta, factor: number("factor", undefined), originalLength: length };
      case "llama3":
        return {
          ...{ type, theta, factor: number("factor", undefined), originalLength: originalLength() },
          lowFreqFactor: number("low_freq_factor", undefined),
          highFreqFactor: number("high_freq_factor", undefined),
        };
      case "yarn": {
        const factor = number("factor", length / originalLength());
        const scaleOf = (m: number): number => (factor <= 1 ? 1 : 0.1 * m * Math.log(factor) + 1);
        const isScaled = settings.mscale && settings.mscale_all_dim;
        const usual = isScaled ? scaleOf(number("mscale", 1)) / scaleOf(number("mscale_all_dim", 1)) : scaleOf(1);
        return {
          ...{ type, theta, factor, originalLength: originalLength() },
          betaFast: number("beta_fast", 32),
          betaSlow: number("beta_slow", 1),
          truncate: settings.truncate !== false,
          attentionFactor: number("attention_factor", usual),
        };
      }
      case "longrope": {
        const original = originalLength();
        const factor = number("factor", length / original);
        return {
          ...{ type, theta, originalLength: original },
          shortFactors: numbers("short_factor"),
          longFactors: numbers("long_factor"),
          attentionFactor: number(
            "attention_factor",
            factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(original)),
          ),
        };
      }
      default:
        return fail("rope_type", "default, linear, dynamic, llama3, yarn or longrope", type);
    }
  }

  /** The share of a head that RoPE turns. */
  partialRotary(): number {
    const inner = [this.json.rope_parameters, this.json.rope_scaling].find(
      (settings) => isObject(settings) && settings.partial_rotary_factor !== undefined,
    ) as JsonObject | undefined;
    const value = inner?.partial_rotary_factor ?? this.json.partial_rotary_factor ?? 1;
    return typeof value === "number" && value > 0 && value <= 1
      ? value
      : this.fail("partial_rotary_factor", "a number above 0 and at most 1");
  }
}

/** Token ids as `config.json` has them: one, several, or none. */
export const tokenIds = (value: unknown): number[] =>
  (Array.isArray(value) ? value : [value]).filter((id) => typeof id === "number");
