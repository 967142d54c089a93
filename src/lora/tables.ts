/** Which embeddings and heads an adapter is for, and which of their rows. */
import type { Module } from "../nn/module.ts";
import type { Table } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isSaved, type LoraConfig, modulesOf } from "./config.ts";
import type { HasLinears } from "./parts.ts";
import { isAllLinear, matchesModule } from "./target-modules.ts";

const isTable = (module: Module): module is Table => "use" in module;

/** The embeddings and heads of a model by name. */
export const tablesOf = ({ modules = new Map() }: HasLinears): Map<string, Table> =>
  new Map([...modules].flatMap(([name, module]) => (isTable(module) ? [[name, module] as const] : [])));

/** V and C. */
export function tableSize({ weight }: Table): readonly [V: number, C: number] {
  const rows = weight.reduce((sum, { shape: [count = 0] }) => sum + count, 0);
  return [rows, weight[0]?.shape[1] ?? 0];
}

/** The name of another table on the same weight. */
export const tiedTo = (model: HasLinears, table: Table): string | undefined =>
  [...tablesOf(model)].find(([, other]) => other !== table && other.weight === table.weight)?.[0];

export interface Targets {
  readonly linears: readonly string[];
  readonly tables: readonly string[];
}

/** The modules that can be targets by name. */
export const targetable = (model: HasLinears): string[] => [...model.linears.keys(), ...tablesOf(model).keys()];

/**
 * The targets among the linear layers, and among embeddings and the head where they are named: "all-linear" is without them, as in PEFT.
 *
 * Throws ShapeError as `modulesOf`, and for DoRA or a bias of B on a table.
 */
export function targetsIn(config: LoraConfig, model: HasLinears): Targets {
  const tables = tablesOf(model);
  const found = modulesOf(config, isAllLinear(config.targetModules) ? [...model.linears.keys()] : targetable(model));
  const [table] = found.filter((name) => tables.has(name));
  for (const [setting, is] of [
    ["use_dora", config.useDora],
    ["lora_bias", config.loraBias],
  ] as const)
    if (table !== undefined && is)
      throw new ShapeError(`lora: ${setting} is for linear layers, got ${table} as a target. Leave one of them out`);
  return {
    linears: found.filter((name) => !tables.has(name)),
    tables: found.filter((name) => tables.has(name)),
  };
}

/** A table of which rows are trained, with the head that shares them. */
export interface TokenTarget {
  readonly name: string;
  readonly tables: readonly Table[];
  readonly ids: readonly number[];
}

/**
 * What `trainableTokenIndices` names. A list is about the embedding of the tokens; a tied head shares an embedding's rows unless it is named
 * with others, as in PEFT.
 *
 * Throws ShapeError where a name is of no table, an id is past its end, and where a table is adapted otherwise too.
 */
export function tokenTargets(config: LoraConfig, model: HasLinears): TokenTarget[] {
  const { trainableTokenIndices: given } = config;
  if (!given) return [];
  const tables = tablesOf(model);
  const byName = new Map<string, readonly number[]>();
  const entries = Array.isArray(given) ? [["", given] as const] : Object.entries(given as Record<string, number[]>);
  for (const [entry, ids] of entries) {
    const name = [...tables.keys()].find((one) => entry === "" || matchesModule([entry], one)); // the first is the input's
    if (name === undefined)
      throw new ShapeError(
        `lora: trainable_token_indices must name an embedding or a head, got "${entry}". The model has ${[...tables.keys()].join(", ") || "none"}`,
      );
    byName.set(name, ids as readonly number[]);
  }
  return [...byName].flatMap(([name, ids]): TokenTarget[] => {
    const table = tables.get(name) as Table;
    const twin = tiedTo(model, table);
    const own = twin === undefined ? undefined : byName.get(twin);
    if (table.use === "head" && own && `${own}` === `${ids}`) return []; // the embedding's
    const [V] = tableSize(table);
    const past = ids.find((id) => id >= V);
    if (past !== undefined)
      throw new ShapeError(`lora: trainable_token_indices of ${name} must be below ${V}, its rows, got ${past}`);
    const shares = twin !== undefined && table.use === "embedding" && (!own || `${own}` === `${ids}`);
    const names = shares ? [name, twin] : [name];
    const taken = names.find(
      (one) => isSaved(config.modulesToSave, one) || targetsIn(config, model).tables.includes(one),
    );
    if (taken !== undefined)
      throw new ShapeError(
        `lora: rows of ${name} are trained alone, got ${taken} in target_modules or modules_to_save too. Leave one of them out`,
      );
    return [{ name, ids, tables: names.flatMap((one) => tables.get(one) ?? []) }];
  });
}
