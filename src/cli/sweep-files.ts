/** The directory of a sweep: its configuration, its finished trials, and the best adapter. */
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { FormatError } from "../io/errors.ts";
import { disk, syncFile } from "../io/files.ts";
import { isObject, type JsonObject } from "../io/json.ts";
import { appendLine, changedSettings, writeFileAtomic } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { SweepTrial } from "../train/sweep.ts";
import { readYaml } from "./run-config.ts";
import { type SweepConfig, sweepYaml } from "./sweep-config.ts";

/** A line of sweep.jsonl. What is not a finite number is null there. */
export interface FinishedTrial extends SweepTrial {
  /** From its beginning to its end, with what trained at once. */
  readonly seconds: number;
}

const trialsFile = (out: string): string => join(out, "sweep.jsonl");
/** Where a trial leaves its adapter until it is known whether it is the best. */
export const candidate = (out: string, trial: number): string => join(out, `candidate-${trial}`);

/**
 * The trials that are in `out`, which a sweep goes on behind: none in a fresh directory, which is given sweep.yaml. There may be more trials than
 * before. Throws ShapeError where the configuration is another one, and says what differs; FormatError where a line cannot be read.
 */
export async function openSweep(out: string, config: SweepConfig): Promise<FinishedTrial[]> {
  const path = join(out, "sweep.yaml");
  if (existsSync(path)) demandSame(out, readYaml(path, await readFile(path, "utf8")).values, config);
  await writeFileAtomic(path, sweepYaml(config));
  const done = await readTrials(trialsFile(out));
  await settle(out, done);
  return done;
}

function demandSame(out: string, then: JsonObject, { resolved: now }: SweepConfig): void {
  const flat = ({ trials, space, ...rest }: JsonObject): JsonObject => ({
    ...rest,
    ...Object.fromEntries(Object.entries(isObject(space) ? space : {}).map(([name, of]) => [`space.${name}`, of])),
  });
  const changed = changedSettings(flat(then), flat(now));
  if (changed.length > 0)
    throw new ShapeError(
      `sweep: --out must have no trials of another configuration, got ${changed.join(", ")} in ${out}. Choose another --out, or the configuration in its sweep.yaml`,
    );
}

/** The last line of a sweep that was killed may be half a line: it is cut off. */
async function readTrials(path: string): Promise<FinishedTrial[]> {
  const text = existsSync(path) ? await readFile(path, "utf8") : "";
  const whole = text.slice(0, text.lastIndexOf("\n") + 1);
  if (whole !== text) await writeFileAtomic(path, whole);
  const lines = whole.split("\n").slice(0, -1);
  return lines.map((line, i) => parseTrial(line, `${path}:${i + 1}`, i + 1));
}

function parseTrial(line: string, where: string, trial: number): FinishedTrial {
  const number = (x: unknown): number => (typeof x === "number" ? x : Number.NaN);
  const wrong = new FormatError(`${where}: must be trial ${trial} of a sweep, got ${line.slice(0, 80)}`);
  let json: unknown;
  try {
    json = JSON.parse(line);
  } catch {
    throw wrong;
  }
  if (!isObject(json) || json.trial !== trial || !isObject(json.point) || !Array.isArray(json.losses)) throw wrong;
  const { point, losses, value, stopped, seconds } = json;
  return {
    ...{ trial, point: point as SweepTrial["point"], losses: losses.map(number), value: number(value) },
    ...{ stopped: stopped === true, seconds: number(seconds) },
  };
}

/** Makes the last of `done` durable, then its adapter the best one if it is. Cut off in between, `openSweep` does the rest. */
export async function addTrial(out: string, done: readonly FinishedTrial[]): Promise<void> {
  await appendLine(trialsFile(out), JSON.stringify(done.at(-1)));
  await syncFile(trialsFile(out));
  await disk.syncDirectory(out);
  await settle(out, done, true);
}

/** Moves the best trial's adapter to `best`, and removes what other trials left, but for those that may still run: `goesOn`. */
export async function settle(out: string, done: readonly SweepTrial[], goesOn = false): Promise<void> {
  const best = bestOf(done);
  const from = best && candidate(out, best.trial);
  if (from && existsSync(from)) {
    await disk.remove(join(out, "best"));
    await disk.rename(from, join(out, "best"));
    await disk.syncDirectory(out);
  }
  for (const name of await disk.list(out)) {
    const [, trial] = /^candidate-(\d+)$/.exec(name) ?? [];
    if (trial !== undefined && !(goesOn && Number(trial) > done.length)) await disk.remove(join(out, name));
  }
}

/** The first of the lowest value; undefined where no trial has one. */
export const bestOf = <T extends SweepTrial>(trials: readonly T[]): T | undefined => byValue(trials).find(isFinished);

const isFinished = ({ value }: SweepTrial): boolean => Number.isFinite(value);

/** The lowest value first, those without one last. */
export const byValue = <T extends SweepTrial>(trials: readonly T[]): T[] =>
  trials.toSorted((a, b) => Number(isFinished(b)) - Number(isFinished(a)) || a.value - b.value || a.trial - b.trial);
