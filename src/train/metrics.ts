/** How well classes are told, by scikit-learn's definitions, and how far their probabilities can be trusted. */
import { ShapeError } from "../tensor/errors.ts";

export interface ClassificationMetrics {
  /** Mean of −log p(class) over the rows, in nats. */
  readonly loss: number;
  /** Share of the rows whose largest logit is that of their class; the first of equal ones counts. */
  readonly accuracy: number;
  /** Mean of F1 over the classes that are in the labels or predicted. */
  readonly macroF1: number;
  /** F1 of class 1, where there are two classes. */
  readonly f1?: number;
  /** Area under the ROC curve of class 1, where there are two classes and both are in the labels. */
  readonly auc?: number;
}

/** What was said of one case, such as a row or a token. */
export interface Prediction {
  /** Largest of the probabilities. */
  readonly confidence: number;
  /** Whether that is the probability of what was there; the first of equal ones counts. */
  readonly correct: boolean;
  /** Probability of what was there. */
  readonly likelihood: number;
  /** Σ over the classes of (p − 1 for what was there, else 0)², from 0 to 2 (Brier, 1950). */
  readonly squares: number;
}

export interface CalibrationMetrics {
  readonly accuracy: number;
  /** Mean of −log p of what was there, in nats. */
  readonly nll: number;
  /** Expected calibration error, from 0 to 1. */
  readonly ece: number;
  /** Mean of `squares`: of two classes, twice what scikit-learn gives unless told not to halve it. */
  readonly brier: number;
}

/** What these probabilities of the classes say where `label` is there. */
export function predictionOf(probabilities: ArrayLike<number>, label: number): Prediction {
  const p = Array.from(probabilities);
  const confidence = p.reduce((a, b) => Math.max(a, b), 0);
  const likelihood = p[label] ?? Number.NaN;
  const squares = p.reduce((sum, x) => sum + x * x, 1) - 2 * likelihood;
  return { confidence, correct: p.indexOf(confidence) === label, likelihood, squares };
}

/**
 * How far confidence can be trusted. ECE = Σ over bins of (share of the cases in it)·|accuracy − mean confidence|, with bins of equal width
 * over the confidence, (i/bins, (i + 1)/bins] (Guo et al., arXiv:1706.04599, §2). Throws ShapeError unless there is a case, and a bin.
 */
export function calibrationMetrics(predictions: readonly Prediction[], bins = 15): CalibrationMetrics {
  if (predictions.length === 0) throw new ShapeError("calibrationMetrics: at least one prediction is needed, got none");
  if (!Number.isInteger(bins) || bins < 1)
    throw new ShapeError(`calibrationMetrics: bins must be a whole number of at least 1, got ${bins}`);
  const gaps = new Float64Array(bins);
  for (const { confidence, correct } of predictions) {
    const bin = Math.min(bins, Math.max(1, Math.ceil(confidence * bins))) - 1;
    gaps[bin] = (gaps[bin] ?? 0) + Number(correct) - confidence;
  }
  return {
    accuracy: mean(predictions.map(({ correct }) => Number(correct))),
    nll: mean(predictions.map(({ likelihood }) => -Math.log(likelihood))),
    ece: gaps.reduce((sum, gap) => sum + Math.abs(gap), 0) / predictions.length,
    brier: mean(predictions.map(({ squares }) => squares)),
  };
}

/** Of logits, rows × classes, and the class of each row. Throws ShapeError unless there is a row, and logits for each. */
export function classificationMetrics(
  logits: readonly number[],
  labels: readonly number[],
  classes: number,
): ClassificationMetrics {
  const n = labels.length;
  if (n === 0) throw new ShapeError("classificationMetrics: at least one row is needed, got none");
  if (logits.length !== n * classes)
    throw new ShapeError(
      `classificationMetrics: ${n} rows of ${classes} classes need ${n * classes} logits, got ${logits.length}`,
    );
  const rows = labels.map((_, i) => logits.slice(i * classes, (i + 1) * classes));
  const losses = rows.map((row, i) => {
    const most = Math.max(...row);
    return most + Math.log(row.reduce((sum, x) => sum + Math.exp(x - most), 0)) - (row[labels[i] ?? -1] ?? Number.NaN);
  });
  const predicted = rows.map((row) => row.indexOf(Math.max(...row)));
  const seen = Array.from({ length: classes }, (_, c) => c).filter((c) => labels.includes(c) || predicted.includes(c));
  const positive = labels.map((label) => label === 1);
  const isSplit = positive.includes(true) && positive.includes(false);
  return {
    loss: mean(losses),
    accuracy: mean(labels.map((label, i) => Number(label === predicted[i]))),
    macroF1: mean(seen.map((c) => f1Of(c, labels, predicted))),
    ...(classes === 2 && { f1: f1Of(1, labels, predicted) }),
    ...(classes === 2 &&
      isSplit && {
        auc: rocAuc(
          rows.map(([no = 0, yes = 0]) => yes - no),
          positive,
        ),
      }),
  };
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

/** 2·TP / (2·TP + FP + FN), 0 where the class is neither there nor predicted. */
function f1Of(c: number, labels: readonly number[], predicted: readonly number[]): number {
  const hits = labels.filter((label, i) => label === c && predicted[i] === c).length;
  const claims = labels.filter((label) => label === c).length + predicted.filter((guess) => guess === c).length;
  return claims === 0 ? 0 : (2 * hits) / claims;
}

/** The chance that a positive row scores above a negative one (Mann and Whitney); equal scores count half. */
function rocAuc(scores: readonly number[], positive: readonly boolean[]): number {
  const tally = new Map<number, { no: number; yes: number }>();
  scores.forEach((score, i) => {
    const { no, yes } = tally.get(score) ?? { no: 0, yes: 0 };
    tally.set(score, positive[i] ? { no, yes: yes + 1 } : { no: no + 1, yes });
  });
  let [wins, below] = [0, 0];
  for (const [, { no, yes }] of [...tally].sort(([a], [b]) => a - b)) {
    wins += yes * (below + no / 2);
    below += no;
  }
  return wins / (below * (scores.length - below));
}
