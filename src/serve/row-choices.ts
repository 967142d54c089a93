/** What is known of a row of logits: the likeliest tokens and the weight of all others, or the row. */
import { TOP } from "../kernels/top-logits.ts";

/**
 * What is known of a row of logits before it is read back: of its tokens those that come first by logit and, of equals, by id, at most TOP.
 *
 * A NaN counts as −∞. Sums are of exp(x − m), m the greatest logit.
 */
export interface RowChoices {
  readonly ids: Int32Array;
  readonly logits: Float32Array;
  /** Σ exp(x − m) over all others. */
  readonly rest: number;
  /** Σ exp((x − m) / temperature) over all others. */
  readonly temperedRest: number;
  /** Whether there are no others. */
  readonly isAll: boolean;
  /** All logits [V], where they were read. */
  readonly row?: Float32Array;
}

/** The choices of a row that is on the host. */
export function choicesOf(row: Float32Array, temperature: number): RowChoices {
  const values = row.slice();
  for (let id = 0; id < values.length; id++) if (Number.isNaN(values[id])) values[id] = Number.NEGATIVE_INFINITY;
  const ids = Int32Array.from(largest(values, TOP));
  const logits = Float32Array.from(ids, (id) => values[id] as number);
  const others = values.length > TOP ? values : new Float32Array();
  const most = logits[0] as number;
  for (const id of ids) others[id] = Number.NEGATIVE_INFINITY;
  const rest = sum(weightsOf(others, most, 1));
  const temperedRest = temperature === 1 ? rest : sum(weightsOf(others, most, temperature));
  return { ids, logits, rest, temperedRest, isAll: others.length === 0, row };
}

export function rowOf({ ids, logits }: RowChoices): Float32Array {
  const row = new Float32Array(ids.length);
  ids.forEach((id, i) => {
    row[id] = logits[i] as number;
  });
  return row;
}

/** exp((x − most) / temperature) of each. */
export function weightsOf(logits: Float32Array | Float64Array, most: number, temperature: number): Float64Array {
  const weights = new Float64Array(logits.length);
  for (let i = 0; i < weights.length; i++) {
    const logit = logits[i] as number;
    weights[i] = logit === Number.NEGATIVE_INFINITY ? 0 : logit === most ? 1 : Math.exp((logit - most) / temperature);
  }
  return weights;
}

export function sum(values: Float64Array): number {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i] as number;
  return total;
}

/** Indices of the n largest values, the largest first. */
export function largest(values: Float32Array | Float64Array, n: number): number[] {
  const kept: number[] = [];
  const valueAt = (i: number): number => values[kept[i] as number] as number;
  let least = Number.NEGATIVE_INFINITY; // of n; of fewer, none is too small
  for (let index = 0; index < values.length; index++) {
    const value = values[index] as number;
    if (value <= least && kept.length === n) continue;
    let at = kept.length;
    while (at > 0 && value > valueAt(at - 1)) at--;
    kept.splice(at, 0, index);
    if (kept.length > n) kept.pop();
    least = valueAt(kept.length - 1);
  }
  return kept;
}

export function logSumExp(values: Float32Array): number {
  const most = values.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  return most + Math.log(sum(weightsOf(values, most, 1)));
}
