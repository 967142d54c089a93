/** The settings of an adapter, in PEFT's meaning, and what they say of one module. */
import { ShapeError } from "../tensor/errors.ts";
import { isAllLinear, matchesModule, matchModules, type TargetModules } from "./target-modules.ts";

export interface LoraConfig {
  /** Rank of the update. */
  readonly r: number;
  /** The update is scaled by s = alpha / r. */
  readonly alpha: number;
  readonly targetModules: TargetModules;
  /** Modules that are left out although they are targets. */
  readonly excludeModules?: TargetModules;
  /** Numbers of the layers whose modules are targets: all unless given. Not with a regular expression. */
  readonly layersToTransform?: readonly number[];
  /** What comes before the number of a layer in a module's name: any name unless given. */
  readonly layersPattern?: readonly string[];
  /** Rank and alpha of modules that a regular expression matches from a dot or the beginning on; the first that matches counts. */
  readonly rankPattern?: Readonly<Record<string, number>>;
  readonly alphaPattern?: Readonly<Record<string, number>>;
  /** s = alpha / √r instead (rsLoRA, arXiv:2312.03732). */
  readonly useRslora?: boolean;
  /** Direction and magnitude apart (DoRA, arXiv:2402.09353). */
  readonly useDora?: boolean;
  /** Whether B has a bias of its own, which is scaled like B. */
  readonly loraBias?: boolean;
  /** Which biases are trained and belong to the adapter: none, those of the adapted layers, or all that the model has, of norms too. */
  readonly bias?: "none" | "lora_only" | "all";
  /** Said in files of models that store their linear layers as [K,N]: A and B are as everywhere. */
  readonly fanInFanOut?: boolean;
  /**
   * Modules that are trained whole: what ends with one of these names, and the modules within, get a copy of weight and bias in place of A and
   * B: linear layers, norms, embeddings, the head. Those of a fresh adapter of a classifier are these and its head: see `withHeads`.
   */
  readonly modulesToSave?: readonly string[];
  /**
   * Ids of tokens whose rows of the embedding are trained, or such ids by a table's name or its end. A head that is tied to an embedding
   * shares its rows, unless it is named with other ids.
   */
  readonly trainableTokenIndices?: readonly number[] | Readonly<Record<string, readonly number[]>>;
  /** What PEFT calls the model, "CAUSAL_LM" or "SEQ_CLS": taken from the model. */
  readonly taskType?: string;
  /** Probability that an element of a branch's input is dropped in training; each module has its own mask. */
  readonly dropout?: number;
}

/** What the settings say of one module. */
export interface ModuleSettings {
  readonly r: number;
  readonly alpha: number;
  /** s: what B·A is multiplied by. */
  readonly scale: number;
}

/** Rank, alpha and s of a module. */
export function settingsOf(config: LoraConfig, module: string): ModuleSettings {
  const r = byPattern(config.rankPattern, module) ?? config.r;
  const alpha = byPattern(config.alphaPattern, module) ?? config.alpha;
  return { r, alpha, scale: alpha / (config.useRslora ? Math.sqrt(r) : r) };
}

function byPattern(patterns: Readonly<Record<string, number>> = {}, module: string): number | undefined {
  return Object.entries(patterns).find(([pattern]) => new RegExp(`^(?:.*\\.)?(?:${pattern})$`).test(module))?.[1];
}

/**
 * The modules that the settings name, in the order of `modules`; what is trained whole is no target, as in PEFT. Throws ShapeError as
 * `matchModules`, and where none is left.
 */
export function modulesOf(config: LoraConfig, modules: readonly string[]): string[] {
  const { targetModules, excludeModules, layersToTransform: layers, layersPattern: patterns = [] } = config;
  const targets = matchModules(targetModules, modules);
  const isInLayers = (module: string): boolean => {
    if (!layers || targetModules.includes(module)) return true; // a whole name is meant as it is
    const before = patterns.length > 0 ? `(?:^|.*?\\.)(?:${patterns.join("|")})` : ".*?\\.[^.]*";
    const [, index] = new RegExp(`^${before}\\.(\\d+)\\.`).exec(module) ?? [];
    return index !== undefined && layers.includes(Number(index));
  };
  const isExcluded = (module: string): boolean =>
    isSaved(config.modulesToSave, module) || (excludeModules !== undefined && matchesModule(excludeModules, module));
  const left = targets.filter((module) => !isExcluded(module) && isInLayers(module));
  if (left.length === 0)
    throw new ShapeError(
      `lora: exclude_modules, modules_to_save and layers_to_transform must leave a target, got none of ${targets.length}. The first is ${targets[0]}`,
    );
  return left;
}

