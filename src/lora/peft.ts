/** Adapters in PEFT's own format, both ways: `adapter_config.json` and `adapter_model.safetensors`. */
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { type JsonObject, readJson } from "../io/json.ts";
import { encodeSafetensors } from "../io/safetensors.ts";
import { type Checkpoint, listSome, loadTensor, openCheckpoint, tensorToWrite } from "../nn/checkpoint.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { attachPairs, checkConfig, type HasLinears, type LoraAdapter, type LoraConfig } from "./adapter.ts";
import { matchModules } from "./target-modules.ts";

const PREFIX = "base_model.model.";
const CONFIG = "adapter_config.json";

/** The two files of an adapter directory. */
export interface AdapterFiles {
  readonly "adapter_config.json": string;
  readonly "adapter_model.safetensors": AsyncIterable<Uint8Array>;
}

/**
 * The two files of the adapter as PEFT writes them: f32, the adapter's name left out of the tensor names.
 *
 * `baseModel` is the model's path or Hub id, for `base_model_name_or_path`.
 */
export function savePeft(adapter: LoraAdapter, baseModel: string): AdapterFiles {
  const { r, alpha, targetModules, useRslora = false, dropout = 0 } = adapter.config;
  const leaves = [...new Set([...adapter.pairs.keys()].map((name) => name.split(".").at(-1)))].sort();
  const config = {
    alpha_pattern: {},
    auto_mapping: null,
    base_model_name_or_path: baseModel,
    bias: "none",
    exclude_modules: null,
    fan_in_fan_out: false,
    inference_mode: true,
    init_lora_weights: true,
    layers_pattern: null,
    layers_to_transform: null,
    lora_alpha: alpha,
    lora_bias: false,
    lora_dropout: dropout,
    modules_to_save: null,
    peft_type: "LORA",
    r,
    rank_pattern: {},
    revision: null,
    target_modules:
      typeof targetModules === "string" && targetModules.toLowerCase() === "all-linear" ? leaves : targetModules,
    task_type: "CAUSAL_LM",
    use_dora: false,
    use_rslora: useRslora,
  };
  const tensors = [...adapter.pairs].flatMap(([name, { A, B }]) => [
    tensorToWrite(`${PREFIX}${name}.lora_A.weight`, A),
    tensorToWrite(`${PREFIX}${name}.lora_B.weight`, B),
  ]);
  return {
    "adapter_config.json": `${JSON.stringify(config, null, 2)}\n`,
    "adapter_model.safetensors": encodeSafetensors(tensors, { format: "pt" }),
  };
}

/**
 * Loads a PEFT adapter onto a model, enabled. Strict: a missing, extra, misnamed or mis-shaped tensor is a FormatError that names
 * it, and so is a setting of `adapter_config.json` that changes the result and is not supported.
 */
export async function loadPeft(model: HasLinears, directory: Directory): Promise<LoraAdapter> {
  const config = await readAdapterConfig(directory);
  const rank = config.r;
  const checkpoint = await openCheckpoint(directory, "adapter_model");
  const modules = modulesOf(config, model, `${directory.name}/${CONFIG}`);
  const expected = new Map<string, readonly number[]>();
  for (const name of modules) {
    const [N = 0, K = 0] = model.linears.get(name)?.weight.shape ?? [];
    expected.set(`${PREFIX}${name}.lora_A.weight`, [rank, K]);
    expected.set(`${PREFIX}${name}.lora_B.weight`, [N, rank]);
  }
  checkNames(checkpoint, [...expected.keys()]);
  const loaded = new Map<string, Tensor>();
  const gpu = [...model.linears.values()][0]?.weight.gpu;
  if (!gpu) throw new ShapeError("loadPeft: the model must have linear layers, got none");
  try {
    for (const [name, shape] of expected) loaded.set(name, await loadTensor(gpu, checkpoint, name, shape));
    return attachPairs(model, config, ({ name }) => {
      const A = loaded.get(`${PREFIX}${name}.lora_A.weight`);
      const B = loaded.get(`${PREFIX}${name}.lora_B.weight`);
      if (!A || !B) throw new ShapeError(`loadPeft: ${name} must have A and B, got one of them`);
      return { A, B };
    });
  } catch (error) {
    gpu.release(...loaded.values());
    throw error;
  }
}

/** Keys whose value changes what the adapter computes, with the values that mean "not used". */
const UNSUPPORTED: Readonly<Record<string, readonly unknown[]>> = {
  alora_invocation_tokens: [null],
  alpha_pattern: [null],
  arrow_config: [null],
  bias: ["none"],
  exclude_modules: [null],
  fan_in_fan_out: [false],
  kasa_config: [null],
  layer_replication: [null],
  layers_pattern: [null],
  layers_to_transform: [null],
  lora_bias: [false],
  modules_to_save: [null],
  monteclora_config: [null],
  rank_pattern: [null],
  target_parameters: [null],
  trainable_token_indices: [null],
  use_bdlora: [null, false],
  use_dora: [false],
  use_qalora: [false],
  velora_config: [null],
};

async function readAdapterConfig(directory: Directory): Promise<LoraConfig> {
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
  const dropout = json.lora_dropout ?? 0;
  if (typeof dropout !== "number" || !(dropout >= 0 && dropout < 1)) return fail("lora_dropout", "a number in [0, 1)");
  const config: LoraConfig = {
    r: number("r", 8),
    alpha: number("lora_alpha", 8),
    targetModules: targetsOf(json, fail),
    useRslora: json.use_rslora === true,
    dropout,
  };
  checkConfig(config);
  return config;
}

function targetsOf(json: JsonObject, fail: (key: string, rule: string) => never): readonly string[] | string {
  const targets = json.target_modules ?? ["q_proj", "v_proj"]; // PEFT's default for Llama
  if (typeof targets === "string") return targets;
  if (Array.isArray(targets) && targets.every((t) => typeof t === "string")) return targets;
  return fail("target_modules", "a list of names, a regular expression or all-linear");
}

function modulesOf(config: LoraConfig, model: HasLinears, name: string): string[] {
  try {
    return matchModules(config.targetModules, [...model.linears.keys()]);
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
