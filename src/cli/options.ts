/** Options that several commands share, and numbers that are checked in the project's own words. */
import { Option } from "commander";
import type { LoraConfig } from "../lora/config.ts";
import { type LoraInit, takesFromBase } from "../lora/init.ts";
import type { TargetModules } from "../lora/target-modules.ts";
import type { WeightFormat } from "../models/weights.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { LossOn } from "../train/data.ts";

/** An option that takes a number for which `holds` is true; `rule` says in words what that is. Parsing throws ShapeError. */
export function numeric(
  command: string,
  flags: string,
  description: string,
  {
    rule,
    holds,
    preset,
  }: { readonly rule: string; readonly holds: (value: number) => boolean; readonly preset?: number },
): Option {
  const option = new Option(flags, description);
  option.argParser((text: string) => {
    const value = text.trim() === "" ? Number.NaN : Number(text);
    if (!holds(value)) throw new ShapeError(`${command}: ${option.long} must be ${rule}, got ${text || "nothing"}`);
    return value;
  });
  return preset === undefined ? option : option.default(preset);
}

export const ABOVE_0 = { rule: "a number above 0", holds: (x: number): boolean => x > 0 && Number.isFinite(x) };

/** A whole number of at least `least`. */
export function whole(command: string, flags: string, description: string, least: number, preset?: number): Option {
  const holds = (value: number): boolean => Number.isSafeInteger(value) && value >= least;
  return numeric(command, flags, description, {
    rule: `a whole number of at least ${least}`,
    holds,
    ...(preset !== undefined && { preset }),
  });
}

/** A number of at least 0. */
export function amount(command: string, flags: string, description: string, preset: number): Option {
  const holds = (value: number): boolean => Number.isFinite(value) && value >= 0;
  return numeric(command, flags, description, { rule: "a number of at least 0", holds, preset });
}

/** A learning rate, or what finds one. */
export function rateOption(command: string): Option {
  const option = amount(command, "--learning-rate <x>", "peak learning rate; auto: as --find-lr suggests", 2e-4);
  const number = option.parseArg;
  return option.argParser((text) => (text === "auto" ? text : number?.(text, text)));
}

/** In milliseconds; a longer one would end at once. */
const LONGEST_TIMER = 2 ** 31 - 1;

/** A time such as 90s, 20m or 1.5h, given in milliseconds. */
export function timeOption(command: string, flags: string, description: string): Option {
  const option = new Option(flags, description);
  return option.argParser((text: string) => {
    const [, amountOf = "", unit = ""] = /^(\d+(?:\.\d+)?)(s|m|h)$/.exec(text.trim()) ?? [];
    const timeMs = Math.round(Number(amountOf) * ({ s: 1e3, m: 60e3, h: 3600e3 }[unit] ?? 0));
    if (!(timeMs > 0 && timeMs <= LONGEST_TIMER))
      throw new ShapeError(
        `${command}: ${option.long} must be a time such as 90s, 20m or 1.5h, at most 596h, got ${text || "nothing"}`,
      );
    return timeMs;
  });
}

export const modelOption = (): Option =>
  new Option(
    "--model <place>",
    "directory of the model, or org/name[@revision] on the Hugging Face Hub",
  ).makeOptionMandatory();

export const revisionOption = (): Option =>
  new Option("--revision <name>", "branch, tag or full commit of a --model on the Hub (default: main)");

export const adapterOption = (): Option =>
  new Option("--adapter <place>", "PEFT directory of a LoRA adapter, or org/name[@revision] on the Hub");

/** How the base's linear layers are kept. */
export const quantizeOption = (): Option =>
  new Option(
    "--quantize <format>",
    "keep the base's linear layers in 8 or 4 bits a weight (default: as they are stored)",
  ).choices(["int8", "nf4"]);

/** What `quantizeOption` asks for: weights in 16 bits stay what they are. */
export const weightFormat = (quantize: "int8" | "nf4" | undefined): WeightFormat => quantize ?? "stored";

export const dataOption = (): Option =>
  new Option(
    "--data <place>",
    'a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a directory with train, valid and test ones (see lowrank data --help); for a classifier JSONL of {"text","text_pair"?,"label"}',
  ).makeOptionMandatory();

export const templateOption = (): Option =>
  new Option("--chat-template <file>", "Jinja file that writes messages as text, or chatml (default: the model's own)");

/** How records become rows. */
export const rowOptions = (): Option[] => [
  new Option(
    "--loss-on <what>",
    "what is learned of a row (default: assistant for messages, completion for prompts, all for text)",
  ).choices(["assistant", "last", "completion", "all"]),
  templateOption(),
  new Option("--prompt-separator <text>", "in .txt files, each line is a prompt, this separator and a completion"),
];

