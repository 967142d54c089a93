import { Command } from "commander";
import { diskDirectory } from "../io/files.ts";
import { readJson } from "../io/json.ts";
import { settingsOf } from "../lora/config.ts";
import { groupBy, layerOf, norms, type PlainAdapter } from "../lora/plain-adapter.ts";
import { openAdapter } from "./convert.ts";
import { jsonOption } from "./options.ts";
import { find } from "./places.ts";
import { bytes, number, result } from "./session.ts";

const EXAMPLES = `
Examples:
  $ lowrank inspect adapters/pirate
  $ lowrank inspect pirate.gguf --json`;

export function inspectCommand(): Command {
  return new Command("inspect")
    .description("say what an adapter is: format, method, sizes, ranks, norms, and what looks wrong in it")
    .argument("<place>", "directory of PEFT or mlx-lm, GGUF file, or org/name[@revision] on the Hub")
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

/** PEFT 0.21's, and those of its past. */
const KEYS = `alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
  ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config layer_replication
  layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core
  modules_to_save monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules
  target_parameters task_type trainable_token_indices use_bdlora use_dora use_qalora use_rslora velora_config`.split(
  /\s+/,
);

/** Of one module, or several: norms of several are those of all their numbers. */
interface Row {
  readonly module: string;
  readonly kind: string;
  readonly layer?: number;
  readonly rank: number;
  readonly alpha: number;
  readonly scale: number;
  readonly norms: Readonly<Record<"A" | "B" | "BA", number>>;
}

async function run(place: string, { json }: { readonly json?: boolean }): Promise<void> {
  // Norms are the same for any order of rows, and so for any number of heads.
  const adapter = await openAdapter("inspect", place, { modelType: "", layers: 0, heads: 1, kvHeads: 1 });
  const { config, modules } = adapter;
  const rows = [...modules].map(([module, parts]): Row => {
    const { r, alpha, scale } = settingsOf(config, module);
    return { module, ...layerOf(module), rank: r, alpha, scale, norms: norms(parts, scale) };
  });
  const parameters = [...modules.values()].flatMap((parts) => Object.values(parts));
  const report = {
    format: adapter.format,
    method: `${config.useDora ? "DoRA" : "LoRA"}${config.useRslora ? ", rsLoRA" : ""}`,
    base_model: adapter.baseModel || null,
    bytes: adapter.sizeBytes,
    parameters: parameters.reduce((sum, { values }) => sum + values.length, 0),
    dtypes: [...adapter.dtypes],
    targets: config.targetModules,
    modules: rows,
    warnings: [...warnings(adapter, rows), ...(adapter.format === "peft" ? await unknownKeys(place) : [])],
  };
  result(json ? JSON.stringify(report) : text(report).join("\n"));
}

function* warnings({ modules }: PlainAdapter, rows: readonly Row[]): Iterable<string> {
  for (const [name, parts] of modules)
    for (const [part, { values }] of Object.entries(parts)) {
      const wrong = values.reduce((count, x) => count + (Number.isFinite(x) ? 0 : 1), 0);
      if (wrong > 0) yield `${part} of ${name} has ${number(wrong)} values that are not finite`;
    }
  const untrained = rows.filter((row) => row.norms.B === 0).length;
  if (untrained > 0)
    yield `B is zero in ${untrained === rows.length ? "all" : untrained} modules: they are as before training, and do nothing`;
  const layers = Math.max(-1, ...rows.map(({ layer = -1 }) => layer)) + 1;
  for (const [kind, of] of groupBy(rows, (row) => row.kind)) {
    const missing = Array.from({ length: layers }, (_, i) => i).filter((i) => !of.some(({ layer }) => layer === i));
    if (of[0]?.layer !== undefined && missing.length > 0) yield `${kind} is missing on layers ${missing.join(", ")}`;
    const odd = of.find(({ scale }) => scale < 1 / 8 || scale > 32);
    if (odd)
      yield `s of ${odd.module} is ${figure(odd.scale)}, from alpha ${odd.alpha} and rank ${odd.rank}: 1/8 to 32 is usual`;
  }
}

async function unknownKeys(place: string): Promise<string[]> {
  const json = await readJson(diskDirectory((await find("inspect", place)).directory), "adapter_config.json");
  const keys = Object.keys(json ?? {}).filter((key) => !KEYS.includes(key));
  return keys.length > 0 ? [`adapter_config.json has keys that PEFT 0.21 does not know: ${keys.join(", ")}`] : [];
}

function text(report: {
  readonly format: string;
  readonly method: string;
  readonly base_model: string | null;
  readonly bytes: number;
  readonly parameters: number;
  readonly dtypes: readonly string[];
  readonly modules: readonly Row[];
  readonly warnings: readonly string[];
}): string[] {
  const { modules: rows } = report;
  const line = (of: readonly Row[]): string[] => {
    const all = (part: "A" | "B" | "BA"): string => figure(Math.hypot(...of.map((row) => row.norms[part])));
    const distinct = (key: "rank" | "alpha" | "scale"): string =>
      [...new Set(of.map((row) => figure(row[key])))].join(", ");
    return [`${of.length}`, distinct("rank"), distinct("alpha"), distinct("scale"), all("A"), all("B"), all("BA")];
  };
  const head = ["modules", "rank", "alpha", "s", "‖A‖", "‖B‖", "‖s·B·A‖"];
  const table = (title: string, groups: Iterable<[string | number | undefined, Row[]]>): string[] =>
    columns([[title, ...head], ...[...groups].map(([name, of]) => [`${name ?? "none"}`, ...line(of)])]);
  return [
    `${report.format}: ${report.method} of ${report.base_model ?? "a model that is not named"}`,
    `${number(report.parameters)} parameters, ${bytes(report.bytes)} in ${report.dtypes.join(" and ")}`,
    "",
    ...table(
      "targets",
      groupBy(rows, (row) => row.kind),
    ),
    "",
    ...table(
      "layer",
      groupBy(
        [...rows].sort((a, b) => (a.layer ?? -1) - (b.layer ?? -1)),
        (row) => row.layer,
      ),
    ),
    ...report.warnings.map((warning, i) => `${i === 0 ? "\n" : ""}warning: ${warning}`),
  ];
}

const figure = (value: number): string => `${Number(value.toPrecision(4))}`;

/** Cells in columns as wide as their widest: the first to the left, others to the right. */
function columns(rows: readonly (readonly string[])[]): string[] {
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0)));
  return rows.map((row) =>
    row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0))).join("  "),
  );
}
