/** `eval --laplace`: probabilities by the posterior over an adapter's parameters, beside those of the parameters as they are. */
import { Option } from "commander";
import { ShapeError } from "../tensor/errors.ts";
import type { Curvature } from "../train/laplace.ts";
import { type CalibrationMetrics, calibrationMetrics, type Prediction } from "../train/metrics.ts";
import { whole } from "./options.ts";
import { number, result, say } from "./session.ts";

export interface LaplaceArguments {
  readonly laplace?: string;
  readonly priorPrecision: number | "auto";
  readonly samples?: number;
  readonly seed: number;
}

export function laplaceOptions(command: string): Option[] {
  return [
    new Option(
      "--laplace <file>",
      "rows that the --adapter was trained on: also say how calibrated the probabilities are, without and with what these rows leave open (Laplace's approximation)",
    ),
    new Option(
      "--prior-precision <x>",
      "of the adapter's parameters; auto: of a classifier by the marginal likelihood, else by every second row of --data",
    )
      .default("auto")
      .argParser((text) => {
        const value = text === "auto" ? text : Number(text);
        if (value !== "auto" && !(value > 0 && Number.isFinite(value)))
          throw new ShapeError(`${command}: --prior-precision must be auto or a number above 0, got ${text}`);
        return value;
      }),
    whole(command, "--samples <n>", "draws of --laplace (default: 1000 of logits for a classifier, else 32)", 1),
    whole(command, "--seed <n>", "seed of the draws", 0, 0),
  ];
}

export interface Calibration {
  readonly prior_precision: number;
  /** Directions that the rows say something of. */
  readonly rank: number;
  /** Rows or target tokens that it was measured on. */
  readonly cases: number;
  readonly before: CalibrationMetrics;
  readonly after: CalibrationMetrics;
}

/** Measures calibration with `predict`, which is given the prior's precision (a number, or what chooses it), and frees the curvature. */
export async function calibrationOf(
  curvature: Curvature,
  precision: number | (() => number | Promise<number>),
  predict: (tau: number) => Promise<{ readonly plain: readonly Prediction[]; readonly laplace: readonly Prediction[] }>,
): Promise<Calibration> {
  try {
    const tau = typeof precision === "number" ? precision : await precision();
    const rank = curvature.values.length;
    say(`laplace: ${number(rank)} directions of the parameters are determined, prior precision ${tau.toPrecision(4)}`);
    const { plain, laplace } = await predict(tau);
    const [before, after] = [calibrationMetrics(plain), calibrationMetrics(laplace)];
    return { prior_precision: tau, rank, cases: plain.length, before, after };
  } finally {
    curvature.destroy();
  }
}

/** Throws ShapeError where there is no adapter. */
export function demandAdapter(adapter: string | undefined): void {
  if (adapter === undefined)
    throw new ShapeError("eval: --laplace is about an adapter's parameters, got no --adapter. Give it");
}

/** For people, as a table. */
export function showCalibration({ cases, before, after }: Calibration): void {
  const line = (name: string, { nll, ece, accuracy, brier }: CalibrationMetrics): string =>
    `${name.padEnd(14)} NLL ${nll.toFixed(4)}, ECE ${ece.toFixed(4)}, accuracy ${accuracy.toFixed(4)}, Brier ${brier.toFixed(4)} over ${number(cases)}`;
  result(line("as trained", before));
  result(line("with laplace", after));
}
