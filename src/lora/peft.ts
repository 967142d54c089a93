/** Adapters in PEFT's own format, both ways: `adapter_config.json` and `adapter_model.safetensors`. */
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { isObject, readJson } from "../io/json.ts";
import { encodeSafetensors, type TensorToWrite } from "../io/safetensors.ts";
import { scale } from "../kernels/axpy.ts";
import { putColumns } from "../kernels/copy-rows.ts";
import { type Checkpoint, listSome, loadTensor, madeToWrite, openCheckpoint, tensorToWrite } from "../nn/checkpoint.ts";
import type { Linear } from "../nn/linear.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { attachPairs, type HasLinears, type LoraAdapter, type LoraParts, savedModulesOf } from "./adapter.ts";
import { CLASSIFIER_HEADS, checkConfig, type LoraConfig, modulesOf, settingsOf } from "./config.ts";
import { isAllLinear, type TargetModules } from "./target-modules.ts";

export const PREFIX = "base_model.model.";
export const CONFIG = "adapter_config.json";

/** The two files of an adapter directory. */
export interface AdapterFiles {
  readonly "adapter_config.json": string;
  readonly "adapter_model.safetensors": AsyncIterable<Uint8Array>;
}

/** What the tensors of a module go by, behind its name. */
export const KEYS: Readonly<Record<keyof LoraParts, string>> = {
  A: "lora_A.weight",
  B: "lora_B.weight",
  magnitude: "lora_magnitude_vector",
  loraBias: "lora_B.bias",
  bias: "base_layer.bias",
};

/**
 * The two files of the adapter as PEFT writes them: f32, the adapter's name left out of the tensor names.
 *
 * `baseModel` is the model's path or Hub id, for `base_model_name_or_path`.
 */
export function savePeft(adapter: LoraAdapter, baseModel: string): AdapterFiles {
  const { beginnings } = adapter;
  const settings = beginnings.size > 0 ? doubled(adapter.config) : adapter.config;
  const tensors = [...adapter.pairs].flatMap(([name, pair]) =>
    Object.keys(KEYS).flatMap((part) => {
      const t = pair[part as keyof LoraParts];
      if (!t) return [];
      const [key, beginning] = [keyOf(name, part), beginnings.get(name)];
      if (beginning && part === "A") return [tensorToWrite(key, [t, beginning.A])];
      if (beginning && part === "B") return [differenceToWrite(key, t, beginning.B)];
      return [tensorToWrite(key, t)];
    }),
  );
  const whole = [...adapter.saved].flatMap(([name, { weight, bias }]) => [
    tensorToWrite(`${PREFIX}${name}.weight`, weight),
    ...(bias ? [tensorToWrite(`${PREFIX}${name}.bias`, bias)] : []),
  ]);
  return {
    "adapter_config.json": encodeConfig(settings, [...adapter.pairs.keys()], baseModel),
    "adapter_model.safetensors": encodeSafetensors([...tensors, ...whole], { format: "pt" }),
  };
}

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
    use_dora: settings.useDora ?? false,
    use_rslora: settings.useRslora ?? false,
  };
  return `${JSON.stringify(config, null, 2)}\n`;
}

/**
 * What an adapter has learned since it took its beginning from the base, as one of twice the rank on the base as it was:
 * B·A − B₀·A₀ = [B, −B₀]·[A; A₀]. Every s stays: alpha / r, or alpha / √r.
 */
function doubled(config: LoraConfig): LoraConfig {
  const times = (values: Readonly<Record<string, number>> = {}, by: number): Record<string, number> =>
    Object.fromEntries(Object.entries(values).map(([pattern, value]) => [pattern, by * value]));
  const factor = config.useRslora ? Math.SQRT2 : 2;
  return {
    ...config,
    ...{ r: 2 * config.r, alpha: factor * config.alpha },
    ...{ rankPattern: times(config.rankPattern, 2), alphaPattern: times(config.alphaPattern, factor) },
  };
}

/** [B, −B₀], [N,2r]. */
function differenceToWrite(name: string, B: Tensor, B0: Tensor): TensorToWrite {
  const [N = 0, r = 0] = B.shape;
  return madeToWrite(name, [N, 2 * r], () => {
    const joined = empty(B.gpu, [N, 2 * r], "savePeft");
    B.gpu.scope(() => {
      putColumns(B, joined, 0);
      putColumns(scale(B0, -1), joined, r);
    });
    return joined;
  });
}

/**
 * Loads a PEFT adapter onto a model, enabled. Strict: a missing, extra, misnamed or mis-shaped tensor is a FormatError that names
 * it, and so is a setting of `adapter_config.json` that changes the result and is not supported.
 */
