/** Adapters in PEFT's own format, both ways: `adapter_config.json` and `adapter_model.safetensors`. */
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { readJson } from "../io/json.ts";
import { encodeSafetensors, type TensorToWrite } from "../io/safetensors.ts";
import { scale } from "../kernels/axpy.ts";
import { putColumns } from "../kernels/copy-rows.ts";
import { transpose } from "../kernels/transpose.ts";
import { type Checkpoint, listSome, loadTensor, madeToWrite, openCheckpoint, tensorToWrite } from "../nn/checkpoint.ts";
import type { Module } from "../nn/module.ts";
import type { Table } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import { piecesOf } from "../tensor/pieces.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import type { LoraAdapter } from "./adapter.ts";
import { attachParts, type Wanted, wantedOf } from "./attach.ts";
import { type LoraConfig, settingsOf } from "./config.ts";
import type { HasLinears, LoraParts, SavedParts, TableParts } from "./parts.ts";
import { CONFIG, configWarnings, encodeConfig, readAdapterConfig } from "./peft-config.ts";
import { tableSize, tablesOf, targetable } from "./tables.ts";
import { idleEntries } from "./target-modules.ts";

export const PREFIX = "base_model.model.";

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

/** Those of a table, whether the file has the transpose: an embedding's A is [r,V] and its B [C,r]. */
export const TABLE_KEYS: Readonly<
  Record<Table["use"], { readonly X: string; readonly Y: string; readonly isTurned: boolean }>
> = {
  embedding: { X: "lora_embedding_A", Y: "lora_embedding_B", isTurned: true },
  head: { X: KEYS.B, Y: KEYS.A, isTurned: false },
};

export const ROWS_KEY = "token_adapter.trainable_tokens_delta";

/**
 * The two files of the adapter as PEFT writes them: f32, the adapter's name left out of the tensor names. The base weight of an adapted
 * embedding, which PEFT writes too and does not miss, is left out.
 *
 * `baseModel` is the model's path or Hub id, for `base_model_name_or_path`.
 */
