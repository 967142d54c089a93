// Training runs that are cut off, through the command; killed ones in processes of their own.
import { cp, mkdtemp, readdir, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, expect, test, vi } from "vitest";
import { timeOption } from "../../src/cli/options.ts";
import { trainCommand } from "../../src/cli/train.ts";
import { Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { FormatError } from "../../src/io/errors.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { freshSeed } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { killLoop } from "./kill.ts";

vi.mock("../../src/gpu/gpu.ts", async (original) => (await import("./shared-gpu.ts")).sharedGpu(original));

let home = "";
let said = "";
/** Called with each line on stderr. */
let onLine: (line: string) => void = () => {};
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-resume-"));
  await writeTinyModel(at("model"), { config: { num_hidden_layers: 1 } });
  await writeFile(at("ids.jsonl"), '{"input_ids":[1,2,3]}\n{"input_ids":[4,5,6,7]}\n{"input_ids":[8,9]}');
  await writeFile(at("valid.jsonl"), '{"input_ids":[1,2,4,8]}\n{"input_ids":[3,6,12]}');
  vi.spyOn(Gpu.prototype, "destroy").mockReturnValue(undefined);
  vi.spyOn(process.stdout, "write").mockReturnValue(true);
  vi.spyOn(process.stderr, "write").mockImplementation((line) => {
    said += line;
    onLine(String(line));
    return true;
  });
});
beforeEach(() => {
  said = "";
  onLine = () => {};
});
afterAll(async () => {
  vi.restoreAllMocks();
  (await openGpu()).destroy();
  await rm(home, { recursive: true, force: true });
});

/** What the command says on stderr. */
async function run(out: string, ...more: string[]): Promise<string> {
  said = "";
  const places = ["--model", at("model"), "--data", at("ids.jsonl"), "--out", at(out), "--batch-size", "2"];
  await trainCommand()
    .exitOverride()
    .parseAsync([...places, "--learning-rate", "0.02", ...more], { from: "user" });
  return said;
}
/** With a new adapter. */
const train = (out: string, ...more: string[]): Promise<string> =>
  run(out, "--rank", "4", "--target-modules", "down_proj", ...more);

const adapterOf = async (name: string): Promise<Buffer[]> =>
  Promise.all(["adapter_model.safetensors", "adapter_config.json"].map((file) => readFile(join(at(name), file))));
const metricsOf = async (name: string): Promise<{ step: number; loss: number; validation?: { best: boolean } }[]> =>
  (await readFile(join(at(name), "metrics.jsonl"), "utf8"))
    .trimEnd()
    .split("\n")
    .map((line) => ({ ...JSON.parse(line), tokens_per_second: 0 }));

test("a run that is killed five times, at any moment, ends with the bytes of one that was not", async () => {
  const seed = freshSeed();
  const { kills, wrong } = await killLoop({ home: at("killed"), kills: 5, steps: 30, seed });
  expect(wrong, `seed ${seed}`).toEqual([]);
  expect(kills).toBe(5);
}, 600_000);

test("Ctrl-C leaves a checkpoint, and --resume goes on from it: PiSSA, DoRA and LoRA+ too", async () => {
  const settings = ["--steps", "24", "--init", "pissa", "--use-dora", "--loraplus-lr-ratio", "4"];
  await train("whole", ...settings);
  onLine = (text) => void (text.startsWith("step 4/24") && process.emit("SIGINT"));
  await train("cut", ...settings, "--save-every", "2");
  expect(process.exitCode).toBe(130);
  process.exitCode = undefined;
  const steps = (await metricsOf("cut")).length;
  expect(steps).toBeGreaterThanOrEqual(4);
  expect(steps).toBeLessThan(24);
  // As a kill would leave it: steps that the checkpoint does not know, half a line.
  const [line] = await metricsOf("whole");
  await writeFile(at("cut/metrics.jsonl"), `${JSON.stringify({ ...line, step: 23 })}\n{"step":24,"lo`, { flag: "a" });
  const resumed = await train("cut", ...settings, "--resume");
  expect(resumed).toContain(`going on from the checkpoint of step ${steps}\n`);
  expect(await adapterOf("cut")).toEqual(await adapterOf("whole"));
  expect(await metricsOf("cut")).toEqual(await metricsOf("whole"));
});

