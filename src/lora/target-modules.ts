import { listSome } from "../nn/checkpoint.ts";
import { ShapeError } from "../tensor/errors.ts";

/** A list of module names or suffixes, a regular expression as a string, or "all-linear". */
export type TargetModules = readonly string[] | string;

/**
 * The modules a target specification names, by PEFT's rules: a list entry matches a module whose name is it or ends with
 * ".entry"; a string is a regular expression that must match the whole name; "all-linear" is every module.
 *
 * Throws ShapeError, listing what exists, when an entry matches nothing.
 */
export function matchModules(target: TargetModules, modules: readonly string[]): string[] {
  const choices = `The model has ${listSome([...new Set(modules.map((name) => name.split(".").at(-1) ?? name))], 20)}`;
  if (typeof target === "string") {
    if (target.toLowerCase() === "all-linear") return [...modules];
    let pattern: RegExp;
    try {
      pattern = new RegExp(`^(?:${target})$`);
    } catch {
      throw new ShapeError(`target modules: "${target}" is not a regular expression. ${choices}`);
    }
    const matched = modules.filter((name) => pattern.test(name));
    if (matched.length === 0)
      throw new ShapeError(`target modules: "${target}" must match a module, got none. ${choices}`);
    return matched;
  }
  const matches = (entry: string, name: string): boolean => name === entry || name.endsWith(`.${entry}`);
  for (const entry of target)
    if (!modules.some((name) => matches(entry, name)))
      throw new ShapeError(`target modules: "${entry}" must match a module, got none. ${choices}`);
  if (target.length === 0)
    throw new ShapeError(`target modules: at least one is needed, got an empty list. ${choices}`);
  return modules.filter((name) => target.some((entry) => matches(entry, name)));
}
