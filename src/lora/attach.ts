/** Putting an adapter on a model: fresh, or of given parts, which go into one buffer. */
import type { Linear } from "../nn/linear.ts";
import type { Module } from "../nn/module.ts";
import type { Table } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { slice, type Tensor } from "../tensor/tensor.ts";
import { LoraAdapter } from "./adapter.ts";
import { checkConfig, type LoraConfig, settingsOf, withHeads } from "./config.ts";
import { type Flat, layOut, STEP } from "./flat.ts";
import { freshPair, freshRows, freshTable } from "./fresh.ts";
import {
  type Group,
  type HasLinears,
  type LoraPair,
  type LoraParts,
  PARTS,
  type SavedLayer,
  type SavedParts,
  type TablePair,
  type TableParts,
  type TokenRows,
} from "./parts.ts";
import { biasedModulesOf, copyOf, parametersOf, savedModulesOf } from "./saved.ts";
import { type TokenTarget, tablesOf, targetsIn, tiedTo, tokenTargets } from "./tables.ts";

/** What is to be put on a model: the names of the modules, by what is done to them. */
export interface Wanted {
  readonly linears: readonly string[];
  readonly tables: readonly string[];
  readonly tokens: readonly TokenTarget[];
  /** Trained whole. */
  readonly saved: readonly string[];
  /** Of which the bias is trained. */
  readonly biased: readonly string[];
}

/** What the settings ask for of a model. Throws ShapeError where it does not fit. */
export function wantedOf(config: LoraConfig, model: HasLinears): Wanted {
  const saved = savedModulesOf(config, model);
  const targets = targetsIn(config, model);
  const biased = biasedModulesOf(config, model, [...saved, ...targets.linears]);
  return { ...targets, tokens: tokenTargets(config, model), saved, biased };
}

/** Where parts come from. What is not given is what a fresh adapter of seed 0 has. */
export interface Makers {
  readonly linear: (module: { readonly name: string; readonly layer: Linear }) => LoraParts;
  readonly table?: (module: { readonly name: string; readonly table: Table }) => TableParts;
  readonly rows?: (target: TokenTarget) => Tensor;
  readonly save?: (module: { readonly name: string; readonly layer: Module; readonly isWhole: boolean }) => SavedParts;
}

/**
 * Adds a fresh adapter to the modules that `config` names: A uniform in ±1/√K (Kaiming, as PEFT), B zero (of an embedding A zero, B normal),
 * and DoRA's magnitudes the norms of the rows, so that the model's output is unchanged at first; a classifier's head is trained whole. The
 * base weights are frozen by not requiring gradients; the adapter's parts require them.
 *
 * Throws ShapeError for settings out of range and for a target that matches nothing.
 */
export function attachLora(model: HasLinears, settings: LoraConfig, seed = 0): LoraAdapter {
  const config = withHeads(settings, model);
  checkConfig(config);
  const random = new Random(seed);
  return attachParts(model, config, {
    linear: ({ name, layer }) => freshPair(config, name, layer, random),
    table: ({ name, table }) => freshTable(settingsOf(config, name).r, table, random),
  });
}

/**
 * Attaches the parts that the makers give for the modules of `config`. They move into one buffer, one behind the other, so that an optimizer
 * can go over all of them at once: first every A, then the others. The A's of a group of the model come in a row, which makes them one
 * matrix, unless there is something between them or their ranks or scales differ. Embeddings and heads that are trained whole are too large
 * for that and keep buffers of their own. What the makers give is the adapter's; where it cannot be attached, all of it is released.
 */
export function attachParts(model: HasLinears, config: LoraConfig, makers: Makers): LoraAdapter {
  const gpu = [...model.linears.values()][0]?.weight.gpu;
  if (!gpu) throw new ShapeError("lora: an adapter needs a layer, got none");
  const { get } = gpu.scope(() => {
    const made = makeParts(model, config, wantedOf(config, model), makers);
    return { tensors: tensorsOf(made, model), get: () => made }; // a scope looks for tensors in what it returns: not in modules
  });
  const made = get();
  const large = largeOf(made);
  let owned = tensorsOf(made, model);
  try {
    const flat = layOut(gpu, inOrder(made, model));
    owned = [flat.all, ...large];
    const parts = {
      groups: stackedGroups(made, model, flat),
      pairs: new Map(made.linears.map((one) => [one.name, movedPair(one, flat)])),
      tables: new Map(made.tables.map((one) => [one.name, movedTable(one, model, flat)])),
      tokens: new Map(made.tokens.map((one) => [one.name, movedRows(one, model, flat)])),
      saved: new Map(made.saved.map((one) => [one.name, movedCopy(one, model, flat)])),
    };
    const fanInFanOut = made.linears.some(({ name }) => model.isTransposed?.(`${name}.weight`));
    const { taskType = "CAUSAL_LM" } = model;
    return new LoraAdapter({ ...config, fanInFanOut, taskType }, parts, [flat.all, ...large]);
  } catch (error) {
    gpu.release(...owned);
    throw error;
  }
}

