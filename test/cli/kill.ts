/** Training runs that are killed at any moment and go on, compared with one that is left alone. */
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as wait } from "node:timers/promises";
import { fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { snapshotsIn } from "../../src/io/snapshots.ts";
import { checkpointSteps, openCheckpoint } from "../../src/node.ts";
import { Random } from "../../src/tensor/random.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { lowrank, start } from "./run.ts";

export interface KillOptions {
  /** An empty directory to work in. */
  readonly home: string;
  readonly kills: number;
  /** Optimizer steps of a run. */
  readonly steps: number;
  readonly seed: number;
  readonly onKill?: (line: string) => void;
}

export interface KillReport {
  readonly kills: number;
  /** Of these, while a checkpoint was being written: what there was of it was left. */
  readonly inWrites: number;
  /** Runs that were killed after their first checkpoint, came to their end and were compared. */
  readonly compared: number;
  /** What was wrong, in words; empty where nothing was. */
  readonly wrong: readonly string[];
}

/**
 * Trains a tiny model with a checkpoint after every step, kills the process with SIGKILL `kills` times, a fifth of them while it is starting, and
 * goes on each time. After each kill the newest checkpoint must be whole and not older than before, and the adapter beside it whole; at
 * its end each run must have the bytes of the adapter, and the numbers of all steps, of a run that was not killed.
 */
export async function killLoop({ home, kills, steps, seed, onKill = () => {} }: KillOptions): Promise<KillReport> {
  const random = new Random(seed);
  const wrong: string[] = [];
  const args = await prepare(home, steps);
  const whole = await lowrank([...args, "--out", join(home, "whole")]);
  if (whole.code !== 0) throw new Error(whole.stderr);
  const expected = await outcome(join(home, "whole"));
  let [done, inWrites, runs, compared] = [0, 0, 0, 0];
  while (done < kills) {
    const out = join(home, `killed-${++runs}`);
    let newest = 0;
    while (done < kills) {
      if (await wasKilled([...args, "--out", out, ...(newest > 0 ? ["--resume"] : [])], steps, random)) done++;
      else break;
      if (await hasLeftovers(out)) inWrites++;
      const found = await state(out, wrong);
      onKill(`kill ${done} of ${kills}: run ${runs}, newest checkpoint of step ${found}`);
      if (found < newest)
        wrong.push(`${out}: the checkpoint of step ${newest} is lost, the newest is of step ${found}`);
      newest = found;
    }
    if (newest > 0 && newest < steps) await lowrank([...args, "--out", out, "--resume"]);
    if (newest === 0) {
      await rm(out, { recursive: true, force: true });
      continue;
    }
    compared++;
    if ((await outcome(out)) !== expected) wrong.push(`${out}: differs from the run that was not killed`);
  }
  return { kills: done, inWrites, compared, wrong };
}

async function prepare(home: string, steps: number): Promise<string[]> {
  await mkdir(home, { recursive: true });
  const config = { num_hidden_layers: 1, hidden_size: 16, intermediate_size: 16, num_attention_heads: 2 };
  await writeTinyModel(join(home, "model"), { config });
  const rows = Array.from({ length: 9 }, (_row, i) => Array.from({ length: 3 + i }, (_id, t) => (7 * i + 5 * t) % 64));
  const lines = rows.map((ids) => JSON.stringify({ input_ids: ids }));
  await writeFile(join(home, "data.jsonl"), lines.join("\n"));
  const sizes = ["--steps", `${steps}`, "--batch-size", "2", "--grad-accumulation", "3", "--rank", "4"];
  const settings = [
    "--target-modules",
    "down_proj",
    "--learning-rate",
    "0.01",
    "--dropout",
    "0.1",
    "--save-every",
    "1",
  ];
  return ["train", "--model", join(home, "model"), "--data", join(home, "data.jsonl"), ...sizes, ...settings];
}

/** Runs the command and kills it at some moment. False where it was at its end before. */
async function wasKilled(args: readonly string[], steps: number, random: Random): Promise<boolean> {
  const run = start(args);
  if (random.uniform() < 0.2) await wait(random.uniform(0, 4000));
  else {
    await run.saw(`/${steps}  loss`).catch(() => {}); // its first step
    await wait(random.uniform(0, 1500));
  }
  run.child.kill("SIGKILL");
  const { code, stderr } = await run.ended;
  if (code !== undefined && code !== 0) throw new Error(stderr);
  return code === undefined;
}

/** The step of the newest checkpoint, which must be whole, as must the adapter beside it. 0: none yet. */
async function state(out: string, wrong: string[]): Promise<number> {
  const [newest = 0] = await checkpointSteps(out).catch(() => []);
  if (newest === 0) return 0;
  const { step } = await openCheckpoint(out, (message) => wrong.push(message));
  if (step > 1) await openSafetensors(await fileSource(join(out, "adapter_model.safetensors")), "adapter");
  return step;
}

/** Whether a checkpoint is there in part: the next run removes it. */
async function hasLeftovers(out: string): Promise<boolean> {
  const names = await readdir(snapshotsIn(out)).catch(() => []);
  return names.some((name) => name.endsWith(".tmp"));
}

/** Adapter and numbers of all steps as one text. */
async function outcome(out: string): Promise<string> {
  const adapter = await readFile(join(out, "adapter_model.safetensors"), "base64");
  const config = await readFile(join(out, "adapter_config.json"), "utf8");
  const lines = (await readFile(join(out, "metrics.jsonl"), "utf8")).trimEnd().split("\n");
  const numbers = lines.map((line) => ({ ...JSON.parse(line), tokens_per_second: 0 }));
  return JSON.stringify([adapter, config, numbers]);
}
