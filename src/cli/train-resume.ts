/** How a training run begins: anew, or from the newest checkpoint in its directory. */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { FormatError } from "../io/errors.ts";
import { disk } from "../io/files.ts";
import { removeLeftovers } from "../io/snapshots.ts";
import {
  changedSettings,
  checkpointSteps,
  openCheckpoint,
  type RunSettings,
  type SavedCheckpoint,
  writeFileAtomic,
} from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { LORA_OPTIONS } from "./options.ts";
import { say } from "./session.ts";
import type { TrainArguments } from "./train.ts";

/** What every step depends on, besides steps, warmup, model and data. Options that are not here may be others when a run goes on. */
const KEPT = [
  ...LORA_OPTIONS,
  ...[
    "initAdapter",
    "quantize",
    "numLabels",
    "batchSize",
    "gradAccumulation",
    "learningRate",
    "schedule",
    "weightDecay",
  ],
  ...["loraFa", "loraplusLrRatio", "maxGradNorm", "seed", "shuffle", "packing"],
  ...["preference", "beta", "labelSmoothing", "neftuneAlpha"],
];

/** The setting that a run with --learning-rate auto found, which it keeps. */
export const FOUND_RATE = "learning rate found";

interface RunPlan {
  readonly steps: number;
  readonly warmupSteps: number;
  readonly rows: readonly unknown[];
}

/**
 * The settings that a run has to keep, by flag. A run of a constant learning rate may be made longer; else every step depends on how many there
 * are. Model and data count by content: its config.json, and the ids and labels.
 */
export async function keptSettings(
  options: { readonly model: string; readonly schedule: string },
  { steps, warmupSteps, rows }: RunPlan,
): Promise<RunSettings> {
  const given = options as unknown as Readonly<Record<string, unknown>>;
  const flag = (name: string): string => `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
  return {
    "--model": hash([await readFile(join(options.model, "config.json"))]),
    "--data": hash(linesOf(rows)),
    ...Object.fromEntries(KEPT.filter((name) => given[name] !== undefined).map((name) => [flag(name), given[name]])),
    ...(options.schedule !== "constant" && { "--steps": steps }),
    "warmup steps": warmupSteps,
  };
}

/** One by one: together they may be longer than a string can be. */
function* linesOf(rows: readonly unknown[]): Generator<string> {
  for (const [i, row] of rows.entries()) yield `${i > 0 ? "\n" : ""}${JSON.stringify(row)}`;
}

function hash(parts: Iterable<string | Uint8Array>): string {
  const sha256 = createHash("sha256");
  for (const part of parts) sha256.update(part);
  return `sha256:${sha256.digest("hex")}`;
}

/**
 * Clears what a run that was cut off left in `out` (but for a run that writes no steps), and prepares metrics.jsonl and samples.jsonl: empty, or with the steps up to the checkpoint that `resume`
 * finds, which is given back. Throws FormatError where there is none, ShapeError where its settings differ or `out` has another run's.
 */
export async function begin(
  { out, resume = false, dryRun = false, findLr = false }: BeginOptions,
  settings: RunSettings,
  version: string,
): Promise<SavedCheckpoint | undefined> {
  if (dryRun || findLr) return undefined;
  const steps = await checkpointSteps(out);
  if (!resume && steps.length > 0)
    throw new ShapeError(
      `train: --out must have no checkpoints of another run, got ${steps.length} in ${join(out, "checkpoints")}. Go on from them with --resume, delete them, or choose another --out`,
    );
  const saved = resume ? await openSaved(out, settings, version) : undefined;
  await removeLeftovers(disk, out);
  for (const file of ["metrics.jsonl", "samples.jsonl"]) {
    const path = join(out, file);
    const isThere = existsSync(path);
    if (isThere || file === "metrics.jsonl")
      await writeFileAtomic(path, saved && isThere ? upTo(await readFile(path, "utf8"), saved.step) : "");
  }
  if (saved) say(`going on from the checkpoint of step ${saved.step}`);
  return saved;
}

type BeginOptions = Pick<TrainArguments, "out" | "resume" | "dryRun" | "findLr">;

async function openSaved(out: string, settings: RunSettings, version: string): Promise<SavedCheckpoint> {
  const saved = await openCheckpoint(out, (wrong) => say(`a checkpoint is left out: ${wrong}`)).catch((error) => {
    throw error instanceof FormatError ? new FormatError(`${error.message}. Begin without --resume`) : error;
  });
  const { [FOUND_RATE]: _, ...then } = saved.settings;
  const changed = changedSettings(then, settings);
  if (changed.length > 0)
    throw new ShapeError(
      `train: --resume must have the settings of the run, got ${changed.join(", ")}. Repeat the command that began it, or begin in another --out`,
    );
  if (saved.madeBy.lowrank !== version)
    say(
      `the run was begun by lowrank ${saved.madeBy.lowrank}, this is ${version}: numbers may differ in their last bits`,
    );
  return saved;
}

/** The lines of steps up to this one. The last line of a run that was killed may be half a line. */
function upTo(lines: string, step: number): string {
  const kept = lines.split("\n").filter((line) => {
    const [, of] = /^\{"step":(\d+),.*\}$/.exec(line) ?? [];
    return of !== undefined && Number(of) <= step;
  });
  return kept.map((line) => `${line}\n`).join("");
}
