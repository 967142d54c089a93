// lowrank sweep, from its configuration to its page.
import { existsSync } from "node:fs";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { fitTogether } from "../../src/cli/plan.ts";
import { sweepCommand } from "../../src/cli/sweep.ts";
import { readSweepConfig, sweepYaml } from "../../src/cli/sweep-config.ts";
import { addTrial, byValue, candidate, type FinishedTrial, openSweep } from "../../src/cli/sweep-files.ts";
import { sweepPage } from "../../src/cli/sweep-page.ts";
import { groupsOf, runTrial, runTrialsTogether } from "../../src/cli/sweep-trial.ts";
import { FormatError } from "../../src/io/errors.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { loadModelFrom, loadPeftFrom } from "../../src/node.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { evaluate } from "../../src/train/loss.ts";
import { expectClose, testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { start } from "./run.ts";

let home = "";
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-sweep-"));
  await writeTinyModel(at("model"), { config: { num_hidden_layers: 1 } });
  await writeFile(at("rows.jsonl"), '{"input_ids":[1,2,3,4]}\n{"input_ids":[4,5,6,7]}\n{"input_ids":[8,9,10]}\n');
  await writeFile(at("valid.jsonl"), '{"input_ids":[1,2,4,8]}\n{"input_ids":[3,6,12]}\n');
});
afterAll(() => rm(home, { recursive: true, force: true }));

const yaml = (changes = ""): string => `model: ${at("model")}
data: ${at("rows.jsonl")}
valid-data: ${at("valid.jsonl")}
strategy: grid
steps: 2
batch-size: 2
evaluations: 2
target-modules: [q_proj, v_proj]
alpha: 8
space:
  rank: [2]
  learning-rate: [0.001, 0.01, 0.1]
${changes}`;

async function sweepInto(out: string, text: string, options: readonly string[] = []): Promise<FinishedTrial[]> {
  await writeFile(at(`${out}.yaml`), text);
  await sweepCommand().parseAsync(["--config", at(`${out}.yaml`), "--out", at(out), ...options], { from: "user" });
  const lines = (await readFile(join(at(out), "sweep.jsonl"), "utf8")).trimEnd().split("\n");
  return lines.map((line) => JSON.parse(line) as FinishedTrial);
}

const lossesOf = (trials: readonly FinishedTrial[]) => trials.map(({ point, losses }) => ({ point, losses }));

