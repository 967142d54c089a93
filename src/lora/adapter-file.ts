/**
 * Adapters of PEFT and of mlx-lm in memory, both ways. mlx-lm has `adapters.safetensors` and an `adapter_config.json` of its own: A and B
 * are stored transposed, one rank and one scale count for all, `keys` are names within a layer, and the last `num_layers` layers are
 * adapted (-1: all).
 */
import type { Directory } from "../io/bytes.ts";
import { encodeFloats } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { isObject, type JsonObject, readJson } from "../io/json.ts";
import { encodeSafetensors, type TensorToWrite } from "../io/safetensors.ts";
import { type Checkpoint, listSome, openCheckpoint, storedDtype } from "../nn/checkpoint.ts";
import { isSaved, type LoraConfig, settingsOf } from "./config.ts";
import type { LoraParts } from "./parts.ts";
import { KEYS, PREFIX, ROWS_KEY, TABLE_KEYS } from "./peft.ts";
import { CONFIG, encodeConfig, readAdapterConfig } from "./peft-config.ts";
import * as plain from "./plain-adapter.ts";
import { matchesModule } from "./target-modules.ts";

/** An adapter in a format: its files by name, and in words what had to be changed to say the same in it. */
export interface EncodedAdapter {
  readonly files: Readonly<Record<string, string | AsyncIterable<Uint8Array>>>;
  readonly notes: readonly string[];
}

/** Which format the directory's `adapter_config.json` is of. */
export async function formatOf(directory: Directory): Promise<"peft" | "mlx" | undefined> {
  const json = (await readJson(directory, CONFIG)) ?? {};
  return "peft_type" in json ? "peft" : "fine_tune_type" in json || "lora_parameters" in json ? "mlx" : undefined;
}

/**
 * Reads an adapter of PEFT or mlx-lm, whichever it is, into memory. Strict, as `loadPeft` is: throws FormatError for what is missing,
 * misnamed, of another shape, or not supported.
 */
export async function readAdapter(directory: Directory): Promise<plain.PlainAdapter> {
  const format = await formatOf(directory);
  const json = await readJson(directory, CONFIG);
  if (format && json) return format === "peft" ? readPeft(directory, json) : readMlx(directory, json);
  throw new FormatError(
    `${directory.name}: must have an ${CONFIG} with "peft_type" (PEFT) or "lora_parameters" (mlx-lm), got ${json ? "neither in it" : "no such file"}. A GGUF adapter is a file`,
  );
}

function* tensorsOf(checkpoint: Checkpoint): Iterable<[name: string, tensor: plain.StoredTensor]> {
  for (const [name, file] of checkpoint.tensors) {
    const shape = file.tensors.get(name)?.shape ?? [];
    yield [name, { dtype: storedDtype(checkpoint, name), shape, read: () => file.read(name) }];
  }
}

async function readPeft(directory: Directory, json: JsonObject): Promise<plain.PlainAdapter> {
  const config = { ...(await readAdapterConfig(directory)), fanInFanOut: json.fan_in_fan_out === true };
  const checkpoint = await openCheckpoint(directory, "adapter_model");
  const others = new Map<string, plain.PlainTensor>();
  const parts = new Map<string, plain.StoredTensor>();
  for (const [name, tensor] of tensorsOf(checkpoint)) {
    const bare = name.startsWith(PREFIX) && name.slice(PREFIX.length);
    if (bare && isOther(config, bare)) others.set(bare, await plain.readPlain(tensor));
    else parts.set(name, tensor);
  }
  const embeddings = new Set<string>();
  const stored = await plain.readModules(checkpoint.name, parts, (tensor) => {
    const [key = "", part] = PART_KEYS.find(([suffix]) => tensor.endsWith(`.${suffix}`)) ?? [];
    if (!part || !tensor.startsWith(PREFIX)) return undefined;
    const module = tensor.slice(PREFIX.length, -1 - key.length);
    if (key.startsWith("lora_embedding")) embeddings.add(module);
    return { module, part };
  });
  const strangers = [...stored.modules.keys()].filter((name) => !matchesModule(config.targetModules, name));
  if (strangers.length > 0)
    throw new FormatError(
      `${checkpoint.name}: every module must be a target by ${CONFIG}, got ${listSome(strangers, 3)} as well`,
    );
  plain.checkModules(checkpoint.name, config, stored.modules);
  const sizeBytes = [...others.values()].reduce((sum, { values }) => sum + values.byteLength, stored.sizeBytes);
  const baseModel = String(json.base_model_name_or_path ?? "");
  return { format: "peft", config, baseModel, ...stored, embeddings, others, sizeBytes };
}

/** What the parts of a module go by. */
const PART_KEYS: readonly (readonly [suffix: string, part: keyof LoraParts])[] = [
  ...Object.entries(KEYS).map(([part, key]) => [key, part as keyof LoraParts] as const),
  [TABLE_KEYS.embedding.X, "A"],
  [TABLE_KEYS.embedding.Y, "B"],
];

/** Whether a tensor is one that the settings have trained whole, or the base's own that PEFT writes beside an adapted embedding. */
function isOther(config: LoraConfig, name: string): boolean {
  const [, module = "", leaf] = /^(.*)\.(weight|bias)$/.exec(name) ?? [];
  if (name.endsWith(`.${ROWS_KEY}`)) return config.trainableTokenIndices !== undefined;
  if (/\.lora_[AB]$|\.base_layer$/.test(module)) return module.endsWith(".base_layer") && leaf === "weight";
  return isSaved(config.modulesToSave, module) || (config.bias === "all" && leaf === "bias");
}

