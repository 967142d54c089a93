/** sweep.yaml: what a sweep runs, and the settings it looks among. */
import { stringify } from "yaml";
import { FormatError } from "../io/errors.ts";
import { isObject, type JsonObject } from "../io/json.ts";
import { ShapeError } from "../tensor/errors.ts";
import { checkSpace, type Dimension, type SearchPoint, type SearchSpace, type Setting } from "../train/search.ts";
import type { SweepStrategy } from "../train/sweep.ts";
import { didYouMean, kebab, readYaml } from "./run-config.ts";

export interface SweepConfig {
  readonly model: string;
  readonly data: string;
  readonly validData?: string;
  readonly validSplit?: number;
  readonly strategy: SweepStrategy;
  readonly trials: number;
  /** Trials that are proposed at a time, and train at once where they can. */
  readonly together: number;
  /** Of a trial. */
  readonly steps: number;
  readonly batchSize: number;
  readonly maxLength?: number;
  readonly seed: number;
  /** Of a trial. */
  readonly evaluations: number;
  /** Settings that are the same in all trials. */
  readonly fixed: SearchPoint;
  readonly space: SearchSpace;
  /** All of it by its names in the file, with what is by default. */
  readonly resolved: JsonObject;
}

/** What a key may be, in words and as a check, and what it is by default. */
interface Rule {
  readonly rule: string;
  readonly holds: (value: unknown) => boolean;
  readonly preset?: Setting;
  readonly isNeeded?: boolean;
}

const numbers =
  (holds: (value: number) => boolean) =>
  (value: unknown): boolean =>
    typeof value === "number" && Number.isFinite(value) && holds(value);
const count = (least: number): Rule => ({
  rule: `a whole number of at least ${least}`,
  holds: numbers((n) => Number.isSafeInteger(n) && n >= least),
});
const TEXT: Rule = { rule: "a text", holds: (value) => typeof value === "string" && value !== "" };
const STRATEGIES: readonly unknown[] = ["bayes", "random", "grid"];

/** What a space may have. Their defaults are those of `lowrank train`. */
const SETTINGS: Readonly<Record<string, Rule>> = {
  rank: { ...count(1), preset: 16 },
  alpha: { rule: "a number above 0", holds: numbers((x) => x > 0), preset: 32 },
  "learning-rate": { rule: "a number of at least 0", holds: numbers((x) => x >= 0), preset: 2e-4 },
  "target-modules": { ...TEXT, rule: "all-linear, names or /regular expression/", preset: "all-linear" },
  dropout: { rule: "a number of at least 0 and below 1", holds: numbers((p) => p >= 0 && p < 1), preset: 0 },
  warmup: { rule: "a fraction from 0 to 1", holds: numbers((x) => x >= 0 && x <= 1), preset: 0.03 },
  "weight-decay": { rule: "a number of at least 0", holds: numbers((x) => x >= 0), preset: 0 },
};

const KEYS: Readonly<Record<string, Rule>> = {
  model: { ...TEXT, isNeeded: true },
  data: { ...TEXT, isNeeded: true },
  "valid-data": TEXT,
  "valid-split": { rule: "a number above 0 and below 1", holds: numbers((x) => x > 0 && x < 1) },
  strategy: { rule: "bayes, random or grid", holds: (value) => STRATEGIES.includes(value), preset: "bayes" },
  trials: { ...count(1), preset: 20 },
  together: count(1),
  steps: { ...count(1), isNeeded: true },
  "batch-size": { ...count(1), preset: 4 },
  "max-length": count(2),
  seed: { ...count(0), preset: 0 },
  evaluations: { ...count(1), preset: 5 },
};

/** By default. Of "bayes" each but the first of a round is proposed knowing less. */
const TOGETHER: Readonly<Record<SweepStrategy, number>> = { grid: 4, random: 4, bayes: 2 };

