import { Command } from "commander";
import { diskDirectory } from "../io/files.ts";
import { groupBy } from "../io/group-by.ts";
import { readJson } from "../io/json.ts";
import { settingsOf } from "../lora/config.ts";
import { CONFIG, configWarnings } from "../lora/peft-config.ts";
import { layerOf, norms, type PlainAdapter } from "../lora/plain-adapter.ts";
import { listSome } from "../nn/checkpoint.ts";
import { adapterPath, openAdapter } from "./convert.ts";
import { jsonOption } from "./options.ts";
import { bytes, number, result } from "./session.ts";

const EXAMPLES = `
Examples:
  $ lowrank inspect adapters/pirate
  $ lowrank inspect pirate.gguf --json`;

export function inspectCommand(): Command {
  return new Command("inspect")
    .description("say what an adapter is: format, method, sizes, ranks, norms, and what looks wrong in it")
    .argument("<place>", "directory of PEFT or mlx-lm, GGUF file, or org/name of such an adapter on the Hub")
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(place: string, { json }: { readonly json?: boolean }): Promise<void> {
  const path = await adapterPath("inspect", place);
  // Norms are the same for any order of rows, and so for any number of heads.
  const adapter = await openAdapter(path, { modelType: "", layers: 0, heads: 1, kvHeads: 1 });
  const rows = rowsOf(adapter);
  const warnings = [...warningsOf(adapter, rows), ...(adapter.format === "peft" ? await strangeKeys(path) : [])];
  const { config, modules, others = new Map() } = adapter;
  const report = {
    format: adapter.format,
    method: `${config.useDora ? "DoRA" : "LoRA"}${config.useRslora ? " with rsLoRA's scale" : ""}`,
    base_model: adapter.baseModel || null,
    bytes: adapter.sizeBytes,
    parameters: [...[...modules.values()].flatMap((parts) => Object.values(parts)), ...others.values()].reduce(
      (sum, { values }) => sum + values.length,
      0,
    ),
    dtypes: [...adapter.dtypes],
    targets: config.targetModules,
    modules: rows,
    trained_whole: [...others].map(([name, { shape }]) => ({ name, shape })),
    warnings,
  };
  if (json) return result(JSON.stringify(report));
  result(`${report.format}: ${report.method}, of ${report.base_model ?? "a model that is not named"}`);
  result(`${number(report.parameters)} parameters, ${bytes(report.bytes)} in ${report.dtypes.join(" and ")}\n`);
  for (const line of table("targets", rows, ({ kind }) => kind)) result(line);
  result("");
  for (const line of table("layer", rows, ({ layer = "none" }) => `${layer}`)) result(line);
  if (others.size > 0)
    result(`\ntrained whole: ${listSome([...others].map(([name, { shape }]) => `${name} [${shape}]`))}`);
  warnings.forEach((warning, i) => void result(`${i === 0 ? "\n" : ""}warning: ${warning}`));
}

type Row = ReturnType<typeof rowsOf>[number];

const rowsOf = ({ config, modules }: PlainAdapter) =>
  [...modules].map(([module, parts]) => {
    const { r, alpha, scale } = settingsOf(config, module);
    return { module, ...layerOf(module), rank: r, alpha, scale, norms: norms(parts, scale) };
  });

function* warningsOf(
  { modules, embeddings, others = new Map() }: PlainAdapter,
  rows: readonly Row[],
): Iterable<string> {
  const parts = [...modules].flatMap(([name, of]) =>
    Object.entries(of).map(([part, { values }]) => [`${part} of ${name}`, values] as const),
  );
  for (const [name, values] of [...parts, ...[...others].map(([key, one]) => [key, one.values] as const)]) {
    const wrong = values.filter((x: number) => !Number.isFinite(x)).length;
    if (wrong > 0) yield `${name} has ${number(wrong)} values that are not finite`;
  }
  // What is zero at first: of embeddings A, of others B.
  const untrained = rows.filter(({ module, norms: { A, B } }) => (embeddings?.has(module) ? A : B) === 0).length;
  if (untrained > 0) yield `B is zero in ${untrained} of ${rows.length} modules: they are untrained and do nothing`;
  const layers = Math.max(-1, ...rows.map(({ layer = -1 }) => layer)) + 1;
  const missing = (of: readonly Row[]): string =>
    Array.from({ length: layers }, (_, i) => i)
      .filter((i) => of[0]?.layer !== undefined && !of.some(({ layer }) => layer === i))
      .join(", ");
  const kinds = [...groupBy(rows, ({ kind }) => kind)];
  for (const [gaps, of] of groupBy(kinds, ([, members]) => missing(members)))
    if (gaps) yield `nothing on layers ${gaps} for ${of.map(([kind]) => kind).join(", ")}`;
  const odd = rows.find(({ scale }) => scale < 1 / 8 || scale > 32);
  if (odd)
    yield `s of ${odd.module} is ${figure(odd.scale)}, by alpha ${odd.alpha} and rank ${odd.rank}: 1/8 to 32 is usual`;
}

const strangeKeys = async (path: string): Promise<string[]> =>
  configWarnings((await readJson(diskDirectory(path), CONFIG)) ?? {});

/** One line per group, columns as wide as their widest cell; the norms are those of all numbers of the group. */
function table(title: string, rows: readonly Row[], keyOf: (row: Row) => string): string[] {
  const groups = [...groupBy(rows, keyOf)].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  const cells = groups.map(([key, of]) => [
    ...[key, `${of.length}`],
    ...(["rank", "alpha", "scale"] as const).map((name) => [...new Set(of.map((row) => figure(row[name])))].join(", ")),
    ...(["A", "B", "BA"] as const).map((name) => figure(Math.hypot(...of.map((row) => row.norms[name])))),
  ]);
  const lines = [[title, "modules", "rank", "alpha", "s", "‖A‖", "‖B‖", "‖s·B·A‖"], ...cells];
  const widths = lines[0]?.map((_, i) => Math.max(...lines.map((line) => line[i]?.length ?? 0))) ?? [];
  return lines.map((line) => widths.map((width, i) => line[i]?.[i === 0 ? "padEnd" : "padStart"](width)).join("  "));
}

const figure = (value: number): string => `${Number(value.toPrecision(4))}`;
