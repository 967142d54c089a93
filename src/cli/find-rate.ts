/** `train --find-lr` and `--learning-rate auto`: which learning rate a run may begin with. */
import { join } from "node:path";
import { writeFileAtomic } from "../node.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Row } from "../train/data.ts";
import { findTaskLearningRate, type RateSweep, type TaskRateSweepOptions } from "../train/find-learning-rate.ts";
import { sparkline } from "./progress.ts";
import { reportPage } from "./report-page.ts";
import { say } from "./session.ts";

/** Has learning-rate.json, what `findRate` found last. */
export const RATES = "learning-rate.json";

/** Finds a rate, says the curve and leaves it in `out` as learning-rate.json and .html. What is trained is afterwards what it was. */
export async function findRate<R extends Pick<Row, "inputIds">, B>(
  options: TaskRateSweepOptions<R, B>,
  out: string,
): Promise<RateSweep> {
  const found = await findTaskLearningRate(options);
  const { points, suggestion } = found;
  const shown = (rate: number | undefined): string => rate?.toExponential(2) ?? "none";
  const ends = [points[0], points.at(-1)].map((point) => shown(point?.learningRate));
  const losses = points.map(({ loss }) => loss);
  say(`loss over learning rates from ${ends[0]} to ${ends[1]}: ${sparkline(losses, 60)}`);
  await writeFileAtomic(join(out, RATES), `${JSON.stringify(found)}\n`);
  const page = { metrics: [], validation: [], norms: [], samples: [], tables: {}, texts: {}, rates: points };
  const facts = [["suggestion", shown(suggestion)]] as const;
  await writeFileAtomic(
    join(out, "learning-rate.html"),
    await reportPage({ title: "Loss over learning rates", facts, ...page }),
  );
  return found;
}

/** Throws ShapeError where nothing was found. */
export function demandRate({ suggestion }: RateSweep): number {
  if (suggestion === undefined)
    throw new ShapeError(
      "train: --learning-rate auto must find a rate at which the loss falls, got none. Give a number",
    );
  say(`the learning rate is ${suggestion.toExponential(2)}, where the loss falls most steeply`);
  return suggestion;
}