/** The `modulesToSave` of a classifier, by PEFT's names for its head; a model has one of them. */
export const CLASSIFIER_HEADS: readonly string[] = ["classifier", "score"];

/**
 * The settings of a fresh adapter of a model: a classifier's head is trained whole, with whatever else `modulesToSave` names, as PEFT's
 * `PeftModelForSequenceClassification` has it.
 */
export const withHeads = (config: LoraConfig, { taskType }: { readonly taskType?: string }): LoraConfig =>
  taskType === "SEQ_CLS"
    ? { ...config, modulesToSave: [...new Set([...(config.modulesToSave ?? []), ...CLASSIFIER_HEADS])] }
    : config;

/** Whether a module is, or is within, one whose name ends with one of the entries: PEFT's rule for `modulesToSave`. */
export const isSaved = (entries: readonly string[] | undefined, module: string): boolean =>
  entries?.some((entry) => `${module}.`.includes(`${entry}.`)) ?? false;

/** Throws ShapeError for ranks that are not whole numbers above 0, other numbers out of range, and settings that contradict each other. */
export function checkConfig(config: LoraConfig): void {
  checkTokens(config);
  const { r, alpha, dropout = 0, rankPattern = {}, alphaPattern = {}, layersToTransform, targetModules } = config;
  const rank = (name: string, value: number): void => {
    if (!Number.isInteger(value) || value < 1)
      throw new ShapeError(`lora: ${name} must be a whole number of at least 1, got ${value}`);
  };
  const positive = (name: string, value: number): void => {
    if (!(value > 0) || !Number.isFinite(value))
      throw new ShapeError(`lora: ${name} must be a positive number, got ${value}`);
  };
  rank("r", r);
  positive("alpha", alpha);
  for (const [patterns, check, name] of [
    [rankPattern, rank, "rank_pattern"],
    [alphaPattern, positive, "alpha_pattern"],
  ] as const)
    for (const [pattern, value] of Object.entries(patterns)) {
      check(`${name} of "${pattern}"`, value);
      try {
        new RegExp(pattern);
      } catch {
        throw new ShapeError(`lora: ${name} must have regular expressions, got "${pattern}"`);
      }
    }
  if (!(dropout >= 0 && dropout < 1))
    throw new ShapeError(`lora: dropout must be at least 0 and below 1, got ${dropout}`);
  if (layersToTransform && typeof targetModules === "string" && !isAllLinear(targetModules))
    throw new ShapeError(
      `lora: layers_to_transform needs target modules as a list, got "${targetModules}". Say in the expression which layers`,
    );
  if (config.layersPattern && !layersToTransform)
    throw new ShapeError(
      `lora: layers_pattern needs layers_to_transform, got ${config.layersPattern.join(", ")} alone. Give both or neither`,
    );
  for (const layer of layersToTransform ?? [])
    if (!Number.isInteger(layer) || layer < 0)
      throw new ShapeError(`lora: layers_to_transform must have whole numbers from 0 on, got ${layer}`);
}

/** Throws ShapeError for ids that are no whole numbers from 0 on, or come twice. */
function checkTokens({ trainableTokenIndices: given = {} }: LoraConfig): void {
  const lists: readonly (readonly number[])[] = Array.isArray(given) ? [given] : Object.values(given);
  for (const ids of lists) {
    const bad = ids.find((id, i) => !Number.isInteger(id) || id < 0 || ids.indexOf(id) !== i);
    if (bad !== undefined || ids.length === 0)
      throw new ShapeError(
        `lora: trainable_token_indices must be ids of tokens, each once, got ${bad === undefined ? "an empty list" : bad}`,
      );
  }
}
