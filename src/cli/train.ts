import { join } from "node:path";
import { Command, Option } from "commander";
import type { Gpu } from "../gpu/gpu.ts";
import { attachLora, type LoraAdapter } from "../lora/adapter.ts";
import { initLora, takesFromBase } from "../lora/init.ts";
import type { CausalModel } from "../models/causal.ts";
import {
  appendLine,
  ensureWritableDirectory,
  loadModelFrom,
  loadPeftFrom,
  savePeftTo,
  writeFileAtomic,
} from "../node.ts";
import { batchesPerEpoch, longest } from "../train/batches.ts";
import { byKernel, chromeTrace, type ProfiledDispatch, profileTable } from "../train/profile.ts";
import { profilePage } from "../train/profile-page.ts";
import type { Schedule } from "../train/schedule.ts";
import type { StepMetrics } from "../train/step-metrics.ts";
import { train } from "../train/trainer.ts";
import {
  amount,
  dataOption,
  jsonOption,
  LORA_OPTIONS,
  type LoraArguments,
  loraConfig,
  loraOptions,
  maxLengthOption,
  modelOption,
  numeric,
  quantizeOption,
  revisionOption,
  stepOptions,
  weightFormat,
  whole,
} from "./options.ts";
import { located } from "./places.ts";
import { budgetOption, demandFit } from "./plan.ts";
import { Progress } from "./progress.ts";
import { bytes, dataLine, deviceName, number, readData, result, say, withGpu } from "./session.ts";

interface TrainArguments extends LoraArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly data: string;
  readonly out: string;
  readonly steps?: number;
  readonly epochs?: number;
  readonly batchSize: number;
  readonly gradAccumulation: number;
  readonly learningRate: number;
  readonly schedule: Schedule;
  readonly warmup: number;
  readonly weightDecay: number;
  readonly loraplusLrRatio?: number;
  readonly maxGradNorm: number;
  readonly maxLength?: number;
  readonly seed: number;
  readonly shuffle: boolean;
  readonly tune?: boolean;
  readonly initAdapter?: string;
  readonly checkpointing?: boolean;
  readonly budget?: number;
  readonly saveEvery?: number;
  readonly profile?: boolean;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank train --model models/base --data train.jsonl --out adapters/pirate
  $ lowrank train --model HuggingFaceTB/SmolLM2-135M --data train.jsonl --out adapters/smol
  $ lowrank train --model models/base --data train.jsonl --out adapters/more --init-adapter adapters/pirate --steps 200
  $ lowrank train --model models/base --data train.jsonl --out adapters/qv --target-modules q_proj,v_proj --rank 8 --alpha 16
  $ lowrank train --model models/base --data train.jsonl --out adapters/top --target-modules '/model\\.layers\\.[23]\\..*/'

