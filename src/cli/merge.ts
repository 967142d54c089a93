import { Command, Option } from "commander";
import type { FloatDtype } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import type { CausalModel } from "../models/causal.ts";
import { ensureWritableDirectory, loadModelFrom, saveModelTo } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { read, tensor } from "../tensor/tensor.ts";
import { adapterOption, jsonOption, modelOption, revisionOption } from "./options.ts";
import { demandAnother, located } from "./places.ts";
import { openPeft, result, say, withGpu } from "./session.ts";

interface MergeArguments {
  readonly model: string;
  readonly revision?: string;
  readonly adapter: string;
  readonly dtype?: "f32" | "f16" | "bf16";
  readonly out: string;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank merge --model models/base --adapter adapters/pirate --out models/pirate
  $ lowrank merge --model models/base-nf4 --adapter adapters/pirate --out models/pirate-bf16 --dtype bf16

A base in bitsandbytes' NF4 gives a model in NF4: its merged weights are quantised again, which loses some of the adapter. With --dtype nothing is
quantised again.`;

export function mergeCommand(): Command {
  return new Command("merge")
    .description("write the model with an adapter merged into its weights, as a Hugging Face directory")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(adapterOption().makeOptionMandatory())
    .requiredOption("--out <dir>", "directory of the merged model")
    .addOption(
      new Option("--dtype <type>", "write all weights in this type (default: each as the base has it)").choices([
        "f32",
        "f16",
        "bf16",
      ]),
    )
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

/**
 * Largest difference of a logit that rounding may cause, relative to the largest logit (or 1): some roundings of f32 sums, those of every
 * merged weight to the 11 bits of f16 or the 8 of bf16, with room for the depth of a model, or NF4's, which are up to 15 % of the largest of 64.
 */
const TOLERANCES: Readonly<Record<FloatDtype | "NF4", number>> = { F32: 1e-4, F16: 1e-2, BF16: 5e-2, NF4: 0.5 };
const DTYPES = { f32: "F32", f16: "F16", bf16: "BF16" } as const;

async function run(options: MergeArguments): Promise<void> {
  demandAnother("merge", options);
  const { model: path, adapter: adapterPath, out, json } = await located(options);
  await ensureWritableDirectory(out);
  await withGpu(async (gpu) => {
    const model = await loadModelFrom(gpu, path);
    const adapter = await openPeft(model, adapterPath);
    const wanted = await probe(model);
    adapter.merge();
    demandMerged(wanted, await probe(model));
    const asked = options.dtype && { dtype: DTYPES[options.dtype] };
    const { dtypes, requantizationError: error } = await saveModelTo(model, path, out, asked);
    adapter.detach();
    model.destroy();

    const difference = largestDifference(wanted, await probe(await loadModelFrom(gpu, out)));
    const tolerance = largestOf(wanted) * Math.max(...[...dtypes].map((dtype) => TOLERANCES[dtype]));
    const stored = [...dtypes].join(", ");
    if (!(difference <= tolerance))
      throw new FormatError(
        `${out}: the merged model's logits must be within ${tolerance.toPrecision(2)} of the adapter's (${stored}), got a difference of ${difference.toPrecision(2)}. The files are left there: do not use them`,
      );
    if (json) {
      const requantization = error !== undefined && { requantization_error: error };
      result(JSON.stringify({ out, dtypes: [...dtypes], max_difference: difference, tolerance, ...requantization }));
    } else {
      if (error !== undefined)
        say(`quantised again: merged weights differ by ${(100 * error).toPrecision(2)} % of their norm`);
      say(
        `checked: logits differ by at most ${difference.toPrecision(2)}, ${tolerance.toPrecision(2)} is allowed for ${stored}`,
      );
      result(`the merged model is in ${out}`);
    }
  });
}

/**
 * Whether the weights as they are merged, in f32 whatever they are written in, do what the adapter did. It is strict where the check of the files has
 * to allow for their type: an adapter that is lost shows here also where it is smaller than what NF4 rounds away.
 */
function demandMerged(wanted: Float32Array, merged: Float32Array): void {
  const [difference, tolerance] = [largestDifference(wanted, merged), largestOf(wanted) * TOLERANCES.F32];
  if (!(difference <= tolerance))
    throw new ShapeError(
      `merge: logits of the merged weights must be within ${tolerance.toPrecision(2)} of the adapter's, got a difference of ${difference.toPrecision(2)}. Nothing was written`,
    );
}

const largestOf = (logits: Float32Array): number => logits.reduce((most, x) => Math.max(most, Math.abs(x)), 1);

const largestDifference = (wanted: Float32Array, found: Float32Array): number =>
  wanted.reduce((most, x, i) => worse(most, Math.abs(x - (found[i] ?? Number.NaN))), 0);

/** The logits of a fixed row of 16 random tokens. */
async function probe(model: CausalModel): Promise<Float32Array> {
  const { gpu, config } = model;
  const random = new Random(0);
  const ids = Int32Array.from({ length: Math.min(16, config.contextLength) }, () => random.below(config.vocabSize));
  const logits = gpu.scope(() => model.logits(tensor(gpu, ids, [1, ids.length])));
  const values = await read(logits);
  gpu.release(logits);
  return values;
}

/** The larger; NaN wins. */
const worse = (a: number, b: number): number => (Number.isNaN(b) || b > a ? b : a);
