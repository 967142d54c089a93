/** A command's options in a YAML file, by their names: read before those of the command line, which count more, and written beside what a run made. */
import { type Command, Option } from "commander";
import { isMap, isScalar, LineCounter, parseDocument, type Scalar, stringify } from "yaml";
import { FormatError } from "../io/errors.ts";
import { isObject, type JsonObject } from "../io/json.ts";
import { readTextFile } from "./session.ts";

export const configOption = (): Option =>
  new Option(
    "--config <file>",
    "YAML file of these options by their names, without the dashes; what is said on the command line counts more",
  );

/** How an option was said: its values as they were written, or true for a flag. */
type Said = Map<Option, readonly string[] | true>;

/**
 * The arguments of a command with what its `--config` file says put in front. Options of the file that contradict one of the command line are
 * left out. Throws FormatError naming file and line for what is not YAML, no option of the command, or no value for it.
 */
export async function withConfig(command: Command, args: readonly string[]): Promise<string[]> {
  const said = optionsIn(command, args);
  // Where it must be given it is the command's own, not a file of options.
  const [, file] = [...said].find(([option]) => option.long === "--config" && !option.mandatory) ?? [];
  const path = Array.isArray(file) ? file.at(-1) : undefined;
  if (path === undefined) return [...args];
  const settings = readSettings(command, path, await readTextFile(path));
  return [...settings.filter(({ option }) => isFree(option, said)).flatMap(({ words }) => words), ...args];
}

/** Whether an option contradicts none that was said. */
const isFree = (option: Option, said: Said): boolean =>
  ![...said.keys()].some((other) => other !== option && (excludes(other, option) || excludes(option, other)));

const excludes = (a: Option, b: Option): boolean =>
  ((a as Option & { conflictsWith?: string[] }).conflictsWith ?? []).includes(b.attributeName());

interface Setting {
  readonly option: Option;
  /** As on the command line. */
  readonly words: readonly string[];
}

function readSettings(command: Command, path: string, text: string): Setting[] {
  const { values, where } = readYaml(path, text);
  return Object.entries(values).flatMap(([key, value]) => {
    const name = kebab(key);
    const option = optionNamed(command, name);
    if (!option || name === "config") throw unknown(command, where(key), key);
    return value === null ? [] : [{ option, words: wordsOf(option, key, value, where(key)) }];
  });
}

/** What a YAML file says, by keys. Throws FormatError naming file and line for what is not YAML or has no keys. */
export function readYaml(
  path: string,
  text: string,
): { readonly values: JsonObject; readonly where: (...keys: string[]) => string } {
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, uniqueKeys: true });
  const [problem] = document.errors;
  if (problem)
    throw new FormatError(`${path}:${lines.linePos(problem.pos[0]).line}: must be YAML, ${firstLine(problem.message)}`);
  const values: unknown = document.toJS({ maxAliasCount: 10 });
  if (!isObject(values))
    throw new FormatError(`${path}: must have one option per line, such as "rank: 8", got ${JSON.stringify(values)}`);
  const where = (...keys: string[]): string => {
    let [node, key]: unknown[] = [document.contents];
    for (const name of keys) {
      const isNamed = (one: Scalar): boolean => kebab(String(one.value)) === kebab(name);
      const pair = isMap<Scalar>(node) ? node.items.find((one) => isNamed(one.key)) : undefined;
      [node, key] = [pair?.value, pair?.key];
    }
    return isScalar(key) && key.range ? `${path}:${lines.linePos(key.range[0]).line}` : path;
  };
  return { values, where };
}

const firstLine = (text: string): string => `got: ${text.split("\n")[0]}`;

/** "batchSize" and "batch_size" are "batch-size". */
export const kebab = (key: string): string =>
  key.replaceAll("_", "-").replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);

const optionNamed = (command: Command, name: string): Option | undefined =>
  command.options.find(({ long }) => long === `--${name}` || long === `--no-${name}`);