test("the best adapter of a validation is kept, patience ends the run, and a damaged checkpoint is left out", async () => {
  const often = ["--valid-data", at("valid.jsonl"), "--valid-every", "2", "--patience", "3"];
  const settings = ["--steps", "40", ...often, "--learning-rate", "0.1", "--save-every", "2", "--keep", "3"];
  const ended = await train("valid", ...settings);
  const evaluated = (await metricsOf("valid")).filter(({ validation }) => validation);
  const best = evaluated.filter(({ validation }) => validation?.best).at(-1)?.step ?? Number.NaN;
  const last = evaluated.at(-1)?.step ?? Number.NaN;
  expect(last).toBe(best + 6);
  expect(ended).toContain(
    `stopped after step ${last}: the validation loss was no lower for as long as --patience allows\nthe adapter of step ${last} is saved in ${at("valid")}, the best one, of step ${best}, in ${at("valid/best")}\n`,
  );
  expect(await readdir(at("valid/checkpoints"))).toHaveLength(3);
  expect(await adapterOf("valid/best")).not.toEqual(await adapterOf("valid"));

  await cp(at("valid"), at("damaged"), { recursive: true });
  const name = `damaged/checkpoints/step-${String(last).padStart(6, "0")}`;
  await truncate(at(`${name}/training.safetensors`), 100);
  const resumed = await train("damaged", ...settings, "--resume");
  expect(resumed).toMatch(
    new RegExp(`^a checkpoint is left out: ${at(name)}/training.safetensors: must have \\d+ bytes, got 100$`, "m"),
  );
  expect(resumed).toContain(`going on from the checkpoint of step ${last - 2}\n`);
  for (const which of ["", "/best"])
    expect(await adapterOf(`damaged${which}`)).toEqual(await adapterOf(`valid${which}`));
  expect(await metricsOf("damaged")).toEqual(await metricsOf("valid"));
});

test("a run goes on only as it began; with a constant learning rate it may be longer", async () => {
  const settings = ["--schedule", "constant", "--warmup", "0", "--save-every", "2"];
  await train("long", ...settings, "--steps", "6");
  await train("short", ...settings, "--steps", "4");
  await writeFile(at("other.jsonl"), '{"input_ids":[1,2,3,4]}');

  const wayOut = "Repeat the command that began it, or begin in another --out";
  const other = ["--rank", "8", "--batch-size", "3", "--data", at("other.jsonl"), "--use-dora", "--seed", "1"];
  const changed = await train("short", ...settings, "--steps", "4", "--resume", ...other).catch(String);
  expect(changed.replaceAll(/sha256:[0-9a-f]{64}/g, "HASH")).toBe(
    `ShapeError: train: --resume must have the settings of the run, got --data "HASH" in place of "HASH", --rank 8 in place of 4, --batch-size 3 in place of 2, --seed 1 in place of 0, --use-dora true in place of nothing. ${wayOut}`,
  );
  await expect(train("short", "--steps", "5", "--resume", "--warmup", "0")).rejects.toThrow(
    new ShapeError(
      `train: --resume must have the settings of the run, got --schedule "linear" in place of "constant", --steps 5 in place of nothing. ${wayOut}`,
    ),
  );
  await expect(train("short", ...settings, "--steps", "4")).rejects.toThrow(
    new ShapeError(
      `train: --out must have no checkpoints of another run, got 2 in ${at("short/checkpoints")}. Go on from them with --resume, delete them, or choose another --out`,
    ),
  );
  await train("short", ...settings, "--steps", "6", "--resume");
  expect(await adapterOf("short")).toEqual(await adapterOf("long"));
  await expect(train("nothing", "--resume")).rejects.toThrow(
    new FormatError(
      `${at("nothing/checkpoints")}: must have a checkpoint to go on from, got none. Begin without --resume`,
    ),
  );
  for (const step of [4, 6]) await rm(at(`short/checkpoints/step-00000${step}/run.json`));
  await expect(train("short", ...settings, "--resume")).rejects.toThrow(
    new FormatError(
      `${at("short/checkpoints")}: must have a checkpoint that is whole, got 2 that are not. ${at("short/checkpoints/step-000006")}/run.json: must be there, got nothing. Begin without --resume`,
    ),
  );
});

test("a run ends when its time is over, and one that went on from an adapter in its own directory can be resumed", async () => {
  await train("own", "--steps", "2");
  const settings = ["--init-adapter", at("own"), "--steps", "100000", "--save-every", "1"];
  const started = run("own", ...settings, "--time-budget", "0.5s");
  const step = /^the time is over after step (\d+); the same command with --resume goes on$/m.exec(await started)?.[1];
  expect(Number(step)).toBeGreaterThan(0);
  const resumed = await run("own", ...settings, "--time-budget", "0.2s", "--resume");
  expect(resumed).toContain(`going on from the checkpoint of step ${step}\n`);
  await expect(train("own", "--time-budget", "20")).rejects.toThrow(
    new ShapeError("train: --time-budget must be a time such as 90s, 20m or 1.5h, at most 596h, got 20"),
  );
  const timeOf = timeOption("train", "--time-budget <time>", "").parseArg as (text: string) => unknown;
  expect(["1.1h", "0.0014s"].map(timeOf), "whole milliseconds").toEqual([3_960_000, 1]);
  expect(() => timeOf("600h")).toThrow(ShapeError);
  await expect(train("alone", "--patience", "2")).rejects.toThrow(
    new ShapeError(
      "train: --valid-every and --patience need --valid-data, --valid-split or a directory with a valid file, got none",
    ),
  );
});
