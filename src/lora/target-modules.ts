import { listSome } from "../nn/checkpoint.ts";
import { ShapeError } from "../tensor/errors.ts";

/** A list of module names or suffixes, a regular expression as a string, or "all-linear". */
export type TargetModules = readonly string[] | string;

const fits = (entry: string, name: string): boolean => name === entry || name.endsWith(`.${entry}`);

/** Whether it stands for every linear layer. */
export const isAllLinear = (target: TargetModules): boolean =>
  typeof target === "string" && target.toLowerCase() === "all-linear";

/** Whether a specification names this module, by PEFT's rules: see `matchModules`. Throws ShapeError for a bad regular expression. */
export function matchesModule(target: TargetModules, name: string): boolean {
  if (typeof target !== "string") return target.some((entry) => fits(entry, name));
  if (isAllLinear(target)) return true;
  try {
    return new RegExp(`^(?:${target})$`).test(name);
  } catch {
    throw new ShapeError(`target modules: "${target}" is not a regular expression. Give names, or all-linear`);
  }
}

/** The entries of a list that name none of these modules. */
export const idleEntries = (target: TargetModules, modules: readonly string[]): readonly string[] =>
  typeof target === "string" ? [] : target.filter((entry) => !modules.some((name) => fits(entry, name)));

/**
 * The modules a target specification names, by PEFT's rules: a list entry matches a module whose name is it or ends with
 * ".entry"; a string is a regular expression that must match the whole name; "all-linear" is every module.
 *
 * Throws ShapeError, listing what exists, when an entry matches nothing.
 */
export function matchModules(target: TargetModules, modules: readonly string[]): string[] {
  const choices = `The model has ${listSome([...new Set(modules.map((name) => name.split(".").at(-1) ?? name))], 20)}`;
  if (target.length === 0)
    throw new ShapeError(`target modules: at least one is needed, got an empty list. ${choices}`);
  const matched = modules.filter((name) => matchesModule(target, name));
  const idle = matched.length === 0 ? String(target) : idleEntries(target, modules)[0];
  if (idle !== undefined) throw new ShapeError(`target modules: "${idle}" must match a module, got none. ${choices}`);
  return matched;
}