describe("lowrank sweep", () => {
  test("goes on after the trials that are there as if it had not ended, and keeps the best adapter", async () => {
    const whole = await sweepInto("whole", yaml("together: 1\n"));
    expect(whole.map(({ point }) => point["learning-rate"])).toEqual([0.001, 0.01, 0.1]);
    expect(byValue(whole).map(({ trial }) => trial)).toEqual([3, 2, 1]);
    for (const { losses, value } of whole) expect([losses.length, Math.min(...losses)]).toEqual([2, value]);
    await mkdir(at("parts"));
    await cp(join(at("whole"), "sweep.yaml"), join(at("parts"), "sweep.yaml"));
    const two = whole.slice(0, 2).map((trial) => `${JSON.stringify(trial)}\n`);
    await writeFile(join(at("parts"), "sweep.jsonl"), `${two.join("")}{"trial":3,"po`); // killed as it wrote
    expect(lossesOf(await sweepInto("parts", yaml("together: 1\n")))).toEqual(lossesOf(whole));

    const atOnce = await sweepInto("at-once", yaml()); // of a grid four at a time
    expect(atOnce.map(({ point }) => point)).toEqual(whole.map(({ point }) => point));
    expectClose(
      atOnce.flatMap(({ losses }) => losses),
      whole.flatMap(({ losses }) => losses),
    );
    expect(atOnce.some(({ losses }, i) => String(losses) !== String(whole[i]?.losses))).toBe(true); // sums in another order
    expect((await readdir(at("at-once"))).sort()).toEqual(["best", "sweep.html", "sweep.jsonl", "sweep.yaml"]);
    const budget = ["--budget", "1"];
    expect(lossesOf(await sweepInto("no-room", yaml(), budget))).toEqual(lossesOf(whole));

    const model = await loadModelFrom(await testGpu(), at("model"));
    const adapter = await loadPeftFrom(model, join(at("parts"), "best"));
    expect(adapter.config).toMatchObject({ r: 2, alpha: 8 });
    const valid = [
      { inputIds: [1, 2, 4, 8], labels: [1, 2, 4, 8] },
      { inputIds: [3, 6, 12], labels: [3, 6, 12] },
    ];
    const { loss } = await evaluate(model, valid, 2);
    expectClose([loss], [whole[2]?.value ?? Number.NaN]);

    const page = await readFile(join(at("whole"), "sweep.html"), "utf8");
    expect(page.match(/<path d="M/g)?.length).toBe(3);
    expect(page.match(/<tr>/g)?.length).toBe(4);
    await expect(sweepInto("whole", yaml("seed: 5\ntogether: 1\n").replace("[2]", "[2, 8]"))).rejects.toThrow(
      new ShapeError(
        `sweep: --out must have no trials of another configuration, got seed 5 in place of 0, space.rank [2,8] in place of [2] in ${at("whole")}. Choose another --out, or the configuration in its sweep.yaml`,
      ),
    );
  });

  test("refuses targets that match nothing before the first trial", async () => {
    await expect(sweepInto("none", yaml().replace("[q_proj, v_proj]", "no_proj"))).rejects.toThrow(/no_proj/);
    expect(existsSync(join(at("none"), "sweep.jsonl"))).toBe(false);
  });

  test("ends with 130 at Ctrl-C, without the trial in progress", async () => {
    await writeFile(at("long.yaml"), yaml().replace("steps: 2", "steps: 100000"));
    const { child, ended, saw } = start(["sweep", "--config", at("long.yaml"), "--out", at("long"), "--json"]);
    await saw("trial 1 of 3");
    child.kill("SIGINT");
    const { code, stdout } = await ended;
    expect(code).toBe(130);
    expect(stdout.trimEnd().split("\n").at(-1)).toBe(JSON.stringify({ trials: [], best: null, out: at("long") }));
    expect(existsSync(join(at("long"), "sweep.jsonl"))).toBe(false);
  });
});

test("a trial leaves the model as it was, whether it ends or is closed", async () => {
  const gpu = await testGpu();
  const model = await loadModelFrom(gpu, at("model"));
  const rows = [{ inputIds: [1, 2, 3], labels: [1, 2, 3] }];
  const bench = { model, baseModel: "base", config: readSweepConfig("sweep.yaml", yaml()), rows, valid: rows };
  const { buffersLive } = gpu.counters();
  const point = { rank: 2, "learning-rate": 0.01 };
  const run = () => runTrial(bench, point, at("candidate"), Number.POSITIVE_INFINITY);
  for await (const loss of run()) expect(loss).toBeGreaterThan(0);
  expect(gpu.counters().buffersLive).toBe(buffersLive);
  for await (const loss of run()) if (loss > 0) break;
  expect(gpu.counters().buffersLive).toBe(buffersLive);
});

test("trials at once come out as they do alone, one that is stopped or not finite leaves the others, and the model is as it was", async () => {
  const gpu = await testGpu();
  const model = await loadModelFrom(gpu, at("model"));
  const row = (...ids: number[]) => ({ inputIds: ids, labels: ids });
  const rows = [row(1, 2, 3), row(4, 5, 6, 7)];
  const config = readSweepConfig(
    "sweep.yaml",
    yaml().replace("steps: 2", "steps: 12").replace("evaluations: 2", "evaluations: 3"),
  );
  const bench = { model, baseModel: "base", config, rows, valid: rows };
  const points = [8, 16, 3e38, 4].map((alpha, i) => ({ rank: 2 + (i % 2), "learning-rate": 0.01 * (i + 1), alpha }));
  const alone: number[][] = [];
  for (const point of points.filter(({ alpha }) => alpha < 1e9)) {
    alone.push([]);
    for await (const loss of runTrial(bench, point, at("lonely"), Number.POSITIVE_INFINITY)) alone.at(-1)?.push(loss);
  }
  const { buffersLive } = gpu.counters();
  const ends = points.map(() => new AbortController());
  const trials = points.map((point, i) => ({ trial: i + 1, point, signal: (ends[i] as AbortController).signal }));
  const rounds: (readonly (number | undefined)[])[] = [];
  for await (const round of runTrialsTogether(
    bench,
    trials,
    (trial) => at(`together-${trial}`),
    Number.POSITIVE_INFINITY,
  )) {
    rounds.push(round);
    ends[3]?.abort();
  }
  expect(gpu.counters().buffersLive).toBe(buffersLive);
  const lossesOfLane = (lane: number): (number | undefined)[] => rounds.map((round) => round[lane]);
  expectClose(lossesOfLane(0) as number[], alone[0] ?? []);
  expectClose(lossesOfLane(1) as number[], alone[1] ?? []);
  expectClose([lossesOfLane(3)[0] as number], alone[2]?.slice(0, 1) ?? []);
  expect(lossesOfLane(3).slice(1)).toEqual([undefined, undefined]);
  expect(
    lossesOfLane(2)
      .filter((loss) => loss !== undefined)
      .at(-1),
  ).toBeNaN();
  const best = await loadPeftFrom(model, at("together-2"));
  expectClose([(await evaluate(model, rows, 2)).loss], [Math.min(...(alone[1] ?? []))]);
  best.detach();
});

test("those train at once that share targets, have no dropout and fit, as many as do", async () => {
  const gpu = await testGpu();
  const model = await loadModelFrom(gpu, at("model"));
  const rows = [{ inputIds: [1, 2, 3], labels: [1, 2, 3] }];
  const bench = { model, baseModel: "base", config: readSweepConfig("sweep.yaml", yaml()), rows, valid: rows };
  const points = [
    { rank: 2 },
    { rank: 3, "target-modules": "all-linear" },
    { rank: 4 },
    { rank: 5, dropout: 0.1 },
    { rank: 6, "target-modules": "all-linear" },
    { rank: 7 },
  ];
  expect(await groupsOf(bench, points, async () => true)).toEqual([[0, 2, 5], [1, 4], [3]]);
  expect(await groupsOf(bench, points, async ({ length }) => length <= 2)).toEqual([[0, 2], [5], [1, 4], [3]]);
  expect(await groupsOf(bench, points, async () => false)).toEqual([[0], [2], [5], [1], [4], [3]]);

  const size = { weights: "stored", batchSize: 2, maxLength: 16 } as const;
  const of = (r: number, changes = {}) => ({ r, alpha: 2, targetModules: "all-linear", ...changes });
  const takes = (configs: readonly LoraConfig[], budget: number) =>
    fitTogether(gpu, at("model"), configs, size, budget);
  expect(await takes([of(2), of(4)], 2 ** 30)).toBe(true);
  expect(await takes([of(2), of(4)], 1000)).toBe(false);
  expect(await takes([of(2), of(4, { useDora: true })], 2 ** 30)).toBe(false);
});

describe("the files of a sweep", () => {
  const trial = (n: number, value: number): FinishedTrial => ({
    ...{ trial: n, point: { rank: 2 }, losses: [value], value, stopped: false, seconds: 1 },
  });

  test("have the best trial's adapter, also where the sweep was cut off before it was moved", async () => {
    const config = readSweepConfig("sweep.yaml", yaml());
    await mkdir(at("files"));
    expect(await openSweep(at("files"), config)).toEqual([]);
    const adapterOf = async (n: number): Promise<void> => {
      await writeFile(candidate(at("files"), n), `adapter ${n}`);
    };
    await adapterOf(1);
    await adapterOf(2); // of a trial at the same time
    await addTrial(at("files"), [trial(1, 3)]);
    expect(existsSync(candidate(at("files"), 2))).toBe(true);
    await addTrial(at("files"), [trial(1, 3), trial(2, Number.NaN)]);
    expect(await readFile(join(at("files"), "best"), "utf8")).toBe("adapter 1");
    await writeFile(join(at("files"), "sweep.jsonl"), `${JSON.stringify(trial(3, 2))}\n`, { flag: "a" });
    await adapterOf(3);
    await adapterOf(4);
    expect(await openSweep(at("files"), config)).toEqual([
      trial(1, 3),
      { ...trial(2, Number.NaN), losses: [Number.NaN] },
      trial(3, 2),
    ]);
    expect(await readFile(join(at("files"), "best"), "utf8")).toBe("adapter 3");
    expect(existsSync(candidate(at("files"), 4))).toBe(false);
  });

  test("have a page that shows names as they are and leaves trials without a value out of the plot", () => {
    const page = sweepPage({ model: "<b>", space: { rank: { values: [2] } } }, [trial(1, 3), trial(2, Number.NaN)]);
    expect(page).toContain("<h1>Sweep of &#60;b&#62;</h1>");
    expect(page.match(/<path d="M/g)?.length).toBe(1);
    expect(page).toContain("<tr><td>2</td><td>none</td><td>2</td>");
  });
});

describe("sweep.yaml", () => {
  const least = "model: m\ndata: d\nsteps: 2\n";

  test("has the defaults of lowrank train, lists of names as texts, and whole ranks", () => {
    const text = `${least}space:\n  target_modules: [all-linear, [q_proj, v_proj]]\n  rank: {min: 1, max: 9, log: true}\n`;
    expect(readSweepConfig("sweep.yaml", text)).toMatchObject({
      ...{
        model: "m",
        data: "d",
        strategy: "bayes",
        trials: 20,
        together: 2,
        steps: 2,
        batchSize: 4,
        seed: 0,
        evaluations: 5,
      },
      fixed: { alpha: 32, "learning-rate": 2e-4, dropout: 0, warmup: 0.03, "weight-decay": 0 },
      space: {
        "target-modules": { values: ["all-linear", "q_proj,v_proj"] },
        rank: { min: 1, max: 9, log: true, whole: true },
      },
    });
  });

  test("has trials at once by its strategy, unless it says how many, or the command does", () => {
    const together = (text: string, given?: number): unknown =>
      readSweepConfig("sweep.yaml", `${least}${text}space: {rank: [1, 2]}`, given).resolved.together;
    expect([together(""), together("strategy: grid\n"), together("strategy: random\n")]).toEqual([2, 4, 4]);
    expect([together("together: 3\n"), together("together: 3\n", 1)]).toEqual([3, 1]);
  });

  test("is kept as a file that says the same, whatever the order of its keys", () => {
    const space = "space:\n  dropout: {min: 0, max: 0.5}\n  rank: [1, 2]\n";
    const config = readSweepConfig("sweep.yaml", `${least}${space}`);
    expect(readSweepConfig("sweep.yaml", sweepYaml(config))).toEqual(config);
    expect(Object.keys(config.space)).toEqual(["rank", "dropout"]);
  });

  test.each([
    [
      `${least}stepz: 3\nspace: {rank: [1, 2]}`,
      ':4: a key must be one of sweep.yaml, got "stepz". Did you mean "steps"?',
    ],
    [`${least}space:\n  rnk: [1]`, ':5: a key must be one of the settings of a space, got "rnk". Did you mean "rank"?'],
    [`${least}space:\n  rank: {min: 1, mx: 2}`, ':5: a key must be one of a range, got "mx". Did you mean "max"?'],
    [`${least}space:\n  rank: {min: 1}`, ': "rank.max" must be a whole number of at least 1, got nothing'],
    [`${least}space:\n  rank:\n  - 2\n  - 0`, ':5: "rank" must be a whole number of at least 1, got 0'],
    [`${least}space:\n  rank: 3`, ':5: "rank" must be a list of values or {min, max}, got 3'],
    [`${least}space: {rank: {min: 4, max: 2}}`, ':4: search: "rank" must have numbers min < max, got 4 and 2'],
    [`${least}space: {alpha: {min: 4, max: 8, log: 1}}`, ':4: "log" must be true or false, got 1'],
    [least, ': "space" must have settings with their values, such as "rank: [4, 8]", got null'],
    [`${least}rank: 2\nspace: {rank: [2]}`, ':4: "rank" must be fixed or in the space, got both. Leave one out'],
    [`${least}valid-split: 1\nspace: {rank: [2]}`, ':4: "valid-split" must be a number above 0 and below 1, got 1'],
    [`${least}together: 0\nspace: {rank: [2]}`, ':4: "together" must be a whole number of at least 1, got 0'],
    [`${least}strategy: best\nspace: {rank: [2]}`, ':4: "strategy" must be bayes, random or grid, got "best"'],
    ["model: m\ndata: d\nspace: {rank: [2]}", ': "steps" must be a whole number of at least 1, got nothing'],
  ])("refuses %j", (text, message) => {
    expect(() => readSweepConfig("sweep.yaml", text)).toThrow(new FormatError(`sweep.yaml${message}`));
  });
});
