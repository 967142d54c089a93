import { existsSync, readdirSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { Command, Option } from "commander";
import { FormatError } from "../io/errors.ts";
import { diskDirectory, ensureWritableDirectory, fileSource, replaceFiles, writeFileAtomic } from "../io/files.ts";
import { isGguf } from "../io/gguf.ts";
import { type EncodedAdapter, encodeMlx, encodePeft, formatOf, readAdapter } from "../lora/adapter-file.ts";
import { encodeGgufAdapter, readGgufAdapter } from "../lora/gguf-adapter.ts";
import { CONFIG } from "../lora/peft-config.ts";
import type { BaseModel, PlainAdapter } from "../lora/plain-adapter.ts";
import { readConfig } from "../models/config.ts";
import { ShapeError } from "../tensor/errors.ts";
import { find } from "./places.ts";
import { result, say } from "./session.ts";

interface ConvertArguments {
  readonly adapter: string;
  readonly to: PlainAdapter["format"];
  readonly out: string;
  readonly model?: string;
}

const EXAMPLES = `
Examples:
  $ lowrank convert --adapter adapters/pirate --to mlx --out adapters/pirate-mlx
  $ lowrank convert --adapter adapters/pirate --to gguf --out pirate.gguf --model models/base
  $ lowrank convert --adapter pirate.gguf --to peft --out adapters/pirate --model models/base`;

export function convertCommand(): Command {
  return new Command("convert")
    .description("write an adapter in another format: PEFT's, mlx-lm's or llama.cpp's, from any of these")
    .requiredOption(
      "--adapter <place>",
      "directory of PEFT or mlx-lm, GGUF file, or org/name of such an adapter on the Hub",
    )
    .addOption(new Option("--to <format>", "its format").choices(["peft", "mlx", "gguf"]).makeOptionMandatory())
    .requiredOption("--out <path>", "directory of the adapter, or GGUF file")
    .option(
      "--model <place>",
      "its model, of which config.json is read: needed for gguf, and from gguf for models like Llama",
    )
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run({ adapter: place, to, out, model }: ConvertArguments): Promise<void> {
  if (to === "gguf" && model === undefined)
    throw new ShapeError(
      "convert: --to gguf needs --model, got none. Give the adapter's model; its config.json is enough",
    );
  const base =
    model === undefined
      ? undefined
      : await readConfig(diskDirectory((await find("--model", model, { weights: false })).directory));
  const adapter = await openAdapter(await adapterPath("--adapter", place), base);
  await checkOut(to, out);
  const { files, notes } = encode(adapter, to, base);
  if (to === "gguf") {
    await ensureWritableDirectory(dirname(out));
    for (const content of Object.values(files)) await writeFileAtomic(out, content);
  } else await replaceFiles(out, files, CONFIG);
  for (const note of notes) say(`note: ${note}`);
  result(`the adapter is in ${out}, ${adapter.modules.size} modules, from ${adapter.format} to ${to}`);
}

const encode = (adapter: PlainAdapter, to: PlainAdapter["format"], base: BaseModel | undefined): EncodedAdapter =>
  to === "gguf" && base
    ? encodeGgufAdapter(adapter, base)
    : to === "mlx"
      ? encodeMlx(adapter, base)
      : encodePeft(adapter);

/** Where an adapter is, once it is on this disk: a directory of PEFT or mlx-lm, or a GGUF file. */
export async function adapterPath(flag: string, place: string): Promise<string> {
  const { directory: path } = await find(flag, place, { adapter: true });
  if (!statSync(path).isDirectory()) return path.endsWith(".safetensors") ? dirname(path) : path;
  const [file, ...others] = readdirSync(path).filter((name) => name.endsWith(".gguf"));
  return file && others.length === 0 && !existsSync(join(path, "adapter_config.json")) ? join(path, file) : path;
}

/** Reads an adapter of any format. */
export const openAdapter = async (path: string, base?: BaseModel): Promise<PlainAdapter> =>
  statSync(path).isDirectory() ? readAdapter(diskDirectory(path)) : readGgufAdapter(await fileSource(path), path, base);

/** Throws FormatError where something else would be written over, or into. */
export async function checkOut(to: PlainAdapter["format"], out: string): Promise<void> {
  if (!existsSync(out)) return;
  const isDirectory = statSync(out).isDirectory();
  if (isDirectory && to !== "gguf" && readdirSync(out).length === 0) return;
  const isFile = !isDirectory && (await isGguf(await fileSource(out)));
  const found = isDirectory ? await formatOf(diskDirectory(out)) : isFile ? "gguf" : undefined;
  if (found !== to)
    throw new FormatError(
      `${out}: must be new, ${to === "gguf" ? "or a GGUF file" : `empty, or have an adapter of ${to}`}, got ${isDirectory ? "a directory" : "a file"} of ${found ?? "something else"}. Choose another --out`,
    );
}
