import { expect, test } from "vitest";
import { ShapeError } from "../../src/tensor/errors.ts";
import { calibrationMetrics, type Prediction, predictionOf } from "../../src/train/metrics.ts";

const said = (confidence: number, correct: boolean): Prediction => ({
  ...{ confidence, correct },
  likelihood: correct ? confidence : 1 - confidence,
  squares: 0,
});

test("a prediction is the largest probability, whether it was right, and what the truth got", () => {
  const { squares, ...right } = predictionOf([0.2, 0.7, 0.1], 1);
  expect(right).toEqual({ confidence: 0.7, correct: true, likelihood: 0.7 });
  expect(squares).toBeCloseTo(0.2 ** 2 + 0.3 ** 2 + 0.1 ** 2, 12);
  const wrong = predictionOf(Float32Array.of(0.5, 0.5), 1); // the first of equal ones counts
  expect(wrong).toEqual({ confidence: 0.5, correct: false, likelihood: 0.5, squares: 0.5 });
});

test("the calibration error is that worked out by hand", () => {
  // Five bins: 0.55 and 0.6 are both in (0.4, 0.6], half of them right; 0.9, 0.95 and 1 in (0.8, 1], two of three right.
  const cases = [said(0.55, true), said(0.6, false), said(0.9, true), said(0.95, false), said(1, true)];
  const found = calibrationMetrics(cases, 5);
  const expected = (2 / 5) * Math.abs(1 / 2 - 1.15 / 2) + (3 / 5) * Math.abs(2 / 3 - 2.85 / 3);
  expect(found.ece).toBeCloseTo(expected, 12);
  expect(found.accuracy).toBeCloseTo(3 / 5, 12);
  expect(found.nll).toBeCloseTo(-[0.55, 0.4, 0.9, 0.05, 1].reduce((sum, p) => sum + Math.log(p), 0) / 5, 12);
});

test("bins are open below and closed above, 15 unless told, and only within a bin do errors cancel", () => {
  expect(calibrationMetrics([said(0.5, true), said(0.5, false)]).ece).toBeCloseTo(0, 12);
  // 0.6 = 9/15 ends the ninth bin; 0.61 is in the tenth.
  expect(calibrationMetrics([said(0.6, false), said(0.61, true)]).ece).toBeCloseTo((0.6 + 0.39) / 2, 12);
  expect(calibrationMetrics([said(0.6, false), said(0.59, true)]).ece).toBeCloseTo(Math.abs(1 - 1.19) / 2, 12);
  expect(calibrationMetrics([said(0.6, false), said(0.61, true)], 1).ece).toBeCloseTo(Math.abs(1 - 1.21) / 2, 12);
});

test("Brier's score is the mean over the cases of the squares summed over the classes", () => {
  const cases = [predictionOf([0.2, 0.8], 1), predictionOf([0.6, 0.4], 1)];
  expect(calibrationMetrics(cases).brier).toBeCloseTo((2 * 0.2 ** 2 + 2 * 0.6 ** 2) / 2, 12);
});

test("calibration needs a prediction and a bin", () => {
  expect(() => calibrationMetrics([])).toThrow(
    new ShapeError("calibrationMetrics: at least one prediction is needed, got none"),
  );
  expect(() => calibrationMetrics([said(0.5, true)], 0)).toThrow(
    new ShapeError("calibrationMetrics: bins must be a whole number of at least 1, got 0"),
  );
});
