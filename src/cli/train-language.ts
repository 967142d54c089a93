import type { Gpu } from "../gpu/gpu.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import { attachLora } from "../lora/attach.ts";
import { initLora } from "../lora/init.ts";
import { attachEva } from "../lora/init-eva.ts";
import { initLoftq } from "../lora/init-loftq.ts";
import { initLoraGa } from "../lora/init-lora-ga.ts";
import { loraFa } from "../lora/lora-fa.ts";
import { loadPeft } from "../lora/peft.ts";
import type { CausalModel } from "../models/causal.ts";
import { openLinears } from "../models/load.ts";
import { diskDirectory, loadModelFrom, type SavedCheckpoint, startAsIn } from "../node.ts";
import { generateTokens } from "../serve/generate.ts";
import { textOf } from "../serve/text.ts";
import { ShapeError } from "../tensor/errors.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { longest } from "../train/batches.ts";
import { calibrationBatches } from "../train/calibration.ts";
import type { DataStats, Row } from "../train/data.ts";
import { evaluate } from "../train/loss.ts";
import { packRows } from "../train/packing.ts";
import { languageTask } from "../train/task.ts";
import { keepsTwice, loraConfig, plannedConfig, trainedFormat } from "./options.ts";
import { demandFit, type RunSize } from "./plan.ts";
import type { Fact } from "./report-page.ts";
import type { SaidCommand } from "./run-config.ts";
import {
  bitsLine,
  bytes,
  dataLine,
  number,
  openPeft,
  packingLine,
  type ReadData,
  readData,
  say,
  withGpu,
} from "./session.ts";
import type { TrainArguments } from "./train.ts";
import { follow, type LocatedArguments, stepsOf, type TrainedParts } from "./train-course.ts";
import { begin, keptSettings } from "./train-resume.ts";
import type { Sample } from "./train-run.ts";
import { version } from "./version.ts";

export async function trainLanguage(options: LocatedArguments, said: SaidCommand): Promise<void> {
  const { batchSize, gradAccumulation, checkpointing = false, packing = false } = options;
  const read = await readData(options.model, options.data, options.maxLength, options);
  const { stats, maxLength } = read;
  say(dataLine(stats, maxLength));
  const rows = packing ? packRows(read.rows, maxLength) : read.rows;
  if (packing) say(packingLine(read.rows, rows, batchSize));
  const { steps, warmupSteps } = stepsOf(options, rows.length);
  const valid = await readValidation(readData, options, read.valid, maxLength);
  const settings = await keptSettings(options, { steps, warmupSteps, rows });
  const prompts = await readPrompts(options);
  const size = {
    batchSize: Math.min(batchSize, rows.length),
    gradAccumulation,
    checkpointing,
    takesFromBase: keepsTwice(options),
    loraFa: options.loraFa ?? false,
    weights: trainedFormat(options),
    maxLength: longest(rows),
    neftuneAlpha: options.neftuneAlpha,
    packing,
    samples: samplesOf(prompts),
    calibration:
      options.init === "eva" || options.init === "lora_ga" ? { rows, batches: options.initBatches } : undefined,
    evaluation: valid && { batchSize: Math.min(batchSize, valid.length), maxLength: longest(valid) },
  };

  const work = async (gpu: Gpu): Promise<void> => {
    const started = performance.now();
    const plan = await demandFit(
      gpu,
      options.model,
      options.initAdapter ?? plannedConfig(options),
      size,
      options.budget,
    );
    say(
      `memory: at most ${bytes(plan.peak)} of the GPU's, ${bytes(plan.weights)} of it weights, ${bitsLine(plan.bits)}`,
    );
    const { dryRun = false } = options;
    const saved = await begin(options, settings, version());
    const model = await loadModelFrom(gpu, options.model, { weights: size.weights });
    model.checkpointing = checkpointing;
    const adapter = await startAdapter(model, options, rows, saved);
    const trained: TrainedParts = options.loraFa ? await loraFa(adapter) : { parameters: adapter.parameters };
    const trainable = trained.parameters.reduce((sum, p) => sum + p.size, 0);
    say(
      `adapter: rank ${adapter.config.r} on ${adapter.pairs.size + adapter.tables.size} layers, ${number(trainable)} parameters to train`,
    );
    if (dryRun) {
      say(
        `dry run: ${number(steps)} steps of ${number(batchSize * gradAccumulation)} rows would follow. Nothing was written`,
      );
      return;
    }
    await follow({
      ...{ options, said, gpu, started, adapter, trained, task: languageTask(model, options, packing) },
      ...{ rows, steps, warmupSteps, settings, saved, stats, planned: plan.peak },
      evaluate: valid && (() => evaluate(model, valid, batchSize)),
      sample: prompts && sampler(model, prompts),
      data: dataFacts(stats),
      memory: [
        ["weights", bytes(plan.weights)],
        ["activations", bytes(plan.activations)],
        ["optimizer", bytes(plan.optimizer)],
      ],
    });
  };
  await withGpu(work, options.budget === undefined ? {} : { budgetBytes: options.budget });
}