const isLarge = (weight: SavedParts["weight"]): weight is readonly Tensor[] =>
  weight !== undefined && "length" in weight;

function movedPair({ layer, parts, scale }: Made["linears"][number], { placeOf }: Flat): LoraPair {
  const moved = Object.fromEntries(PARTS.flatMap((part) => (parts[part] ? [[part, placeOf(parts[part])]] : [])));
  return { layer, scale, ...(moved as unknown as LoraParts) };
}

function movedTable({ table, parts, scale }: Made["tables"][number], model: HasLinears, { placeOf }: Flat): TablePair {
  return { table, scale, X: placeOf(parts.X), Y: placeOf(parts.Y), tiedTo: tiedTo(model, table) };
}

function movedRows({ tables, ids, rows }: Made["tokens"][number], model: HasLinears, { placeOf }: Flat): TokenRows {
  const [table, shared] = tables;
  return { tables, ids, rows: placeOf(rows), tiedTo: table && !shared ? tiedTo(model, table) : undefined };
}

function movedCopy({ layer, parts }: Made["saved"][number], model: HasLinears, { placeOf }: Flat): SavedLayer {
  const { weight, bias } = parts;
  if (!isLarge(weight)) return { layer, weight: weight && placeOf(weight), bias: bias && placeOf(bias) };
  for (const W of weight) W.requiresGrad = true;
  return { layer, weight, tiedTo: tiedTo(model, layer as Table) };
}

type Made = ReturnType<typeof makeParts>;

function makeParts(model: HasLinears, config: LoraConfig, wanted: Wanted, makers: Makers) {
  const random = new Random(0);
  const freshOf: Makers["table"] = ({ name, table }) => freshTable(settingsOf(config, name).r, table, random);
  const { linear, table: tableOf = freshOf, rows = freshRows } = makers;
  const { save = ({ layer, isWhole }) => copyOf(layer, isWhole) } = makers;
  const { linears, modules = linears } = model;
  const tables = tablesOf(model);
  const found = <T>(from: ReadonlyMap<string, T>, names: readonly string[]) =>
    names.flatMap((name) => {
      const one = from.get(name);
      return one ? [{ name, one, scale: settingsOf(config, name).scale }] : [];
    });
  const copies = (names: readonly string[], isWhole: boolean) =>
    found(modules, names).map(({ name, one: layer }) => ({ name, layer, parts: save({ name, layer, isWhole }) }));
  return {
    saved: [...copies(wanted.saved, true), ...copies(wanted.biased, false)],
    linears: found(linears, wanted.linears).map(({ one: layer, ...rest }) => {
      return { ...rest, layer, parts: linear({ name: rest.name, layer }) };
    }),
    tables: found(tables, wanted.tables).map(({ one: table, ...rest }) => {
      return { ...rest, table, parts: tableOf({ name: rest.name, table }) };
    }),
    tokens: wanted.tokens.map((target) => ({ ...target, rows: rows(target) })),
  };
}

const groupsOf = ({ linears }: Made, { groups = [] }: HasLinears): Made["linears"][] =>
  groups.map((names) => linears.filter(({ name }) => names.includes(name)));

/** All that shares the buffer. */
function inOrder(made: Made, model: HasLinears): Tensor[] {
  const groups = groupsOf(made, model);
  const As = made.linears.flatMap((module) => [
    ...(groups.find((group) => group.includes(module)) ?? []).map(({ parts }) => parts.A),
    module.parts.A,
  ]);
  return [
    ...As,
    ...made.tables.map(({ table, parts }) => (table.use === "head" ? parts.Y : parts.X)),
    ...made.linears.flatMap(({ parts }) => PARTS.flatMap((part) => parts[part] ?? [])),
    ...made.tables.flatMap(({ parts }) => [parts.X, parts.Y]),
    ...made.tokens.map(({ rows }) => rows),
    ...made.saved.flatMap(({ parts: { weight, bias } }) =>
      parametersOf({ weight: isLarge(weight) ? undefined : weight, bias }),
    ),
  ];
}

/** What has buffers of its own. */
const largeOf = ({ saved }: Made): Tensor[] =>
  saved.flatMap(({ parts: { weight } }) => (isLarge(weight) ? weight : []));

const tensorsOf = (made: Made, model: HasLinears): Tensor[] => [...inOrder(made, model), ...largeOf(made)];

/** The groups whose A's are one matrix. */
function stackedGroups(made: Made, model: HasLinears, flat: Flat): Group[] {
  return groupsOf(made, model).flatMap((members): Group[] => {
    const [first] = members;
    if (!first || members.length < 2 || members.some(({ parts }) => parts.A.size % STEP !== 0)) return [];
    const [r = 0, K = 0] = first.parts.A.shape;
    if (members.some(({ parts, scale }) => parts.A.shape[0] !== r || scale !== first.scale)) return [];
    const names = members.map(({ name }) => name);
    return [{ names, A: slice(flat.all, flat.startOf(first.parts.A), [members.length * r, K]) }];
  });
}
