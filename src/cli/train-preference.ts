/** `train --preference`: pairs of answers, of which one is preferred. */
import type { Gpu } from "../gpu/gpu.ts";
import { loraFa } from "../lora/lora-fa.ts";
import { loadModelFrom } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { batchesPerEpoch } from "../train/batches.ts";
import type { DataStats, PreferencePair } from "../train/data.ts";
import { evaluatePreferences, type PreferenceEvaluation, preferenceTask, withReference } from "../train/preference.ts";
import { keepsTwice, plannedConfig, weightFormat } from "./options.ts";
import { demandFit } from "./plan.ts";
import type { SaidCommand } from "./run-config.ts";
import { bitsLine, bytes, dataLine, deviceName, number, readPreferences, say, withGpu } from "./session.ts";
import type { TrainArguments } from "./train.ts";
import { writeDocuments } from "./train-documents.ts";
import { readValidation, sampler, startAdapter, type TrainedParts } from "./train-language.ts";
import { report, runFacts } from "./train-report.ts";
import { begin, keptSettings } from "./train-resume.ts";
import { runTraining } from "./train-run.ts";
import { version } from "./version.ts";

type Arguments = TrainArguments & { readonly baseModel: string };

export async function trainPreference(given: Arguments, said: SaidCommand): Promise<void> {
  refuseWith(given);
  const options = { ...given, beta: given.beta ?? 0.1, labelSmoothing: given.labelSmoothing ?? 0 };
  const { batchSize, gradAccumulation, seed, budget } = options;
  const read = await readPreferences(options.model, options.data, options.maxLength, options);
  const { rows: pairs, stats, maxLength } = read;
  say(dataLine(stats, maxLength, "pairs"));
  const validPairs = await readValidation(readPreferences, options, read.valid, maxLength);
  const perEpoch = batchesPerEpoch({ rows: pairs.length, batchSize });
  const steps = options.steps ?? Math.ceil(((options.epochs ?? 1) * perEpoch) / gradAccumulation);
  const warmupSteps = Math.ceil(options.warmup * steps);
  const settings = await keptSettings(options, { steps, warmupSteps, rows: pairs });
  const { dryRun = false } = options;
  const saved = dryRun ? undefined : await begin(options.out, options.resume ?? false, settings, version());

  const work = async (gpu: Gpu): Promise<void> => {
    const started = performance.now();
    const plan = await planned(gpu, options, pairs);
    const model = await loadModelFrom(gpu, options.model, { weights: weightFormat(options.quantize) });
    model.checkpointing = options.checkpointing ?? false;
    const adapter = await startAdapter(model, options, [], saved);
    const trained: TrainedParts = options.loraFa ? await loraFa(adapter) : { parameters: adapter.parameters };
    const trainable = trained.parameters.reduce((sum, p) => sum + p.size, 0);
    say(
      `adapter: rank ${adapter.config.r}, ${number(trainable)} parameters to train; the reference is the model without it`,
    );
    if (dryRun) {
      say(
        `dry run: ${number(steps)} steps of ${number(batchSize * gradAccumulation)} pairs would follow. Nothing was written`,
      );
      return;
    }
    const rows = await withReference(model, adapter, pairs, batchSize);
    const valid = validPairs && (await withReference(model, adapter, validPairs, batchSize));
    let measured: PreferenceEvaluation | undefined;
    const { first, last, interrupted, skipped } = await runTraining({
      ...options,
      ...{ ...trained, task: preferenceTask(model, options), adapter, rows, steps, warmupSteps, settings, saved },
      sample: options.samplePrompt && (await sampler(model, options.model, options.samplePrompt)),
      rates: options.loraplusLrRatio === undefined ? undefined : adapter.rates(options.loraplusLrRatio),
      shuffleSeed: options.shuffle ? seed : undefined,
      validation: valid && {
        every: options.validEvery ?? Math.ceil(steps / 10),
        evaluate: async () => {
          measured = await evaluatePreferences(model, valid, batchSize, options.beta);
          return measured;
        },
        patience: options.patience,
      },
    });
    if (interrupted) process.exitCode = 130;
    if (measured) say(measuredLine(measured));
    const seconds = (performance.now() - started) / 1000;
    const peak = gpu.counters().bytesPeak;
    await writeDocuments({
      ...{ out: options.out, adapter, baseModel: options.baseModel, said, tensorboard: options.tensorboard ?? false },
      facts: (metrics) => runFacts({ adapter, trainable, seconds, device: deviceName(gpu.info) }, metrics),
      tables: {
        Data: dataFacts(stats),
        "GPU memory": [
          ["planned at most", bytes(plan.peak)],
          ["peak", bytes(peak)],
        ],
      },
    });
    report(gpu, options.json ?? false, {
      ...{ steps: last?.step ?? saved?.step ?? 0, loss_first: first?.loss ?? null, loss_last: last?.loss ?? null },
      loss_valid: last?.validation?.loss ?? null,
      ...(measured && { accuracy_valid: measured.accuracy, margin_valid: measured.margin }),
      ...{ out: options.out, interrupted, rows: stats.rows, truncated: stats.truncated, dropped: stats.dropped },
      ...{ tokens: stats.tokens, trainable_parameters: trainable, peak_bytes: peak, planned_bytes: plan.peak },
      ...{ skipped_steps: skipped, seconds },
    });
  };
  await withGpu(work, budget === undefined ? {} : { budgetBytes: budget });
}

/** Throws ShapeError for options that pairs have no use for. */
function refuseWith({ packing, lossOn, init }: Arguments): void {
  const isByData = init === "eva" || init === "lora_ga" || init === "loftq";
  const refused = { "--packing": packing, "--loss-on": lossOn, ...(isByData && { [`--init ${init}`]: init }) };
  for (const [flag, value] of Object.entries(refused))
    if (value !== undefined) throw new ShapeError(`train: ${flag} cannot go with --preference. Leave it out`);
}

/** What the run takes, said, if it fits. */
async function planned(gpu: Gpu, options: Arguments, pairs: readonly PreferencePair[]) {
  const { batchSize, gradAccumulation, checkpointing = false, loraFa: isFa = false } = options;
  const lengths = pairs.flatMap(({ chosen, rejected }) => [chosen.inputIds.length, rejected.inputIds.length]);
  const size = {
    ...{ batchSize: Math.min(batchSize, pairs.length), gradAccumulation, checkpointing, loraFa: isFa },
    takesFromBase: keepsTwice(options),
    weights: weightFormat(options.quantize),
    maxLength: lengths.reduce((most, length) => Math.max(most, length), 0),
    preference: true,
  };
  const plan = await demandFit(gpu, options.model, options.initAdapter ?? plannedConfig(options), size, options.budget);
  say(
    `memory: at most ${bytes(plan.peak)} of the GPU's, ${bytes(plan.weights)} of it weights, ${bitsLine(plan.bits)}; what the reference, evaluations and samples take is not in it`,
  );
  return plan;
}

const measuredLine = ({ pairs, accuracy, margin }: PreferenceEvaluation): string =>
  `of ${number(pairs)} pairs not trained on, in ${number(100 * accuracy, 1)} % the chosen answer gained on the rejected one; by ${number(margin, 3)} on average`;

const dataFacts = (stats: DataStats): [string, string][] => [
  ["pairs", number(stats.rows)],
  ["truncated", number(stats.truncated)],
  ["dropped", number(stats.dropped)],
  ["tokens", number(stats.tokens)],
  ["of them learned", number(stats.trainedTokens)],
];