function wordsOf(option: Option, key: string, value: unknown, where: string): string[] {
  const isFlag = !option.required && !option.optional;
  const wrong = (rule: string): FormatError =>
    new FormatError(`${where}: "${key}" must be ${rule}, got ${JSON.stringify(value)}`);
  if (isFlag) {
    if (typeof value !== "boolean") throw wrong("true or false");
    return value === option.negate ? [] : [String(option.long)];
  }
  const all: unknown[] = Array.isArray(value) ? value : [value];
  if (all.length === 0 || !all.every((one) => typeof one === "string" || typeof one === "number"))
    throw wrong("a text, a number or a list of such");
  return option.variadic ? all.map((one) => `${option.long}=${one}`) : [`${option.long}=${all.join(",")}`];
}

function unknown(command: Command, where: string, key: string): FormatError {
  const names = command.options
    .map((option) => String(option.long).replace(/^--(no-)?/, ""))
    .filter((name) => name !== "config");
  return new FormatError(
    `${where}: a key must be an option of ${command.name()}, got "${key}"${didYouMean(key, names)}`,
  );
}

/** `. Did you mean "rank"?` of the name that is nearest to a key, or nothing where none is near. */
export function didYouMean(key: string, names: readonly string[]): string {
  const distances = names.map((name) => ({ name, distance: editDistance(name, kebab(key)) }));
  const nearest = distances.reduce((a, b) => (b.distance < a.distance ? b : a));
  return nearest.distance <= 1 + key.length / 3 ? `. Did you mean "${nearest.name}"?` : "";
}

/** Letters to be put in, taken out or replaced (Levenshtein). */
export function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (const [i, letter] of [...a].entries()) {
    const next = [i + 1];
    for (let j = 1; j <= b.length; j++) {
      const replaced = (row[j - 1] ?? 0) + Number(letter !== b[j - 1]);
      next.push(Math.min((row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1, replaced));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}

/** The options that these arguments say, of a repeated one all values. */
function optionsIn(command: Command, args: readonly string[]): Said {
  const said: Said = new Map();
  for (let i = 0; i < args.length; i++) {
    const [name, ...rest] = (args[i] ?? "").split("=");
    const option = command.options.find(({ long }) => long === name);
    if (!option) continue;
    if (!option.required && !option.optional) said.set(option, true);
    else {
      const before = said.get(option);
      const values = [rest.length > 0 ? rest.join("=") : (args[++i] ?? "")];
      const hasMore = (): boolean => option.variadic && rest.length === 0 && args[i + 1]?.startsWith("-") === false;
      while (hasMore()) values.push(args[++i] as string);
      said.set(option, [...(Array.isArray(before) ? before : []), ...values]);
    }
  }
  return said;
}

/** Every option of a command as it was said, or by a default that goes with these: a file for `--config` that makes the same run. */
export function resolvedConfig(command: Command, args: readonly string[]): string {
  const said = optionsIn(command, args);
  const entries = command.options.flatMap((option): [string, unknown][] => {
    const name = String(option.long).replace(/^--(no-)?/, "");
    if (["config", "json", "help", "resume", "dry-run"].includes(name)) return [];
    const value = said.get(option);
    if (value === true) return [[name, !option.negate]];
    if (value) return [[name, option.variadic ? value : plain(value.at(-1))]];
    const isLeft = option.defaultValue === undefined || option.negate || !isFree(option, said);
    return isLeft ? [] : [[name, option.defaultValue]];
  });
  return stringify(Object.fromEntries(entries));
}

/** A number as such, where that is written the same. */
const plain = (text = ""): string | number => (String(Number(text)) === text ? Number(text) : text);

/** How a command was run. */
export interface SaidCommand {
  /** "lowrank train --model base", to be typed again. */
  readonly line: string;
  /** See `resolvedConfig`. */
  readonly config: string;
}

export function saidCommand(command: Command): SaidCommand {
  const { rawArgs } = (command.parent ?? command) as Command & { readonly rawArgs: readonly string[] };
  const args = command.parent ? rawArgs.slice(rawArgs.indexOf(command.name()) + 1) : rawArgs;
  const quoted = (word: string): string =>
    /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
  return {
    line: ["lowrank", command.name(), ...args.map(quoted)].join(" "),
    config: resolvedConfig(command, args),
  };
}