Ctrl-C ends training after the step in progress and saves the adapter; a second one quits at once.`;

export function trainCommand(): Command {
  const name = "train";
  const command = new Command(name)
    .description("fine-tune a LoRA adapter")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(dataOption())
    .requiredOption("--out <dir>", "where adapter_model.safetensors, adapter_config.json and metrics.jsonl go")
    .addOption(whole(name, "--steps <n>", "optimizer steps", 1).conflicts("epochs"))
    .addOption(whole(name, "--epochs <n>", "times to go through the data (default: 1)", 1))
    .addOption(amount(name, "--learning-rate <x>", "peak learning rate", 2e-4))
    .addOption(
      new Option("--schedule <name>", "course of the learning rate after warmup")
        .choices(["linear", "cosine", "constant"])
        .default("linear"),
    )
    .addOption(
      numeric(name, "--warmup <fraction>", "share of the steps over which the learning rate rises from 0", {
        rule: "a fraction from 0 to 1",
        holds: (x) => x >= 0 && x <= 1,
        preset: 0.03,
      }),
    )
    .addOption(amount(name, "--weight-decay <x>", "decoupled weight decay", 0))
    .addOption(
      numeric(name, "--loraplus-lr-ratio <x>", "B learns so many times as fast as A (LoRA+)", {
        rule: "a number above 0",
        holds: (x) => x > 0 && Number.isFinite(x),
      }),
    )
    .addOption(amount(name, "--max-grad-norm <x>", "scale gradients down to this norm; 0: never", 1))
    .addOption(maxLengthOption(name))
    .addOption(whole(name, "--seed <n>", "seed of the adapter's start, of the order of the rows and of dropout", 0, 0))
    .option("--no-shuffle", "keep the order of the file")
    .option("--tune", "first time the kernels on this device and keep the fastest for all later runs")
    .addOption(
      new Option(
        "--init-adapter <place>",
        "go on from this adapter: a directory, or org/name[@revision] on the Hub",
      ).conflicts(LORA_OPTIONS),
    )
    .addOption(whole(name, "--save-every <n>", "save the adapter after every so many steps, too", 1))
    .option(
      "--profile",
      "time the kernels of step 3 (or the last) and write profile.txt, .html and .trace.json to --out",
    )
    .addOption(jsonOption());
  for (const option of [...loraOptions(name), ...stepOptions(name), budgetOption(name)]) command.addOption(option);
  return command.addHelpText("after", EXAMPLES).action(run);
}

async function run(given: TrainArguments): Promise<void> {
  await ensureWritableDirectory(given.out);
  const options = await located(given);
  const { rows, stats, maxLength } = await readData(options.model, options.data, options.maxLength);
  say(dataLine(stats, maxLength));
  const { batchSize, gradAccumulation, seed } = options;
  const perEpoch = batchesPerEpoch({ rows: rows.length, batchSize });
  const steps = options.steps ?? Math.ceil(((options.epochs ?? 1) * perEpoch) / gradAccumulation);

  const { checkpointing = false, saveEvery } = options;
  const adapterPlan = options.initAdapter ?? loraConfig(options);
  const size = {
    batchSize: Math.min(batchSize, rows.length),
    gradAccumulation,
    checkpointing,
    takesFromBase: takesFromBase(options.init),
    weights: weightFormat(options.quantize),
    maxLength: longest(rows),
  };

  const work = async (gpu: Gpu): Promise<void> => {
    const plan = await demandFit(gpu, options.model, adapterPlan, size, options.budget);
    say(`memory: at most ${bytes(plan.peak)} of the GPU's, ${bytes(plan.weights)} of it weights`);
    const model = await loadModelFrom(gpu, options.model, { weights: size.weights });
    model.checkpointing = checkpointing;
    const adapter = await startAdapter(model, options);
    const { parameters } = adapter;
    const trainable = parameters.reduce((sum, p) => sum + p.size, 0);
    say(`adapter: rank ${adapter.config.r} on ${adapter.pairs.size} layers, ${number(trainable)} parameters to train`);
    const metricsFile = join(options.out, "metrics.jsonl");
    await writeFileAtomic(metricsFile, "");

    const started = performance.now();
    const progress = new Progress(steps);
    const stop = new AbortController();
    // Once: a second Ctrl-C finds the default again, which quits.
    const onInterrupt = (): void => {
      progress.end();
      say("stopping after the step in progress; Ctrl-C again quits at once without saving");
      stop.abort();
    };
    process.once("SIGINT", onInterrupt);
    let first: StepMetrics | undefined;
    let last: StepMetrics | undefined;
    let saved: number | undefined;
    const profiles: ProfiledDispatch[] = [];
    let good: number | undefined;
    let skipped = 0;
    const save = async (): Promise<string> => {
      if (!good) return "no step is known to be done: no adapter was saved";
      await savePeftTo(adapter, options.out, options.baseModel);
      return `the adapter of step ${good} is saved in ${options.out}`;
    };
    try {
      const training = train({
        model,
        parameters,
        adapter,
        seed,
        rows,
        steps,
        batchSize,
        gradAccumulation,
        learningRate: options.learningRate,
        schedule: options.schedule,
        warmupSteps: Math.ceil(options.warmup * steps),
        weightDecay: options.weightDecay,
        rates: options.loraplusLrRatio === undefined ? undefined : adapter.rates(options.loraplusLrRatio),
        maxGradNorm: options.maxGradNorm,
        shuffleSeed: options.shuffle ? seed : undefined,
        signal: stop.signal,
        pauseEvery: saveEvery,
        profile: options.profile
          ? { step: Math.min(3, steps), onProfile: (found) => void profiles.push(...found) }
          : undefined,
        tune: options.tune ?? false,
        onTuned: ({ key, chosen, timesMs }) =>
          say(`tuned ${key}: ${chosen}, ${timesMs[chosen]?.toPrecision(2)} ms, of ${Object.keys(timesMs).length} ways`),
      });
      for await (const metrics of training) {
        first ??= metrics;
        last = metrics;
        await appendLine(metricsFile, JSON.stringify(metrics));
        progress.show(metrics);
        if (metrics.skipped) skipped++;
        else good = metrics.step;
        if (saveEvery && metrics.step % saveEvery === 0 && metrics.step < steps) {
          await savePeftTo(adapter, options.out, options.baseModel);
          saved = metrics.step;
        }
      }
      progress.end();
      say(await save());
      if (options.profile) await writeProfile(profiles, options.out, deviceName(gpu.info));
    } catch (error) {
      progress.end();
      say(await save().catch(() => lost(saved, options.out)));
      throw error;
    } finally {
      process.off("SIGINT", onInterrupt);
    }

    const interrupted = (last?.step ?? 0) < steps;
    if (interrupted) process.exitCode = 130;
    report(gpu, options, {
      steps: last?.step ?? 0,
      loss_first: first?.loss ?? null,
      loss_last: last?.loss ?? null,
      out: options.out,
      interrupted,
      rows: stats.rows,
      truncated: stats.truncated,
      dropped: stats.dropped,
      tokens: stats.tokens,
      trainable_parameters: trainable,
      peak_bytes: gpu.counters().bytesPeak,
      planned_bytes: plan.peak,
      skipped_steps: skipped,
      seconds: (performance.now() - started) / 1000,
    });
  };
  await withGpu(work, options.budget === undefined ? {} : { budgetBytes: options.budget });
}

