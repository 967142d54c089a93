/** What the commands that answer by an engine do alike: name adapters, open the model with them. */
import { Option } from "commander";
import type { Gpu } from "../gpu/gpu.ts";
import { diskDirectory } from "../io/files.ts";
import { readAdapter } from "../lora/adapter-file.ts";
import { openPool } from "../lora/open-pool.ts";
import type { PlainAdapter } from "../lora/plain-adapter.ts";
import { BatchEngine, type EngineOptions, engineCacheBytes } from "../serve/batch-engine.ts";
import { isAdapterName } from "../server.ts";
import { ShapeError } from "../tensor/errors.ts";
import { weightFormat, whole } from "./options.ts";
import { find } from "./places.ts";
import { bytes, openModel, say } from "./session.ts";

export const namedAdaptersOption = (): Option =>
  new Option(
    "--adapter <name=place...>",
    "an adapter and its name: a PEFT directory, or org/name[@revision] on the Hub",
  );

export const cacheOptions = (command: string): Option[] => [
  whole(command, "--context <n>", "longest prompt and answer together (default: the model's context)", 2),
  new Option("--cache-format <format>", "how keys and values are kept").choices(["f32", "f16"]).default("f32"),
];

/** What `cacheOptions` give. */
export interface CacheArguments {
  readonly context?: number;
  readonly cacheFormat: "f32" | "f16";
}

/** Directories of the adapters by their names. Throws ShapeError for a name that cannot be, or is the model's. */
export async function adaptersOf(
  command: string,
  given: readonly string[],
  modelName?: string,
): Promise<ReadonlyMap<string, string>> {
  const adapters = new Map<string, string>();
  for (const text of given) {
    const [, name = "", place = ""] = /^([^=]*)=(.+)$/s.exec(text) ?? [];
    if (!isAdapterName(name) || name === modelName || adapters.has(name))
      throw new ShapeError(
        `${command}: --adapter must be name=place with a name of letters, digits, ".", "-" and "_" that is not taken, got ${text}`,
      );
    adapters.set(name, (await find("--adapter", place)).directory);
  }
  return adapters;
}

export interface EngineSettings extends Omit<EngineOptions, "adapters"> {
  readonly quantize?: "int8" | "nf4" | undefined;
  /** Adapters that are on the device at a time, and the largest rank. */
  readonly slots?: number;
  readonly maxRank?: number | undefined;
  /** Whether adapters may come while it runs. */
  readonly mayLoad?: boolean;
}

/** The model of a directory with its adapters, ready to answer. Says what memory the answers take. */
export async function openEngine(
  gpu: Gpu,
  path: string,
  places: ReadonlyMap<string, string>,
  { quantize, slots = Math.max(1, places.size), maxRank, mayLoad = false, ...settings }: EngineSettings,
): Promise<BatchEngine> {
  const given = new Map<string, PlainAdapter>();
  for (const [name, place] of places) given.set(name, await readAdapter(diskDirectory(place)));
  const model = await openModel(gpu, path, weightFormat(quantize));
  const pool =
    given.size > 0 || mayLoad
      ? await openPool(model, given, { slots, ...(maxRank !== undefined && { maxRank }) })
      : undefined;
  const engine = new BatchEngine(model, { ...settings, adapters: pool });
  const adapters = pool ? `, adapters ${bytes(pool.counts.gpuBytes)} for ${slots} of rank ${pool.maxRank}` : "";
  say(`keys and values take ${bytes(engineCacheBytes(model, settings))}${adapters}`);
  return engine;
}
