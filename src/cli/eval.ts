import { Command } from "commander";
import type { CausalModel } from "../models/causal.ts";
import { isClassifier } from "../models/config.ts";
import { bitsPerWeight, type WeightFormat } from "../models/weights.ts";
import { diskDirectory, loadModelFrom } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import type { Row } from "../train/data.ts";
import { bestPrecision } from "../train/laplace.ts";
import { languageCurvature, predictTokens } from "../train/laplace-language.ts";
import { evaluate } from "../train/loss.ts";
import { calibrationMetrics } from "../train/metrics.ts";
import { evalClassifier } from "./eval-classifier.ts";
import { evalPreference } from "./eval-preference.ts";
import {
  type Calibration,
  calibrationOf,
  demandAdapter,
  type LaplaceArguments,
  laplaceOptions,
  showCalibration,
} from "./laplace.ts";
import {
  adapterOption,
  dataOption,
  jsonOption,
  maxLengthOption,
  modelOption,
  numLabelsOption,
  preferenceOptions,
  quantizeOption,
  type RowArguments,
  revisionOption,
  rowOptions,
  weightFormat,
  whole,
} from "./options.ts";
import { located, readAnyConfig } from "./places.ts";
import { bitsLine, dataLine, number, openPeft, readData, result, say, withGpu } from "./session.ts";

export interface EvalArguments extends LaplaceArguments, RowArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly againstF32?: boolean;
  readonly adapter?: string;
  readonly data: string;
  readonly batchSize: number;
  readonly maxLength?: number;
  readonly json?: boolean;
  readonly numLabels?: number;
  readonly preference?: "dpo";
  readonly beta?: number;
}

const EXAMPLES = `
Examples:
  $ lowrank eval --model models/base --data valid.jsonl
  $ lowrank eval --model models/base --adapter adapters/pirate --data valid.jsonl --json
  $ lowrank eval --model models/base --data valid.jsonl --quantize nf4 --against-f32
  $ lowrank eval --model models/base --adapter adapters/pirate --data valid.jsonl --laplace train.jsonl
  $ lowrank eval --model models/base --adapter adapters/kind --data pairs.jsonl --preference dpo
  $ lowrank eval --model google-bert/bert-base-uncased --num-labels 2 --adapter adapters/classes --data rows.jsonl`;

export function evalCommand(): Command {
  const command = new Command("eval")
    .description(
      "mean loss, perplexity and accuracy over the tokens to learn of a data file; of a classifier, loss, accuracy and F1; of pairs, how many are told apart",
    )
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .option("--against-f32", "beside the loss of quantised weights, that of the same weights unquantised")
    .addOption(adapterOption())
    .addOption(dataOption())
    .addOption(whole("eval", "--batch-size <n>", "rows of one forward pass", 1, 4))
    .addOption(maxLengthOption("eval"))
    .addOption(numLabelsOption("eval"))
    .addOption(jsonOption());
  for (const option of [...rowOptions(), ...preferenceOptions("eval"), ...laplaceOptions("eval")])
    command.addOption(option);
  return command.addHelpText("after", EXAMPLES).action(run);
}

async function run(given: EvalArguments): Promise<void> {
  const { quantize, againstF32 = false } = given;
  if (againstF32 && !quantize)
    throw new ShapeError("eval: --against-f32 must go with --quantize, got none. There is nothing to compare");
  const options = await located(given, true, readAnyConfig);
  if (await isClassifier(diskDirectory(options.model))) return evalClassifier(options);
  if (options.numLabels !== undefined)
    throw new ShapeError("eval: --num-labels is for encoders with a classifier. Leave it out");
  if (options.preference) return evalPreference(options);
  if (options.beta !== undefined) throw new ShapeError("eval: --beta goes with --preference. Add it, or leave it out");
  const { model: path, adapter, data, batchSize, maxLength: limit, json } = options;
  const { rows, stats, maxLength } = await readData(path, data, limit, { ...options, splits: ["test", "valid"] });
  say(dataLine(stats, maxLength));
  if (options.laplace !== undefined) demandAdapter(adapter);
  const seen = options.laplace === undefined ? undefined : (await readData(path, options.laplace, limit, options)).rows;
  await withGpu(async (gpu) => {
    const measured = async (weights: WeightFormat, isAsked: boolean) => {
      const model = await loadModelFrom(gpu, path, { weights });
      const lora = adapter === undefined ? undefined : await openPeft(model, adapter);
      const evaluation = await evaluate(model, rows, batchSize);
      const laplace = isAsked && seen && lora ? await measure(model, lora.parameters, seen, rows, options) : undefined;
      const bits = bitsPerWeight(model);
      model.destroy();
      return { ...evaluation, bits, laplace };
    };
    const { loss, perplexity, accuracy, tokens, bits, laplace } = await measured(weightFormat(quantize), true);
    const unquantized = againstF32 ? (await measured("stored", false)).loss : undefined;
    if (json) {
      const unquantized_loss = unquantized !== undefined && { unquantized_loss: unquantized };
      result(
        JSON.stringify({
          loss,
          perplexity,
          accuracy,
          tokens,
          bits_per_weight: bits,
          ...unquantized_loss,
          ...(laplace && { laplace }),
        }),
      );
      return;
    }
    say(`weights: ${bitsLine(bits)}`);
    result(
      `loss ${loss.toFixed(4)}, perplexity ${perplexity.toFixed(3)}, accuracy ${number(100 * accuracy, 2)} % over ${number(tokens)} tokens`,
    );
    if (unquantized !== undefined)
      result(`loss ${unquantized.toFixed(4)} unquantised: quantising adds ${(loss - unquantized).toFixed(4)}`);
    if (laplace) showCalibration(laplace);
  });
}

/**
 * Calibration over the target tokens. The marginal likelihood rests on all directions of the parameters, of which a language model has many
 * more than are told apart, so it says too little here: `auto` takes every second row of the data to choose the prior's precision
 * by their NLL, from there upwards in steps of 10, and measures on the others.
 */
async function measure(
  model: CausalModel,
  parameters: readonly Tensor[],
  seen: readonly Row[],
  rows: readonly Row[],
  options: EvalArguments,
): Promise<Calibration> {
  const { batchSize, samples, seed, priorPrecision } = options;
  const held = priorPrecision === "auto" ? rows.filter((_, i) => i % 2 === 0) : rows;
  const choosing = rows.filter((_, i) => i % 2 === 1);
  if (priorPrecision === "auto" && choosing.length === 0)
    throw new ShapeError("eval: --prior-precision auto needs two rows of --data, got one. Give a number");
  const curvature = await languageCurvature(model, parameters, seen, { seed });
  const drawn = { batchSize, seed, ...(samples !== undefined && { samples }) };
  const predict = (tau: number, those: readonly Row[]) => predictTokens(model, curvature, tau, those, drawn);
  const nllAt = async (tau: number): Promise<number> => calibrationMetrics((await predict(tau, choosing)).laplace).nll;
  return calibrationOf(
    curvature,
    priorPrecision === "auto" ? () => rising(bestPrecision(curvature), nllAt) : priorPrecision,
    (tau) => predict(tau, held),
  );
}

/** The first of start, 10·start, 100·start… whose successor is no better. */
async function rising(start: number, nllAt: (tau: number) => Promise<number>): Promise<number> {
  let [tau, nll] = [start, await nllAt(start)];
  for (;;) {
    const next = await nllAt(10 * tau);
    if (!(next < nll - 1e-4)) return tau;
    [tau, nll] = [10 * tau, next];
  }
}