export async function loadPeft(model: HasLinears, directory: Directory): Promise<LoraAdapter> {
  const name = `${directory.name}/${CONFIG}`;
  const config = await readAdapterConfig(directory);
  const checkpoint = await openCheckpoint(directory, "adapter_model");
  const { targets, whole } = modulesFor(config, model, name);
  const shapes = new Map(targets.map((module) => [module, partShapes(config, model, module)]));
  const expected = [...shapes].flatMap(([module, parts]) => Object.keys(parts).map((part) => keyOf(module, part)));
  const wholeShapes = new Map(
    whole.flatMap((module) => {
      const { weight, bias } = model.linears.get(module) as Linear;
      const key = `${PREFIX}${module}`;
      return [[`${key}.weight`, weight.shape] as const, ...(bias ? [[`${key}.bias`, bias.shape] as const] : [])];
    }),
  );
  checkNames(checkpoint, [...expected, ...wholeShapes.keys()]);
  const loaded = new Map<string, Tensor>();
  const gpu = [...model.linears.values()][0]?.weight.gpu;
  if (!gpu) throw new ShapeError("loadPeft: the model must have linear layers, got none");
  try {
    for (const [module, parts] of shapes)
      for (const [part, shape] of Object.entries(parts)) {
        const key = keyOf(module, part);
        loaded.set(key, await loadTensor(gpu, checkpoint, key, shape));
      }
    for (const [key, shape] of wholeShapes) loaded.set(key, await loadTensor(gpu, checkpoint, key, shape));
    return attachPairs(
      model,
      config,
      ({ name: module }) => {
        const parts = Object.keys(shapes.get(module) ?? {}).map((part) => [part, loaded.get(keyOf(module, part))]);
        return Object.fromEntries(parts) as LoraParts;
      },
      ({ name: module }) => {
        const [weight, bias] = ["weight", "bias"].map((part) => loaded.get(`${PREFIX}${module}.${part}`));
        return { weight: weight as Tensor, bias };
      },
    );
  } catch (error) {
    gpu.release(...loaded.values());
    throw error;
  }
}

const keyOf = (module: string, part: string): string => `${PREFIX}${module}.${KEYS[part as keyof LoraParts]}`;

/** What the settings ask for of a module. */
function partShapes(config: LoraConfig, model: HasLinears, module: string): Partial<Record<keyof LoraParts, number[]>> {
  const layer = model.linears.get(module);
  const [N = 0, K = 0] = layer?.weight.shape ?? [];
  const { r } = settingsOf(config, module);
  return {
    ...{ A: [r, K], B: [N, r] },
    ...(config.useDora && { magnitude: [N] }),
    ...(config.loraBias && { loraBias: [N] }),
    ...(config.bias === "lora_only" && layer?.bias && { bias: [N] }),
  };
}

/** Keys whose value changes what the adapter computes, with the values that mean "not used". */
const UNSUPPORTED: Readonly<Record<string, readonly unknown[]>> = {
  alora_invocation_tokens: [null],
  arrow_config: [null],
  kasa_config: [null],
  layer_replication: [null],
  monteclora_config: [null],
  target_parameters: [null],
  trainable_token_indices: [null],
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
    const isEmpty = typeof value === "object" && value !== null && Object.keys(value).length === 0;
    if (!unused.includes(value) && !isEmpty)
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
  if (bias !== "none" && bias !== "lora_only") return fail("bias", '"none" or "lora_only": "all" is not supported yet');
  const excludeModules = targets("exclude_modules");
  const layersToTransform = listOf("layers_to_transform", isNumber, "a number or a list of numbers");
  const isImplied = json.task_type === "SEQ_CLS" && !json.modules_to_save; // PEFT's early versions did not write it
  const modulesToSave = isImplied ? CLASSIFIER_HEADS : listOf("modules_to_save", isString, "a list of names");
  const layersPattern = layersToTransform && listOf("layers_pattern", isString, "a name or a list of names");
  const config: LoraConfig = {
    r: number("r", 8),
    alpha: number("lora_alpha", 8),
    targetModules: targets("target_modules") ?? ["q_proj", "v_proj"], // PEFT's default for Llama
    ...(excludeModules && { excludeModules }),
    ...(layersToTransform && { layersToTransform }),
    ...(layersPattern && { layersPattern }),
    ...(modulesToSave && { modulesToSave }),
    ...{ rankPattern: patterns("rank_pattern"), alphaPattern: patterns("alpha_pattern") },
    ...{ useRslora: flag("use_rslora"), useDora: flag("use_dora"), loraBias: flag("lora_bias"), bias, dropout },
  };
  return checked(name, config);
}

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

function modulesFor(config: LoraConfig, model: HasLinears, name: string): { targets: string[]; whole: string[] } {
  try {
    return { targets: modulesOf(config, [...model.linears.keys()]), whole: savedModulesOf(config, model) };
  } catch (error) {
    if (error instanceof ShapeError)
      throw new FormatError(`${name}: the adapter does not fit this model: ${error.message}`);
    throw error;
  }
}

function checkNames({ name, tensors }: Checkpoint, expected: readonly string[]): void {
  const missing = expected.filter((key) => !tensors.has(key));
  const extra = [...tensors.keys()].filter((key) => !expected.includes(key));
  if (missing.length === 0 && extra.length === 0) return;
  const parts = [
    missing.length > 0 ? `missing ${listSome(missing, 3)}` : "",
    extra.length > 0 ? `unknown ${listSome(extra, 3)}` : "",
  ].filter(Boolean);
  throw new FormatError(
    `${name}: the tensors must be those that ${CONFIG} and the model ask for, got ${parts.join("; ")}. Is it an adapter of this model?`,
  );
}
