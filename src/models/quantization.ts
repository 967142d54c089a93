/** What `config.json` says of how weights are stored: their type, and transformers' `quantization_config`. */
import type { Directory } from "../io/bytes.ts";
import type { FloatDtype } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { excerpt, isObject, type JsonObject, readJson } from "../io/json.ts";

/** What PyTorch calls a type. */
export const TORCH_NAMES: Readonly<Record<FloatDtype, string>> = { F32: "float32", F16: "float16", BF16: "bfloat16" };

export interface Quantization {
  /** What is not quantised has it. */
  readonly dtype: FloatDtype | undefined;
  /** Linear layers are in NF4: whether their scales are quantised, too. Undefined where nothing is quantised. */
  readonly doubleQuant: boolean | undefined;
}

/** Throws FormatError for any quantisation but bitsandbytes' NF4. */
export async function readQuantization(directory: Directory): Promise<Quantization> {
  const json = (await readJson(directory, "config.json")) ?? {};
  const name = json.dtype ?? json.torch_dtype;
  const dtype = (["F32", "F16", "BF16"] as const).find((type) => TORCH_NAMES[type] === name);
  const given = json.quantization_config;
  if (given === undefined || given === null) return { dtype, doubleQuant: undefined };
  const found = isObject(given) ? foundIn(given) : excerpt(JSON.stringify(given));
  if (found !== undefined)
    throw new FormatError(
      `${directory.name}/config.json: weights must be unquantised, or in bitsandbytes' NF4, got ${found}. Get the model unquantised`,
    );
  return { dtype, doubleQuant: isObject(given) && given.bnb_4bit_use_double_quant === true };
}

/** Another quantisation than NF4, in words; transformers' defaults where something is not said. */
function foundIn(config: JsonObject): string | undefined {
  const { quant_method: method = "bitsandbytes", load_in_4bit, bnb_4bit_quant_type: type = "fp4" } = config;
  if (method !== "bitsandbytes") return excerpt(String(method));
  if (load_in_4bit !== true) return "bitsandbytes in 8 bits";
  return type === "nf4" ? undefined : `bitsandbytes' ${excerpt(String(type))}`;
}

/**
 * `quantization_config` of a model whose linear layers are in NF4, but for those that are `left` as they are. Without such, transformers itself
 * leaves out the head.
 */
export const quantizationConfig = (doubleQuant: boolean, left: readonly string[]): JsonObject => ({
  quant_method: "bitsandbytes",
  load_in_4bit: true,
  load_in_8bit: false,
  bnb_4bit_quant_type: "nf4",
  bnb_4bit_use_double_quant: doubleQuant,
  bnb_4bit_quant_storage: "uint8",
  bnb_4bit_compute_dtype: "float32",
  ...(left.length > 0 && { llm_int8_skip_modules: ["lm_head", ...left] }),
});
