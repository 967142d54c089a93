/** `eval` for encoders with a classifier. */
import type { BertClassifier } from "../models/bert.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type ClassificationRow, classifierLogits } from "../train/classify.ts";
import { bestPrecision } from "../train/laplace.ts";
import { classifierCurvature, predictClasses, softmax } from "../train/laplace-classify.ts";
import { classificationMetrics, type Prediction, predictionOf } from "../train/metrics.ts";
import { openClassifier, readClassRows, refuse } from "./classifiers.ts";
import type { EvalArguments } from "./eval.ts";
import { type Calibration, calibrationOf, demandAdapter, showCalibration } from "./laplace.ts";
import { number, openPeft, result, withGpu } from "./session.ts";

export async function evalClassifier(options: EvalArguments): Promise<void> {
  const { adapter: path, numLabels, json, batchSize } = options;
  refuse("eval", {
    ...{ "--quantize": options.quantize, "--loss-on": options.lossOn },
    ...{ "--preference": options.preference, "--beta": options.beta },
    ...{ "--chat-template": options.chatTemplate, "--prompt-separator": options.promptSeparator },
  });
  if (numLabels !== undefined && path === undefined)
    throw new ShapeError(
      "eval: --num-labels makes a new classifier, which an --adapter has to fill, got none. Give it",
    );
  if (options.laplace !== undefined) demandAdapter(path);
  const seen = options.laplace === undefined ? undefined : (await readClassRows(options, options.laplace)).rows;
  const { rows } = await readClassRows(options, options.data);
  await withGpu(async (gpu) => {
    const model = await openClassifier(gpu, options, 0);
    const adapter = path === undefined ? undefined : await openPeft(model, path);
    const logits = await classifierLogits(model, rows, batchSize);
    const labels = rows.map(({ label }) => label);
    const { macroF1, ...metrics } = classificationMetrics(logits, labels, model.config.labels.length);
    const laplace = seen && adapter && (await measure(model, adapter.parameters, seen, rows, options));
    if (json) {
      result(JSON.stringify({ ...metrics, macro_f1: macroF1, rows: rows.length, ...(laplace && { laplace }) }));
      return;
    }
    const { loss, accuracy, f1, auc } = metrics;
    const binary = `${f1 === undefined ? "" : `, F1 ${f1.toFixed(4)}`}${auc === undefined ? "" : `, AUC ${auc.toFixed(4)}`}`;
    result(
      `loss ${loss.toFixed(4)}, accuracy ${accuracy.toFixed(4)}, macro F1 ${macroF1.toFixed(4)}${binary} over ${number(rows.length)} rows`,
    );
    if (laplace) showCalibration(laplace);
  });
}

async function measure(
  model: BertClassifier,
  parameters: readonly Tensor[],
  seen: readonly ClassificationRow[],
  rows: readonly ClassificationRow[],
  options: EvalArguments,
): Promise<Calibration> {
  const { batchSize, samples, seed, priorPrecision } = options;
  const C = model.config.labels.length;
  const predictionsOf = (probabilities: readonly number[][]): Prediction[] =>
    probabilities.map((p, n) => predictionOf(p, rows[n]?.label ?? -1));
  const curvature = await classifierCurvature(model, parameters, seen);
  const precision = priorPrecision === "auto" ? () => bestPrecision(curvature) : priorPrecision;
  return calibrationOf(curvature, precision, async (tau) => {
    const logits = await classifierLogits(model, rows, batchSize);
    const plain = rows.map((_, n) => softmax(logits.slice(n * C, (n + 1) * C)));
    const drawn = { batchSize, seed, ...(samples !== undefined && { samples }) };
    const laplace = await predictClasses(model, curvature, tau, rows, drawn);
    return { plain: predictionsOf(plain), laplace: predictionsOf(laplace) };
  });
}