/** What `rowOptions` give. */
export interface RowArguments {
  readonly lossOn?: LossOn;
  readonly chatTemplate?: string;
  readonly promptSeparator?: string;
}

export const validSplitOption = (command: string): Option =>
  numeric(command, "--valid-split <share>", "hold out this share of the rows and evaluate on them now and then", {
    rule: "a number above 0 and below 1",
    holds: (x) => x > 0 && x < 1,
  });

export const packingOption = (): Option =>
  new Option("--packing", "put several rows into one of --max-length, each seeing only itself: less padding");

export const preferenceOption = (): Option =>
  new Option(
    "--preference <loss>",
    'rows are pairs {"prompt","chosen","rejected"}, of which one answer is preferred (dpo: direct preference optimisation); --batch-size counts pairs',
  ).choices(["dpo"]);

/** How pairs of answers are learned. */
export const preferenceOptions = (command: string): Option[] => [
  preferenceOption(),
  numeric(
    command,
    "--beta <x>",
    "with --preference: how strongly the adapter is held to the base (default: 0.1)",
    ABOVE_0,
  ),
];

/** What training may ask of the loss beside. */
export const lossOptions = (command: string): Option[] => [
  numeric(
    command,
    "--label-smoothing <p>",
    "share of a target's weight that goes to all words alike; with --preference: share of pairs that are the wrong way round, below 0.5 (default: 0)",
    { rule: "a number of at least 0 and below 1", holds: (x) => x >= 0 && x < 1 },
  ),
  numeric(
    command,
    "--neftune-alpha <x>",
    "noise on the embeddings in training (NEFTune), such as 5 (default: none)",
    ABOVE_0,
  ),
];

export const numLabelsOption = (command: string): Option =>
  whole(command, "--num-labels <n>", "give an encoder a new classifier for so many classes, in place of its own", 2);

export const maxLengthOption = (command: string): Option =>
  whole(command, "--max-length <n>", "cut rows to so many tokens (default: 512, or the model's context if smaller)", 2);

export const jsonOption = (): Option => new Option("--json", "end stdout with one line of JSON");

/** The settings of a new adapter. */
export function loraOptions(command: string): Option[] {
  return [
    whole(command, "--rank <n>", "rank r of the update", 1, 16),
    numeric(command, "--alpha <x>", "the update is scaled by alpha / rank", { ...ABOVE_0, preset: 32 }),
    numeric(command, "--dropout <p>", "share of what the adapter reads that is dropped in training", {
      rule: "a number of at least 0 and below 1",
      holds: (x) => x >= 0 && x < 1,
      preset: 0,
    }),
    new Option("--target-modules <which>", "all-linear, names separated by commas, or /regular expression/")
      .argParser(parseTargets)
      .default("all-linear"),
    new Option("--exclude-modules <which>", "targets that are left out, written likewise").argParser(parseTargets),
    new Option("--layers-to-transform <list>", "numbers of the layers that are adapted, such as 0,4-7").argParser(
      (text) => parseLayers(command, text),
    ),
    new Option(
      "--init <start>",
      "gaussian, orthogonal; a part of the base: pissa, pissa_niter_N (faster), olora; by the data: eva, lora_ga; with --quantize: loftq (default: PEFT's usual start)",
    ).argParser((text) => parseInit(command, text)),
    whole(command, "--init-batches <n>", "batches of the data that --init eva and lora_ga look at", 1, 8),
    new Option("--lora-fa", "train B alone, its gradient projected for a frozen A (LoRA-FA)"),
    new Option("--modules-to-save <names>", "modules that are trained whole, such as norm,lm_head").argParser(
      parseNames,
    ),
    new Option(
      "--trainable-token-indices <ids>",
      "tokens whose rows of the embedding are trained: 7,9, or embed_tokens=7,9;lm_head=7",
    ).argParser((text) => parseTokens(command, text)),
    new Option("--bias <which>", "biases that are trained").choices(["none", "all", "lora_only"]),
    new Option("--lora-bias", "give B a bias"),
    new Option("--use-dora", "learn magnitude and direction apart (DoRA)"),
    new Option("--use-rslora", "scale by alpha / √rank (rsLoRA)"),
  ];
}

/** What `loraOptions` give. */
export interface LoraArguments {
  readonly rank: number;
  readonly alpha: number;
  readonly dropout: number;
  readonly targetModules: TargetModules;
  readonly excludeModules?: TargetModules;
  readonly layersToTransform?: readonly number[];
  readonly init?: Init;
  readonly initBatches: number;
  readonly loraFa?: boolean;
  readonly modulesToSave?: readonly string[];
  readonly trainableTokenIndices?: NonNullable<LoraConfig["trainableTokenIndices"]>;
  readonly bias?: NonNullable<LoraConfig["bias"]>;
  readonly loraBias?: boolean;
  readonly useDora?: boolean;
  readonly useRslora?: boolean;
}