/** What the rows, or what else is learned from, are. */
export const dataFacts = (stats: DataStats, what = "rows"): Fact[] => [
  [what, number(stats.rows)],
  ["truncated", number(stats.truncated)],
  ["dropped", number(stats.dropped)],
  ["tokens", number(stats.tokens)],
  ["of them learned", number(stats.trainedTokens)],
];

/** What --sample-prompt gives. */
interface Prompts {
  readonly tokenizer: Tokenizer;
  readonly prompts: readonly { readonly prompt: string; readonly promptIds: readonly number[] }[];
}

export async function readPrompts({ model, samplePrompt }: TrainArguments): Promise<Prompts | undefined> {
  if (!samplePrompt) return undefined;
  const tokenizer = await loadTokenizer(diskDirectory(model));
  return { tokenizer, prompts: samplePrompt.map((prompt) => ({ prompt, promptIds: tokenizer.encode(prompt) })) };
}

/** Tokens that a sample adds. */
const SAMPLED = 48;

/** For the plan. */
export const samplesOf = (given: Prompts | undefined): RunSize["samples"] =>
  given && {
    promptLength: longest(given.prompts.map(({ promptIds }) => ({ inputIds: promptIds }))),
    maxTokens: SAMPLED,
  };

/** Continues the prompts by the model as it is, by the likeliest tokens. */
export function sampler(model: CausalModel, { tokenizer, prompts }: Prompts): Sample {
  return async () => {
    const samples: { readonly prompt: string; readonly text: string }[] = [];
    for (const { prompt, promptIds } of prompts) {
      const tokens = generateTokens(model, { promptIds, maxTokens: SAMPLED });
      let text = "";
      for await (const piece of textOf(tokens, { tokenizer, promptIds, room: SAMPLED })) text += piece.text;
      samples.push({ prompt, text });
    }
    return samples;
  };
}

/** The rows to evaluate on: those of --valid-data by this reader, or what was held out of the data. */
export async function readValidation<R>(
  readRows: (...place: Parameters<typeof readData>) => Promise<ReadData<R>>,
  options: TrainArguments,
  held: readonly R[] | undefined,
  maxLength: number,
): Promise<readonly R[] | undefined> {
  const { model, validData, validEvery, patience } = options;
  if (validData !== undefined) {
    const { validSplit, ...others } = options;
    return (await readRows(model, validData, maxLength, { ...others, splits: ["valid", "test"] })).rows;
  }
  if (!held && (validEvery !== undefined || patience !== undefined))
    throw new ShapeError(
      "train: --valid-every and --patience need --valid-data, --valid-split or a directory with a valid file, got none",
    );
  return held;
}

/** As it begins, by the data `rows` where --init says so; one that goes on gets the values of its parameters from the checkpoint's state. */
export async function startAdapter(
  model: CausalModel,
  options: TrainArguments,
  rows: readonly Row[],
  saved: SavedCheckpoint | undefined,
): Promise<LoraAdapter> {
  const { initAdapter, init, seed } = options;
  const isGiven = initAdapter !== undefined || init === "eva" || init === "loftq"; // by the file alone
  if (saved && isGiven) return loadPeft(model, saved.directory);
  if (initAdapter !== undefined) return openPeft(model, initAdapter);
  if (!saved && (init === "eva" || init === "lora_ga")) return startByData(model, options, rows);
  const adapter = attachLora(model, loraConfig(options), seed);
  if (saved && keepsTwice(options)) await startAsIn(saved, adapter);
  else if (init === "loftq") await initLoftq(adapter, await openLinears(diskDirectory(options.model)), { seed });
  else if (init !== undefined && init !== "eva" && init !== "lora_ga") await initLora(adapter, init, seed);
  return adapter;
}

async function startByData(model: CausalModel, options: TrainArguments, rows: readonly Row[]): Promise<LoraAdapter> {
  const { init, seed, batchSize, initBatches } = options;
  const batches = calibrationBatches(model, rows, { batchSize, batches: initBatches });
  try {
    if (init === "eva") return await attachEva(model, loraConfig(options), batches, { seed });
    const adapter = attachLora(model, loraConfig(options), seed);
    await initLoraGa(adapter, batches, { seed });
    return adapter;
  } finally {
    for (const batch of batches) batch.destroy();
  }
}