/** The two files of the adapter as PEFT writes them, in f32. */
export function encodePeft(adapter: plain.PlainAdapter): EncodedAdapter {
  const { config, baseModel, modules, embeddings = new Set(), others = new Map() } = adapter;
  const tensors = [...modules].flatMap(([name, module]) => {
    const keys = embeddings.has(name) ? { A: TABLE_KEYS.embedding.X, B: TABLE_KEYS.embedding.Y } : KEYS;
    return Object.entries(keys).flatMap(([part, key]) => {
      const m = module[part as keyof LoraParts];
      return m ? [plain.matrixToWrite(`${PREFIX}${name}.${key}`, m, part !== "A" && part !== "B")] : [];
    });
  });
  const whole = [...others].map(([name, { shape, values }]): TensorToWrite => {
    const data = async () => encodeFloats("F32", values);
    return { name: `${PREFIX}${name}`, dtype: "F32", shape, sizeBytes: values.byteLength, data };
  });
  const weights = encodeSafetensors([...tensors, ...whole], { format: "pt" });
  const files = {
    "adapter_model.safetensors": weights,
    [CONFIG]: encodeConfig(config, [...modules.keys()], baseModel),
  };
  return { files, notes: [] };
}

const MLX_PARTS: Readonly<Record<string, keyof LoraParts>> = { lora_a: "A", lora_b: "B", m: "magnitude" };

async function readMlx(directory: Directory, json: JsonObject): Promise<plain.PlainAdapter> {
  const name = `${directory.name}/${CONFIG}`;
  const type = json.fine_tune_type ?? "lora";
  if (type !== "lora" && type !== "dora")
    throw new FormatError(`${name}: "fine_tune_type" must be "lora" or "dora", got ${JSON.stringify(type)}`);
  const parameters = isObject(json.lora_parameters) ? json.lora_parameters : {};
  const number = (key: string, fallback?: number): number => {
    const value = parameters[key] ?? fallback;
    if (typeof value === "number" && (value > 0 || value === fallback)) return value;
    throw new FormatError(
      `${name}: "${key}" of lora_parameters must be a number above 0, got ${JSON.stringify(value)}`,
    );
  };
  const checkpoint = await openCheckpoint(directory, "adapters");
  const stored = await plain.readModules(checkpoint.name, tensorsOf(checkpoint), (tensor) => {
    const [, module = "", leaf = ""] = /^(.+)\.(lora_a|lora_b|m)$/.exec(tensor) ?? [];
    const part = MLX_PARTS[leaf];
    return part && { module: module.replace(/^model\.h\./, "transformer.h."), part, isTurned: leaf !== "m" };
  });
  const embedding = [...stored.modules.keys()].find((module) => /(^|\.)(embed_tokens|wte|wpe)$/.test(module));
  if (embedding !== undefined)
    throw new FormatError(
      `${checkpoint.name}: modules must be linear layers, for mlx-lm's LoRA of an embedding changes a tied head too, unlike PEFT's, got ${embedding}. Fuse it into its model with mlx_lm.fuse`,
    );
  const [r, dropout] = [number("rank"), number("dropout", 0)];
  const config = {
    r,
    alpha: number("scale") * r,
    dropout,
    useDora: type === "dora",
    ...plain.targetsOf(stored.modules),
  };
  plain.checkModules(checkpoint.name, config, stored.modules);
  return { format: "mlx", config, baseModel: String(json.model ?? ""), ...stored };
}

/**
 * The two files of mlx-lm: smaller ranks are padded with zeros, other scales multiplied into B. Throws FormatError for biases. Of the model
 * the number of layers counts: without it `num_layers` is -1.
 */
export function encodeMlx(adapter: plain.PlainAdapter, base?: plain.BaseModel): EncodedAdapter {
  const { config, baseModel: model } = adapter;
  plain.refuse("mlx", adapter, ["loraBias", "bias"]);
  const {
    modules,
    number: scale,
    folded,
  } = plain.withOneNumber(adapter.modules, (name) => settingsOf(config, name).scale);
  const rank = Math.max(...[...modules.values()].map(({ A }) => A.rows));
  const padded = [...modules.values()].filter(({ A }) => A.rows < rank);
  const places = [...modules.keys()].map(plain.layerOf);
  const keys = [...new Set(places.map(({ kind }) => kind))].sort();
  const settings = {
    fine_tune_type: config.useDora ? "dora" : "lora",
    lora_parameters: { dropout: config.dropout ?? 0, keys, rank, scale },
    model,
    num_layers: base ? base.layers - Math.min(...places.map(({ layer = 0 }) => layer)) : -1,
  };
  const tensors = [...modules].flatMap(([name, { A, B, magnitude }]) => {
    const module = name.replace(/^transformer\.h\./, "model.h.");
    return [
      plain.matrixToWrite(`${module}.lora_a`, plain.transposed(A, A.columns, rank)),
      plain.matrixToWrite(`${module}.lora_b`, plain.transposed(B, rank, B.rows)),
      ...(magnitude ? [plain.matrixToWrite(`${module}.m`, magnitude, true)] : []),
    ];
  });
  const weights = encodeSafetensors(tensors, { format: "mlx" });
  return {
    files: { "adapters.safetensors": weights, [CONFIG]: `${JSON.stringify(settings, null, 2)}\n` },
    notes: [
      ...(folded.length > 0 ? [`mlx has one scale, ${scale}: that of ${listSome(folded, 3)} went into B`] : []),
      ...(padded.length > 0 ? [`mlx has one rank, ${rank}: ${padded.length} modules were padded with zeros`] : []),
    ],
  };
}
