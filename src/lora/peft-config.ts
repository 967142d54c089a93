/** PEFT's `adapter_config.json`, both ways. */
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { isObject, type JsonObject, readJson } from "../io/json.ts";
import { ShapeError } from "../tensor/errors.ts";
import { CLASSIFIER_HEADS, checkConfig, type LoraConfig } from "./config.ts";
import { isAllLinear, type TargetModules } from "./target-modules.ts";

export const CONFIG = "adapter_config.json";

/** `adapter_config.json` of an adapter of these modules. */
export function encodeConfig(settings: LoraConfig, modules: readonly string[], baseModel: string): string {
  const { targetModules } = settings;
  const leaves = [...new Set(modules.map((name) => name.split(".").at(-1)))].sort();
  const config = {
    alpha_pattern: settings.alphaPattern ?? {},
    auto_mapping: null,
    base_model_name_or_path: baseModel,
    bias: settings.bias ?? "none",
    exclude_modules: settings.excludeModules ?? null,
    fan_in_fan_out: settings.fanInFanOut ?? false,
    inference_mode: true,
    init_lora_weights: true,
    layers_pattern: settings.layersPattern ?? null,
    layers_to_transform: settings.layersToTransform ?? null,
    lora_alpha: settings.alpha,
    lora_bias: settings.loraBias ?? false,
    lora_dropout: settings.dropout ?? 0,
    modules_to_save: settings.modulesToSave ?? null,
    peft_type: "LORA",
    r: settings.r,
    rank_pattern: settings.rankPattern ?? {},
    revision: null,
    target_modules: isAllLinear(targetModules) ? leaves : targetModules,
    task_type: settings.taskType ?? "CAUSAL_LM",
    trainable_token_indices: settings.trainableTokenIndices ?? null,
    use_dora: settings.useDora ?? false,
    use_rslora: settings.useRslora ?? false,
  };
  return `${JSON.stringify(config, null, 2)}\n`;
}

/** PEFT 0.21's, and those of its past. */
const KNOWN = `alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
  ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config layer_replication
  layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core
  modules_to_save monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules
  target_parameters task_type trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config`.split(
  /\s+/,
);

/** What a user should know of a configuration: keys without a meaning here or in PEFT, which are left out of account. */
export function configWarnings(json: JsonObject): string[] {
  const keys = Object.keys(json).filter((key) => !KNOWN.includes(key));
  return keys.length > 0 ? [`${CONFIG} has keys that PEFT 0.21 does not know: ${keys.join(", ")}`] : [];
}

/** Keys whose value changes what the adapter computes, with the values that mean "not used". */
const UNSUPPORTED: Readonly<Record<string, readonly unknown[]>> = {
  alora_invocation_tokens: [null],
  arrow_config: [null],
  ensure_weight_tying: [null, false],
  kasa_config: [null],
  layer_replication: [null],
  monteclora_config: [null],
  target_parameters: [null],
  use_bdlora: [null, false],
  use_qalora: [false],
  velora_config: [null],
};

