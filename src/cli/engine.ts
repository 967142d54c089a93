/** The engine of the commands that answer: a model and its adapters. */
import type { Gpu } from "../gpu/gpu.ts";
import { readAdapter } from "../lora/adapter-file.ts";
import { AdapterPool } from "../lora/adapter-pool.ts";
import { extentOf } from "../lora/page-rows.ts";
import type { PlainAdapter } from "../lora/plain-adapter.ts";
import { diskDirectory } from "../node.ts";
import { BatchEngine, engineCacheBytes } from "../serve/batch-engine.ts";
import { isAdapterName } from "../server.ts";
import { ShapeError } from "../tensor/errors.ts";
import { weightFormat } from "./options.ts";
import { find } from "./places.ts";
import { bytes, openModel, say } from "./session.ts";

export interface EngineArguments {
  readonly quantize?: "int8" | "nf4";
  readonly context?: number;
  readonly maxRows: number;
  readonly maxStepTokens: number;
  readonly cacheTokens?: number;
  readonly cacheFormat: "f32" | "f16";
  readonly maxLoras: number;
  readonly maxLoraRank?: number;
  readonly maxQueue: number;
  readonly allowRuntimeLora?: boolean;
}

/** The model with its adapters, ready to answer. */
export async function openEngine(
  gpu: Gpu,
  path: string,
  places: ReadonlyMap<string, string>,
  options: EngineArguments,
): Promise<BatchEngine> {
  const given = new Map<string, PlainAdapter>();
  for (const [name, place] of places) given.set(name, await readAdapter(diskDirectory(place)));
  const model = await openModel(gpu, path, weightFormat(options.quantize));
  const { maxRows, maxStepTokens, maxQueue: maxWaiting, cacheFormat, cacheTokens, context: contextLength } = options;
  const ranks = [...given.values()].map((adapter) => extentOf(adapter).rank);
  const { maxLoras: slots, maxLoraRank: maxRank = Math.max(16, ...ranks) } = options;
  // A page more for DoRA's factors.
  const pool =
    given.size > 0 || options.allowRuntimeLora
      ? new AdapterPool(model, { pages: slots * (maxRank + 1), maxRank, slots })
      : undefined;
  for (const [name, adapter] of given) await pool?.register(name, adapter);
  pool?.enable();
  const settings = { maxRows, maxStepTokens, maxWaiting, cacheFormat, cacheTokens, contextLength, adapters: pool };
  const engine = new BatchEngine(model, settings);
  const cache = bytes(engineCacheBytes(model, settings));
  const adapters = pool ? `, adapters ${bytes(pool.counts.gpuBytes)} for ${slots} of rank ${maxRank}` : "";
  say(`keys and values take ${cache}${adapters}`);
  return engine;
}

/** Directories of the adapters by their names. Throws ShapeError for a name that cannot be. */
export async function adaptersOf(
  command: string,
  given: readonly string[],
  modelName: string,
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
