/** `train --preference`: pairs of answers, of which one is preferred. */
import type { Gpu } from "../gpu/gpu.ts";
import { loraFa } from "../lora/lora-fa.ts";
import { loadModelFrom } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { longest } from "../train/batches.ts";
import type { PreferencePair } from "../train/data.ts";
import { evaluatePreferences, type PreferenceEvaluation, preferenceTask, withReference } from "../train/preference.ts";
import { keepsTwice, plannedConfig, trainedFormat } from "./options.ts";
import { demandFit, type RunSize } from "./plan.ts";
import type { SaidCommand } from "./run-config.ts";
import { bitsLine, bytes, dataLine, number, readPreferences, say, withGpu } from "./session.ts";
import { follow, type LocatedArguments, stepsOf, type TrainedParts } from "./train-course.ts";
import { dataFacts, readPrompts, readValidation, sampler, samplesOf, startAdapter } from "./train-language.ts";
import { begin, keptSettings } from "./train-resume.ts";
import { version } from "./version.ts";

export async function trainPreference(given: LocatedArguments, said: SaidCommand): Promise<void> {
  refuseWith(given);
  const options = { ...given, beta: given.beta ?? 0.1, labelSmoothing: given.labelSmoothing ?? 0 };
  const { batchSize, gradAccumulation, budget } = options;
  const read = await readPreferences(options.model, options.data, options.maxLength, options);
  const { rows: pairs, stats, maxLength } = read;
  say(dataLine(stats, maxLength, "pairs"));
  const validPairs = await readValidation(readPreferences, options, read.valid, maxLength);
  const { steps, warmupSteps } = stepsOf(options, pairs.length);
  const settings = await keptSettings(options, { steps, warmupSteps, rows: pairs });
  const prompts = await readPrompts(options);
  const evaluation = validPairs && {
    batchSize: Math.min(batchSize, validPairs.length),
    maxLength: longestOf(validPairs),
  };

  const work = async (gpu: Gpu): Promise<void> => {
    const started = performance.now();
    const plan = await planned(gpu, options, pairs, { evaluation, samples: samplesOf(prompts) });
    const { dryRun = false } = options;
    const saved = await begin(options, settings, version());
    const model = await loadModelFrom(gpu, options.model, { weights: trainedFormat(options) });
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
    await follow(
      {
        ...{ options, said, gpu, started, adapter, trained, task: preferenceTask(model, options) },
        ...{ rows, steps, warmupSteps, settings, saved, stats, planned: plan.peak },
        evaluate:
          valid &&
          (async () => {
            measured = await evaluatePreferences(model, valid, batchSize, options.beta);
            return measured;
          }),
        sample: prompts && sampler(model, prompts),
        data: dataFacts(stats, "pairs"),
      },
      (isOfLast) => {
        if (!measured || !isOfLast) return {};
        say(measuredLine(measured));
        return { margin_valid: measured.margin };
      },
    );
  };
  await withGpu(work, budget === undefined ? {} : { budgetBytes: budget });
}

/** Throws ShapeError for options that pairs have no use for. */
function refuseWith({ packing, lossOn, init, neftuneAlpha, labelSmoothing = 0 }: LocatedArguments): void {
  const isByData = init === "eva" || init === "lora_ga" || init === "loftq";
  const refused = {
    "--packing": packing,
    "--loss-on": lossOn,
    "--neftune-alpha": neftuneAlpha,
    ...(isByData && { [`--init ${init}`]: init }),
  };
  for (const [flag, value] of Object.entries(refused))
    if (value !== undefined) throw new ShapeError(`train: ${flag} cannot go with --preference. Leave it out`);
  if (labelSmoothing >= 0.5)
    throw new ShapeError(`train: --label-smoothing of pairs must be below 0.5, got ${labelSmoothing}`);
}

/** What the run takes, said, if it fits. */
async function planned(
  gpu: Gpu,
  options: LocatedArguments,
  pairs: readonly PreferencePair[],
  between: Pick<RunSize, "evaluation" | "samples">,
) {
  const { batchSize, gradAccumulation, checkpointing = false, loraFa: isFa = false } = options;
  const size = {
    ...{ batchSize: Math.min(batchSize, pairs.length), gradAccumulation, checkpointing, loraFa: isFa },
    takesFromBase: keepsTwice(options),
    weights: trainedFormat(options),
    maxLength: longestOf(pairs),
    preference: true,
    ...between,
  };
  const plan = await demandFit(gpu, options.model, options.initAdapter ?? plannedConfig(options), size, options.budget);
  say(`memory: at most ${bytes(plan.peak)} of the GPU's, ${bytes(plan.weights)} of it weights, ${bitsLine(plan.bits)}`);
  return plan;
}

const longestOf = (pairs: readonly PreferencePair[]): number =>
  longest(pairs.flatMap(({ chosen, rejected }) => [chosen, rejected]));

const measuredLine = ({ pairs, accuracy, margin }: PreferenceEvaluation): string =>
  `of ${number(pairs)} pairs not trained on, in ${number(100 * accuracy, 1)} % the chosen answer gained on the rejected one; by ${number(margin, 3)} on average`;