/** Starts that are fitted to data. */
type DataInit = "eva" | "lora_ga";

type Init = LoraInit | DataInit | "loftq";

/** Whether W is kept twice: a part of the base is taken. */
export const keepsTwice = ({ init }: Pick<LoraArguments, "init">): boolean =>
  init === "lora_ga" || (init !== undefined && init !== "eva" && init !== "loftq" && takesFromBase(init));

/** In what a run keeps the base's linear layers: what takes a part of them needs them in f32. */
export const trainedFormat = (
  options: Pick<LoraArguments, "init"> & { readonly quantize?: "int8" | "nf4" },
): WeightFormat => (options.quantize === undefined && keepsTwice(options) ? "f32" : weightFormat(options.quantize));

/** The ranks to plan with: EVA deals them out by the data, and gives a module at most twice its own. */
export const plannedConfig = (options: LoraArguments): LoraConfig =>
  loraConfig(options.init === "eva" ? { ...options, rank: 2 * options.rank } : options);

export function loraConfig(options: LoraArguments): LoraConfig {
  const { rank: r, alpha, dropout, targetModules, excludeModules, layersToTransform } = options;
  const { modulesToSave, trainableTokenIndices, bias } = options;
  return {
    ...{ r, alpha, dropout, targetModules },
    ...(excludeModules && { excludeModules }),
    ...(layersToTransform && { layersToTransform }),
    ...(modulesToSave && { modulesToSave }),
    ...(trainableTokenIndices && { trainableTokenIndices }),
    ...(bias && { bias }),
    ...(options.loraBias && { loraBias: true }),
    ...(options.useDora && { useDora: true }),
    ...(options.useRslora && { useRslora: true }),
  };
}

/** The names of `loraOptions`, which an adapter that is gone on from has already. */
export const LORA_OPTIONS: string[] = [
  "rank",
  "alpha",
  "dropout",
  "targetModules",
  "excludeModules",
  "layersToTransform",
  "init",
  "initBatches",
  "modulesToSave",
  "trainableTokenIndices",
  "bias",
  "loraBias",
  "useDora",
  "useRslora",
];

function parseInit(command: string, text: string): Init {
  const names = ["gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "eva", "lora_ga", "loftq"];
  if (!names.includes(text.replace(/^pissa_niter_\d+$/, "pissa_niter_N")) || text === "pissa_niter_N")
    throw new ShapeError(
      `${command}: --init must be one of ${names.join(", ")}, got "${text}". Leave it out for PEFT's usual start`,
    );
  return text as Init;
}

/** "0,4-7" */
function parseLayers(command: string, text: string): number[] {
  return text.split(",").flatMap((part) => {
    const [, first, last = first] = /^(\d+)(?:-(\d+))?$/.exec(part.trim()) ?? [];
    if (first === undefined || Number(last) < Number(first))
      throw new ShapeError(`${command}: --layers-to-transform must be numbers and ranges such as 0,4-7, got ${text}`);
    return Array.from({ length: Number(last) - Number(first) + 1 }, (_, i) => Number(first) + i);
  });
}

/** What a step works on at a time. */
export function stepOptions(command: string): Option[] {
  return [
    whole(command, "--batch-size <n>", "rows of one forward pass", 1, 4),
    whole(command, "--grad-accumulation <n>", "forward passes of one optimizer step", 1, 1),
    new Option("--checkpointing", "keep only what goes into each block and compute it again: less memory, more time"),
  ];
}

/** "all-linear" and a regular expression stay a string, as in PEFT; names become a list. */
export function parseTargets(text: string): TargetModules {
  const pattern = /^\/(.+)\/$/.exec(text)?.[1];
  if (pattern !== undefined) return pattern;
  return text.toLowerCase() === "all-linear" ? "all-linear" : parseNames(text);
}

const parseNames = (text: string): string[] =>
  text
    .split(",")
    .map((entry) => entry.trim())
    .filter(Boolean);

/** "7,9" or "embed_tokens=7,9;lm_head=7" */
function parseTokens(command: string, text: string): NonNullable<LoraConfig["trainableTokenIndices"]> {
  const ids = (list: string): number[] => {
    if (/^\s*\d+(\s*,\s*\d+)*\s*$/.test(list)) return list.split(",").map(Number);
    throw new ShapeError(
      `${command}: --trainable-token-indices must be ids such as 7,9, or embed_tokens=7,9;lm_head=7, got ${text}`,
    );
  };
  if (!text.includes("=")) return ids(text);
  return Object.fromEntries(text.split(";").map((part) => [part.split("=")[0]?.trim(), ids(part.split("=")[1] ?? "")]));
}
