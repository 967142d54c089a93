/** Which settings to try next: on a grid, at random, or where a Gaussian process expects most (Bayesian optimisation). */
import { ShapeError } from "../tensor/errors.ts";
import type { Random } from "../tensor/random.ts";
import { expectedImprovement, fitGaussianProcess } from "./gaussian-process.ts";

export type Setting = string | number | boolean;

/** What a setting may be: one of some values, or a number of a range, even over its logarithm with `log`. */
export type Dimension =
  | { readonly values: readonly Setting[] }
  | { readonly min: number; readonly max: number; readonly log?: boolean; readonly whole?: boolean };

export type SearchSpace = Readonly<Record<string, Dimension>>;
export type SearchPoint = Readonly<Record<string, Setting>>;

/** What came of a point; less is better. A value that is not finite counts as the worst there is. */
export interface SearchTrial {
  readonly point: SearchPoint;
  readonly value: number;
}

/** Points that are drawn at random before the process has anything to learn from. */
const FIRST = 4;
/** Candidates among which the expected improvement is the largest. */
const CANDIDATES = 512;
const NEAR_THE_BEST = 128;

/** Throws ShapeError for a space without a setting, a setting without a value, and a range that is none. */
export function checkSpace(space: SearchSpace): void {
  if (Object.keys(space).length === 0) throw new ShapeError("search: a space must have a setting, got none");
  for (const [name, dimension] of Object.entries(space)) {
    if ("values" in dimension) {
      if (dimension.values.length === 0) throw new ShapeError(`search: "${name}" must have a value, got none`);
      continue;
    }
    const { min, max, log = false, whole = false } = dimension;
    if (!(Number.isFinite(min) && Number.isFinite(max) && min < max))
      throw new ShapeError(`search: "${name}" must have numbers min < max, got ${min} and ${max}`);
    if (log && min <= 0)
      throw new ShapeError(`search: "${name}" must have a min above 0 for its logarithm, got ${min}`);
    if (whole && !(Number.isInteger(min) && Number.isInteger(max)))
      throw new ShapeError(`search: "${name}" must have whole numbers as min and max, got ${min} and ${max}`);
  }
}

/** Every combination, of a range `levels` values. */
export function gridPoints(space: SearchSpace, levels = 3): SearchPoint[] {
  checkSpace(space);
  return Object.entries(space).reduce<SearchPoint[]>(
    (points, [name, dimension]) =>
      points.flatMap((point) => levelsOf(dimension, levels).map((value) => ({ ...point, [name]: value }))),
    [{}],
  );
}

const levelsOf = (dimension: Dimension, levels: number): readonly Setting[] =>
  "values" in dimension
    ? dimension.values
    : [...new Set(Array.from({ length: levels }, (_, i) => settingAt(dimension, levels > 1 ? i / (levels - 1) : 0.5)))];

/** A point drawn at random, along each dimension by its own scale. */
export function randomPoint(space: SearchSpace, random: Random): SearchPoint {
  checkSpace(space);
  return mapSpace(space, (dimension) => settingAt(dimension, random.uniform()));
}

/**
 * The point to try after these trials: of many candidates, drawn from the whole space and around the best trials, the one with the largest
 * expected improvement under a Gaussian process with a Matérn 5/2 kernel (J. Snoek, H. Larochelle, R. P. Adams, arXiv:1206.2944). The first four are random. No point
 * is proposed twice as long as there are others. Throws ShapeError as `checkSpace`.
 */
export function suggestPoint(space: SearchSpace, trials: readonly SearchTrial[], random: Random): SearchPoint {
  const tried = new Set(trials.map(({ point }) => keyOf(point)));
  const around = trials
    .filter(({ value }) => Number.isFinite(value))
    .toSorted((a, b) => a.value - b.value)
    .slice(0, 3);
  const drawn = Array.from({ length: CANDIDATES }, () => randomPoint(space, random));
  const near = around.flatMap(({ point }) =>
    Array.from({ length: NEAR_THE_BEST / around.length }, () => neighbour(space, point, random)),
  );
  const fresh = [...drawn, ...near].filter((point) => !tried.has(keyOf(point)));
  const [first = randomPoint(space, random)] = fresh;
  if (around.length === 0 || trials.length < FIRST) return first;
  const worst = Math.max(...trials.map(({ value }) => value).filter(Number.isFinite));
  const values = trials.map(({ value }) => (Number.isFinite(value) ? value : worst));
  const process = fitGaussianProcess(
    trials.map(({ point }) => coordinates(space, point)),
    values,
    random,
  );
  const best = Math.min(...values);
  const gain = (point: SearchPoint): number => expectedImprovement(process.predict(coordinates(space, point)), best);
  return fresh
    .map((point) => ({ point, gain: gain(point) }))
    .reduce((a, b) => (b.gain > a.gain ? b : a), {
      point: first,
      gain: gain(first),
    }).point;
}

/** The point with some of its settings moved, by about a tenth of their range. */
function neighbour(space: SearchSpace, point: SearchPoint, random: Random): SearchPoint {
  return mapSpace(space, (dimension, name) => {
    const value = point[name] as Setting;
    if ("values" in dimension) return random.uniform() < 0.8 ? value : settingAt(dimension, random.uniform());
    return settingAt(dimension, Math.min(1, Math.max(0, placeOf(dimension, value) + random.normal(0, 0.1))));
  });
}

const mapSpace = (space: SearchSpace, make: (dimension: Dimension, name: string) => Setting): SearchPoint =>
  Object.fromEntries(Object.entries(space).map(([name, dimension]) => [name, make(dimension, name)]));

/** The setting at a place in [0, 1] of its range. */
function settingAt(dimension: Dimension, place: number): Setting {
  if ("values" in dimension)
    return dimension.values[
      Math.min(dimension.values.length - 1, Math.floor(place * dimension.values.length))
    ] as Setting;
  const { min, max, log, whole } = dimension;
  const value = log ? min * (max / min) ** place : min + (max - min) * place;
  return whole ? Math.round(value) : Math.min(max, Math.max(min, value));
}

/** Where in [0, 1] a setting is. */
function placeOf(dimension: Dimension, value: Setting): number {
  if ("values" in dimension) return dimension.values.indexOf(value) / Math.max(1, dimension.values.length - 1);
  const { min, max, log } = dimension;
  return log ? Math.log(Number(value) / min) / Math.log(max / min) : (Number(value) - min) / (max - min);
}

/** The point in the unit cube. Numbers to choose from lie in their order; other choices have an axis each, and are a distance of 1 apart. */
function coordinates(space: SearchSpace, point: SearchPoint): number[] {
  return Object.entries(space).flatMap(([name, dimension]) => {
    const value = point[name] as Setting;
    if (!("values" in dimension) || dimension.values.every((choice) => typeof choice === "number"))
      return [placeOf(dimension, value)];
    return dimension.values.map((choice) => (choice === value ? Math.SQRT1_2 : 0));
  });
}

const keyOf = (point: SearchPoint): string => JSON.stringify(Object.entries(point));