export function savePeft(adapter: LoraAdapter, baseModel: string): AdapterFiles {
  const { beginnings } = adapter;
  const settings = beginnings.size > 0 ? doubled(adapter.config) : adapter.config;
  const pairs = [...adapter.pairs].flatMap(([name, pair]) =>
    Object.keys(KEYS).flatMap((part) => {
      const t = pair[part as keyof LoraParts];
      if (!t) return [];
      const [key, beginning] = [keyOf(name, part), beginnings.get(name)];
      if (beginning && part === "A") return [tensorToWrite(key, [t, beginning.A])];
      if (beginning && part === "B") return [differenceToWrite(key, t, beginning.B)];
      return [tensorToWrite(key, t)];
    }),
  );
  const tables = [...adapter.tables].flatMap(([name, { table, ...parts }]) => {
    const { isTurned, ...keys } = TABLE_KEYS[table.use];
    const order = table.use === "head" ? (["Y", "X"] as const) : (["X", "Y"] as const); // A, B
    return order.map((part) => tensorToWrite(`${PREFIX}${name}.${keys[part]}`, parts[part], "F32", isTurned));
  });
  const rows = [...adapter.tokens].map(([name, token]) => tensorToWrite(`${PREFIX}${name}.${ROWS_KEY}`, token.rows));
  const whole = [...adapter.saved].flatMap(([name, { weight, bias }]) => [
    ...(weight ? [tensorToWrite(`${PREFIX}${name}.weight`, weight)] : []),
    ...(bias ? [tensorToWrite(`${PREFIX}${name}.bias`, bias)] : []),
  ]);
  return {
    "adapter_config.json": encodeConfig(settings, [...adapter.pairs.keys()], baseModel),
    "adapter_model.safetensors": encodeSafetensors([...pairs, ...tables, ...rows, ...whole], { format: "pt" }),
  };
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

export interface LoadPeftOptions {
  /** Is told what is strange in the files and does no harm: settings that neither PEFT 0.21 nor this engine knows, targets that the model lacks. */
  readonly onWarning?: (text: string) => void;
}

/**
 * Loads a PEFT adapter onto a model, enabled. Strict: a missing, extra, misnamed or mis-shaped tensor is a FormatError that names
 * it, and so is a setting of `adapter_config.json` that changes the result and is not supported. Of several `target_modules` those that the
 * model lacks are left out of the adapter's settings: PEFT passes over them too.
 */
export async function loadPeft(
  model: HasLinears,
  directory: Directory,
  { onWarning }: LoadPeftOptions = {},
): Promise<LoraAdapter> {
  const read = await readAdapterConfig(directory);
  for (const warning of configWarnings((await readJson(directory, CONFIG)) ?? {})) onWarning?.(warning);
  const config = withoutIdleTargets(read, model, onWarning);
  const checkpoint = await openCheckpoint(directory, "adapter_model");
  const wanted = demandFit(config, model, `${directory.name}/${CONFIG}`);
  const gpu = [...model.linears.values()][0]?.weight.gpu;
  if (!gpu) throw new ShapeError("loadPeft: the model must have linear layers, got none");
  const shapes = fileShapes(config, model, wanted);
  checkNames(checkpoint, [...shapes.keys()], optionalShapes(model, wanted));
  const loaded = new Map<string, readonly Tensor[]>();
  try {
    for (const [key, { shape, pieces = [shape[0] ?? 1], isTurned }] of shapes) {
      const parts: Tensor[] = [];
      loaded.set(key, parts);
      let first = 0;
      for (const rows of pieces) {
        parts.push(await loadTensor(gpu, checkpoint, key, shape, first, rows));
        first += rows;
      }
      if (isTurned) loaded.set(key, parts.map(turned));
    }
  } catch (error) {
    gpu.release(...[...loaded.values()].flat());
    throw error;
  }
  const one = (module: string, suffix: string): Tensor | undefined => loaded.get(`${PREFIX}${module}.${suffix}`)?.[0];
  return attachParts(model, config, {
    linear: ({ name }) =>
      Object.fromEntries(Object.entries(KEYS).map(([part, key]) => [part, one(name, key)])) as unknown as LoraParts,
    table: ({ name, table }) => {
      const { X, Y } = TABLE_KEYS[table.use];
      return { X: one(name, X), Y: one(name, Y) } as TableParts;
    },
    rows: ({ name }) => one(name, ROWS_KEY) as Tensor,
    save: ({ name, layer: { weight } }): SavedParts => ({
      weight: "length" in weight ? loaded.get(`${PREFIX}${name}.weight`) : one(name, "weight"),
      bias: one(name, "bias"),
    }),
  });
}

function withoutIdleTargets(
  config: LoraConfig,
  model: HasLinears,
  onWarning: LoadPeftOptions["onWarning"],
): LoraConfig {
  const { targetModules } = config;
  const idle = idleEntries(targetModules, targetable(model));
  if (typeof targetModules === "string" || idle.length === 0 || idle.length === targetModules.length) return config;
  onWarning?.(`${CONFIG} has target_modules that the model lacks: ${listSome(idle, 8)}`);
  return { ...config, targetModules: targetModules.filter((entry) => !idle.includes(entry)) };
}

function turned(t: Tensor): Tensor {
  const y = transpose(t);
  t.gpu.release(t);
  return y;
}

const keyOf = (module: string, part: string): string => `${PREFIX}${module}.${KEYS[part as keyof LoraParts]}`;

/** A tensor of the file. */
interface Stored {
  readonly shape: readonly number[];
  /** Rows of each of the tensors it becomes. */
  readonly pieces?: readonly number[];
  /** Whether the transpose is what is wanted. */
  readonly isTurned?: boolean;
}

/** All that the file must have, by key. */
function fileShapes(config: LoraConfig, model: HasLinears, wanted: Wanted): Map<string, Stored> {
  const { linears, modules = linears } = model;
  const tables = tablesOf(model);
  const shapes = new Map<string, Stored>();
  for (const name of wanted.linears)
    for (const [part, shape] of Object.entries(partShapes(config, model, name)))
      shapes.set(keyOf(name, part), { shape });
  for (const name of wanted.tables) {
    const table = tables.get(name) as Table;
    const { X, Y, isTurned } = TABLE_KEYS[table.use];
    const [[V, C], { r }] = [tableSize(table), settingsOf(config, name)];
    const stored = (rows: number, columns: number): Stored => ({
      shape: isTurned ? [columns, rows] : [rows, columns],
      isTurned,
    });
    shapes.set(`${PREFIX}${name}.${X}`, stored(V, r));
    shapes.set(`${PREFIX}${name}.${Y}`, stored(r, C));
  }
  for (const {
    name,
    tables: [table],
    ids,
  } of wanted.tokens)
    shapes.set(`${PREFIX}${name}.${ROWS_KEY}`, { shape: [ids.length, tableSize(table as Table)[1]] });
  const whole = (name: string, isWhole: boolean): void => {
    const { weight, bias } = modules.get(name) as Module;
    const pieces = piecesOf(weight);
    const [, ...row] = pieces[0]?.W.shape ?? [];
    const counts = pieces.map(({ rows }) => rows);
    const shape = [counts.reduce((a, b) => a + b, 0), ...row];
    if (isWhole) shapes.set(`${PREFIX}${name}.weight`, { shape, pieces: counts });
    if (bias) shapes.set(`${PREFIX}${name}.bias`, { shape: bias.shape });
  };
  for (const name of wanted.saved) whole(name, true);
  for (const name of wanted.biased) whole(name, false);
  return shapes;
}

/**
 * What PEFT writes too and says nothing that the rest does not: the base weights of adapted embeddings and heads, and with `bias: "all"`
 * those of trained copies again.
 */
function optionalShapes(model: HasLinears, { tables, tokens, saved }: Wanted): Map<string, readonly number[]> {
  const all = tablesOf(model);
  const bases = [
    ...tables.map((name) => [name, `${name}.base_layer.weight`] as const),
    ...tokens.map(({ name }) => [name, `${name}.token_adapter.base_layer.weight`] as const),
  ];
  const copies = saved.flatMap((name) => {
    const { bias } = (model.modules ?? model.linears).get(name) as Module;
    const keys = ["modules_to_save.bias", "original_module.bias"].map((key) => `${PREFIX}${name}.${key}`);
    return bias ? keys.map((key) => [key, bias.shape] as const) : [];
  });
  return new Map([
    ...bases.map(([name, key]) => [`${PREFIX}${key}`, tableSize(all.get(name) as Table)] as const),
    ...copies,
  ]);
}

/** What the settings ask for of a module. */
function partShapes(config: LoraConfig, model: HasLinears, module: string): Partial<Record<keyof LoraParts, number[]>> {
  const layer = model.linears.get(module);
  const [N = 0, K = 0] = layer?.weight.shape ?? [];
  const { r } = settingsOf(config, module);
  return {
    ...{ A: [r, K], B: [N, r] },
    ...(config.useDora && { magnitude: [N] }),
    ...(config.loraBias && { loraBias: [N] }),
    ...((config.bias ?? "none") !== "none" && layer?.bias && { bias: [N] }),
  };
}

function demandFit(config: LoraConfig, model: HasLinears, name: string): Wanted {
  try {
    return wantedOf(config, model);
  } catch (error) {
    if (error instanceof ShapeError)
      throw new FormatError(`${name}: the adapter does not fit this model: ${error.message}`);
    throw error;
  }
}

/** Throws FormatError for keys that are missing, or that are neither expected nor optional, or optional and of another shape. */
function checkNames(
  { name, tensors }: Checkpoint,
  expected: readonly string[],
  optional: ReadonlyMap<string, readonly number[]>,
): void {
  for (const [key, shape] of optional) {
    const stored = tensors.get(key)?.tensors.get(key)?.shape ?? shape;
    if (`${stored}` !== `${shape}`)
      throw new FormatError(
        `${name}: tensor "${key}" must be [${shape}], got [${stored}]. Is the adapter of a model with another vocabulary?`,
      );
  }
  const missing = expected.filter((key) => !tensors.has(key));
  const extra = [...tensors.keys()].filter((key) => !expected.includes(key) && !optional.has(key));
  if (missing.length === 0 && extra.length === 0) return;
  const parts = [
    missing.length > 0 ? `missing ${listSome(missing, 3)}` : "",
    extra.length > 0 ? `unknown ${listSome(extra, 3)}` : "",
  ].filter(Boolean);
  throw new FormatError(
    `${name}: the tensors must be those that ${CONFIG} and the model ask for, got ${parts.join("; ")}. Is it an adapter of this model?`,
  );
}
