/** Where models and adapters are: directories of this machine, or ids of the Hugging Face Hub, which are downloaded. */
import { existsSync, realpathSync } from "node:fs";
import { resolve } from "node:path";
import type { HubOptions } from "../hub.ts";
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { diskDirectory } from "../io/files.ts";
import { isClassifier, readClassifierConfig, readConfig } from "../models/config.ts";
import { readQuantization } from "../models/quantization.ts";
import { ShapeError } from "../tensor/errors.ts";
import { DownloadProgress } from "./progress.ts";

interface Places {
  readonly model: string;
  readonly revision?: string;
  readonly adapter?: string;
  readonly initAdapter?: string;
}

/** For the commands that take classifiers too: reads the configuration of either. */
export const readAnyConfig = async (directory: Directory): Promise<unknown> =>
  (await isClassifier(directory)) ? readClassifierConfig(directory) : readConfig(directory);

/**
 * The options of a command with directories in place of ids, and `baseModel`, the model as an adapter names it. Without
 * `weights` those of a model on the Hub are left there; its configuration is checked by `check` first. Throws FormatError where a place is neither.
 */
export async function located<T extends Places>(
  options: T,
  weights = true,
  check: (directory: Directory) => Promise<unknown> = readConfig,
): Promise<T & { readonly baseModel: string }> {
  const { model, revision, adapter, initAdapter } = options;
  if (revision !== undefined && (existsSync(model) || model.includes("@")))
    throw new ShapeError(
      `--revision: must go with a --model that is org/name on the Hugging Face Hub, got ${model}. Leave it out`,
    );
  const place = revision === undefined ? model : `${model}@${revision}`;
  const progress = new DownloadProgress(place);
  let found = await find("--model", place, { weights: false }, progress);
  if (weights && found.directory !== place) {
    // A model that cannot be read is refused before its weights come.
    await check(diskDirectory(found.directory));
    await readQuantization(diskDirectory(found.directory));
    found = await find("--model", place, {}, progress);
  }
  return {
    ...options,
    model: found.directory,
    baseModel: found.name,
    ...(adapter !== undefined && { adapter: (await find("--adapter", adapter)).directory }),
    ...(initAdapter !== undefined && { initAdapter: (await find("--init-adapter", initAdapter)).directory }),
  };
}

/** Directory and name of a place; what of it is wanted is said as to `downloadModel`. Throws FormatError where it is neither. */
export async function find(
  flag: string,
  place: string,
  wanted: Pick<HubOptions, "weights" | "adapter"> = {},
  progress: DownloadProgress = new DownloadProgress(place),
): Promise<{ readonly directory: string; readonly name: string }> {
  if (existsSync(place)) return { directory: place, name: place };
  const [, name = place, revision] = /^([^@]*)@(.+)$/.exec(place) ?? [];
  const { downloadModel, isModelId } = await import("../hub.ts");
  if (!isModelId(name))
    throw new FormatError(
      `${flag}: must be a directory, or org/name of a model on the Hugging Face Hub, got ${place}, which is neither. Check the path; relative paths start at ${process.cwd()}`,
    );
  const stop = new AbortController();
  const onInterrupt = (): void => stop.abort(new Error("interrupted; the same command goes on with the download"));
  process.once("SIGINT", onInterrupt);
  try {
    const onProgress = progress.show.bind(progress);
    return { directory: await downloadModel(name, { ...wanted, revision, onProgress, signal: stop.signal }), name };
  } catch (error) {
    if (!(error instanceof FormatError)) throw error;
    throw new FormatError(
      `${flag}: ${place} is not a directory here, nor to be had from the Hugging Face Hub. ${error.message}`,
    );
  } finally {
    process.off("SIGINT", onInterrupt);
    progress.end();
  }
}

/** Throws ShapeError where a command would write a model over the one that it reads. */
export function demandAnother(command: string, { model, out }: { readonly model: string; readonly out: string }): void {
  if (realPath(out) === realPath(model))
    throw new ShapeError(`${command}: --out must be another directory than --model, got ${out} for both`);
}

function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return resolve(path); // not there yet
  }
}