async function writeProfile(profile: readonly ProfiledDispatch[], out: string, device: string): Promise<void> {
  const kernels = byKernel(profile);
  const table = profileTable(kernels);
  await writeFileAtomic(join(out, "profile.txt"), `${table}\n`);
  await writeFileAtomic(join(out, "profile.trace.json"), chromeTrace(profile));
  await writeFileAtomic(join(out, "profile.html"), profilePage(kernels, `A training step on ${device}`));
  say(`${table}\nthe profile is in ${join(out, "profile.txt")}, .html and .trace.json`);
}

/** What is left when the device is gone, and how to go on. */
const lost = (saved: number | undefined, out: string): string =>
  saved === undefined
    ? "the adapter could not be saved: what was trained is lost. Use --save-every to keep some of it"
    : `the adapter of step ${saved} is in ${out}, whole. Go on from it with --init-adapter ${out}`;

async function startAdapter(model: CausalModel, options: TrainArguments): Promise<LoraAdapter> {
  const { initAdapter, init, seed } = options;
  if (initAdapter !== undefined) return loadPeftFrom(model, initAdapter);
  const adapter = attachLora(model, loraConfig(options), seed);
  if (init !== undefined) await initLora(adapter, init, seed);
  return adapter;
}

interface Outcome {
  readonly steps: number;
  readonly loss_first: number | null;
  readonly loss_last: number | null;
  readonly out: string;
  readonly interrupted: boolean;
  readonly rows: number;
  readonly truncated: number;
  readonly dropped: number;
  /** Of the data, once through. */
  readonly tokens: number;
  readonly trainable_parameters: number;
  readonly peak_bytes: number;
  readonly planned_bytes: number;
  /** Steps whose loss or gradient was not finite. */
  readonly skipped_steps: number;
  readonly seconds: number;
}

function report(gpu: Gpu, { json }: TrainArguments, outcome: Outcome): void {
  if (json) {
    result(JSON.stringify({ ...outcome, device: deviceName(gpu.info), software: gpu.isSoftware }));
    return;
  }
  const { steps, loss_first, loss_last, seconds, peak_bytes } = outcome;
  const course = `loss ${loss_first?.toFixed(4) ?? "none"} → ${loss_last?.toFixed(4) ?? "none"}`;
  result(`${number(steps)} steps in ${number(seconds, 1)} s, ${course}, at most ${bytes(peak_bytes)} of GPU memory`);
}