/** Throws FormatError naming file and line for a key that is none, one that is missing, and a value out of range. `together` counts in place of the file's. */
export function readSweepConfig(path: string, text: string, together?: number): SweepConfig {
  const { values: written, where } = readYaml(path, text);
  const values = named(written, [...Object.keys(KEYS), ...Object.keys(SETTINGS), "space"], "sweep.yaml", where);
  const space = readSpace(values.space, (...keys) => where("space", ...keys));
  const twice = Object.keys(space).find((name) => values[name] !== undefined);
  if (twice !== undefined)
    throw new FormatError(`${where(twice)}: "${twice}" must be fixed or in the space, got both. Leave one out`);
  if (values["valid-data"] !== undefined && values["valid-split"] !== undefined)
    throw new FormatError(`${where("valid-split")}: "valid-split" must not go with "valid-data". Leave one out`);
  const fixed = Object.fromEntries(Object.entries(SETTINGS).filter(([name]) => !(name in space)));
  const [given, settings] = [read(values, KEYS, where), read(values, fixed, where)];
  const preset = TOGETHER[given.strategy as SweepStrategy];
  const run = { ...given, together: together ?? given.together ?? preset };
  const camel = (name: string): string => name.replace(/-./g, (part) => part.slice(1).toUpperCase());
  const dimensions = Object.entries(space).map(([name, of]) => [name, "values" in of ? of.values : of]);
  const options = Object.fromEntries(Object.entries(run).map(([name, value]) => [camel(name), value]));
  return {
    ...(options as unknown as Omit<SweepConfig, "fixed" | "space" | "resolved">),
    ...{ fixed: settings, space, resolved: { ...run, ...settings, space: Object.fromEntries(dimensions) } },
  };
}

/** As a file that says the same. */
export const sweepYaml = ({ resolved }: SweepConfig): string => stringify(resolved);

type Where = (...keys: string[]) => string;

/** The values by their names with dashes. */
function named(written: JsonObject, names: readonly string[], of: string, where: Where): JsonObject {
  const wrong = Object.keys(written).find((key) => !names.includes(kebab(key)));
  if (wrong !== undefined)
    throw new FormatError(`${where(wrong)}: a key must be one of ${of}, got "${wrong}"${didYouMean(wrong, names)}`);
  return Object.fromEntries(Object.entries(written).map(([key, value]) => [kebab(key), value ?? undefined]));
}

function read(values: JsonObject, rules: Readonly<Record<string, Rule>>, where: Where): SearchPoint {
  return Object.fromEntries(
    Object.entries(rules).flatMap(([name, rule]): [string, Setting][] => {
      const given = values[name] ?? rule.preset;
      if (given !== undefined) return [[name, checked(name, given, rule, where(name))]];
      if (rule.isNeeded) throw new FormatError(`${where()}: "${name}" must be ${rule.rule}, got nothing`);
      return [];
    }),
  );
}

/** A list of names is the same as the names with commas between them. */
function checked(name: string, given: unknown, { rule, holds }: Rule, at: string): Setting {
  const isNames = name === "target-modules" && Array.isArray(given) && given.every((one) => typeof one === "string");
  const value = isNames ? given.join(",") : given;
  if (!holds(value))
    throw new FormatError(`${at}: "${name}" must be ${rule}, got ${JSON.stringify(given) ?? "nothing"}`);
  return value as Setting;
}

function readSpace(given: unknown, where: Where): SearchSpace {
  if (!isObject(given))
    throw new FormatError(
      `${where()}: "space" must have settings with their values, such as "rank: [4, 8]", got ${JSON.stringify(given ?? null)}`,
    );
  const settings = named(given, Object.keys(SETTINGS), "the settings of a space", where);
  const names = Object.keys(SETTINGS).filter((name) => name in settings); // trials do not depend on the order in the file
  const space = Object.fromEntries(names.map((name) => [name, readDimension(name, settings[name], where)]));
  try {
    checkSpace(space);
  } catch (error) {
    throw error instanceof ShapeError ? new FormatError(`${where()}: ${error.message}`) : error;
  }
  return space;
}

function readDimension(name: string, given: unknown, where: Where): Dimension {
  const rule = SETTINGS[name] as Rule;
  if (Array.isArray(given)) return { values: given.map((value) => checked(name, value, rule, where(name))) };
  if (!isObject(given) || name === "target-modules")
    throw new FormatError(
      `${where(name)}: "${name}" must be a list of values${name === "target-modules" ? "" : " or {min, max}"}, got ${JSON.stringify(given ?? null)}`,
    );
  const { min, max, log, whole } = named(given, ["min", "max", "log", "whole"], "a range", (...keys) =>
    where(name, ...keys),
  );
  for (const [key, flag] of Object.entries({ log, whole }))
    if (flag !== undefined && typeof flag !== "boolean")
      throw new FormatError(`${where(name, key)}: "${key}" must be true or false, got ${JSON.stringify(flag)}`);
  const end = (key: string, value: unknown): number => Number(checked(`${name}.${key}`, value, rule, where(name, key)));
  return { min: end("min", min), max: end("max", max), log: log === true, whole: whole === true || name === "rank" };
}