/** The settings of a PEFT adapter. Throws FormatError for what is out of range or changes the result and is not supported. */
export async function readAdapterConfig(directory: Directory): Promise<LoraConfig> {
  const name = `${directory.name}/${CONFIG}`;
  const json = await readJson(directory, CONFIG);
  if (!json) throw new FormatError(`${name}: an adapter directory must have it, got no such file. Check the path`);
  const fail = (key: string, rule: string): never => {
    throw new FormatError(`${name}: "${key}" must be ${rule}, got ${JSON.stringify(json[key])}`);
  };
  if (json.peft_type !== "LORA") fail("peft_type", '"LORA"');
  for (const [key, unused] of Object.entries(UNSUPPORTED)) {
    const value = json[key] ?? unused[0];
    if (!unused.includes(value) && !isEmpty(value))
      throw new FormatError(
        `${name}: "${key}" must be ${JSON.stringify(unused[0])}, got ${JSON.stringify(value)}. This setting is not supported yet`,
      );
  }
  const init = json.init_lora_weights ?? true;
  if (typeof init === "string" && init !== "gaussian" && init !== "orthogonal" && init !== "eva")
    fail(
      "init_lora_weights",
      "true, false, gaussian, orthogonal or eva: others change the base weights. Convert the adapter with PEFT's path_initial_model_for_weight_conversion",
    );
  const number = (key: string, fallback: number): number => {
    const value = json[key] ?? fallback;
    return typeof value === "number" && value > 0 ? value : fail(key, "a number above 0");
  };
  const flag = (key: string): boolean => {
    const value = json[key] ?? false;
    return typeof value === "boolean" ? value : fail(key, "true or false");
  };
  const listOf = <T>(key: string, isOne: (value: unknown) => value is T, rule: string): readonly T[] | undefined => {
    const value = json[key] ?? [];
    const list = isOne(value) ? [value] : value;
    if (!Array.isArray(list) || !list.every(isOne)) return fail(key, rule);
    return list.length > 0 ? list : undefined;
  };
  const patterns = (key: string): Readonly<Record<string, number>> => {
    const value = json[key] ?? {};
    if (!isObject(value) || !Object.values(value).every((n) => typeof n === "number"))
      return fail(key, "an object of numbers");
    return value as Record<string, number>;
  };
  const targets = (key: string): TargetModules | undefined => {
    const value = json[key] ?? undefined;
    return typeof value === "string"
      ? value
      : listOf(key, isString, "a list of names, a regular expression or all-linear");
  };
  const dropout = json.lora_dropout ?? 0;
  if (typeof dropout !== "number" || !(dropout >= 0 && dropout < 1)) return fail("lora_dropout", "a number in [0, 1)");
  const bias = json.bias ?? "none";
  if (bias !== "none" && bias !== "lora_only" && bias !== "all") return fail("bias", '"none", "lora_only" or "all"');
  const excludeModules = targets("exclude_modules");
  const layersToTransform = listOf("layers_to_transform", isNumber, "a number or a list of numbers");
  const isImplied = json.task_type === "SEQ_CLS" && !json.modules_to_save; // PEFT's early versions did not write it
  const modulesToSave = isImplied ? CLASSIFIER_HEADS : listOf("modules_to_save", isString, "a list of names");
  const tokens = isEmpty(json.trainable_token_indices) ? undefined : json.trainable_token_indices;
  const isIds = (value: unknown): boolean => Array.isArray(value) && value.every(isNumber);
  if (tokens !== undefined && !isIds(tokens) && !(isObject(tokens) && Object.values(tokens).every(isIds)))
    fail("trainable_token_indices", "a list of ids, or lists of ids by module");
  const layersPattern = layersToTransform && listOf("layers_pattern", isString, "a name or a list of names");
  const config: LoraConfig = {
    r: number("r", 8),
    alpha: number("lora_alpha", 8),
    targetModules: targets("target_modules") ?? ["q_proj", "v_proj"], // PEFT's default for Llama
    ...(excludeModules && { excludeModules }),
    ...(layersToTransform && { layersToTransform }),
    ...(layersPattern && { layersPattern }),
    ...(modulesToSave && { modulesToSave }),
    ...(tokens !== undefined && { trainableTokenIndices: tokens as NonNullable<LoraConfig["trainableTokenIndices"]> }),
    ...{ rankPattern: patterns("rank_pattern"), alphaPattern: patterns("alpha_pattern") },
    ...{ useRslora: flag("use_rslora"), useDora: flag("use_dora"), loraBias: flag("lora_bias"), bias, dropout },
  };
  return checked(name, config);
}

const isEmpty = (value: unknown): boolean =>
  value === undefined || (typeof value === "object" && Object.keys(value ?? {}).length === 0);
const isString = (value: unknown): value is string => typeof value === "string";
const isNumber = (value: unknown): value is number => typeof value === "number";

/** Settings out of range are the file's fault. */
function checked(name: string, config: LoraConfig): LoraConfig {
  try {
    checkConfig(config);
    return config;
  } catch (error) {
    if (error instanceof ShapeError) throw new FormatError(`${name}: ${error.message}`);
    throw error;
  }
}
