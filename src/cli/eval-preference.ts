/** `eval --preference`: how well an adapter tells chosen from rejected answers, against the model without it. */
import { loadModelFrom } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { evaluatePreferences, withReference } from "../train/preference.ts";
import type { EvalArguments } from "./eval.ts";
import { weightFormat } from "./options.ts";
import { evaluatedLine } from "./progress.ts";
import { dataLine, number, openPeft, readPreferences, result, say, withGpu } from "./session.ts";

export async function evalPreference(options: EvalArguments): Promise<void> {
  const { model: path, adapter, data, batchSize, beta, againstF32, lossOn, laplace, json } = options;
  for (const [flag, value] of Object.entries({
    "--laplace": laplace,
    "--against-f32": againstF32,
    "--loss-on": lossOn,
  }))
    if (value !== undefined) throw new ShapeError(`eval: ${flag} cannot go with --preference. Leave it out`);
  if (adapter === undefined)
    throw new ShapeError("eval: --preference compares an --adapter with the model without it, got none. Give it");
  const where = { ...options, splits: ["test", "valid"] as const };
  const { rows: pairs, stats, maxLength } = await readPreferences(path, data, options.maxLength, where);
  say(dataLine(stats, maxLength, "pairs"));
  await withGpu(async (gpu) => {
    const model = await loadModelFrom(gpu, path, { weights: weightFormat(options.quantize) });
    const rows = await withReference(model, await openPeft(model, adapter), pairs, batchSize);
    const found = await evaluatePreferences(model, rows, batchSize, beta);
    if (json) result(JSON.stringify(found));
    else result(`${evaluatedLine(found)}, margin ${found.margin.toFixed(4)} over ${number(found.pairs)} pairs`);
  });
}
