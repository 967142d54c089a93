/** Ours against the fastest peer, contest by contest. */
import type { CaseReport, CaseResult } from "./harness.ts";

/** One row per contest in which a peer gave a right result: ours against the fastest of them. */
export interface Summary {
  readonly rows: readonly {
    readonly contest: string;
    readonly ours: string;
    readonly ms: number;
    readonly peer: string;
    readonly peerMs: number;
    /** peerMs / ms: above 1 we are ahead. */
    readonly ratio: number;
  }[];
  /** Geometric mean of the ratios; null of no rows. */
  readonly geomean: number | null;
  /** Rows whose ratio is above 1. */
  readonly ahead: number;
}

interface Finished {
  readonly name: string;
  readonly cases: readonly CaseReport[];
  readonly against?: string;
}

export function summarize(contests: readonly Finished[]): Summary {
  const rows = contests.flatMap(({ name, cases, against }) => {
    const timed = cases.filter((one): one is CaseResult => !("error" in one));
    const ours = timed.find((one) => one.peer === undefined && one.name === against);
    const [best] = timed.filter(({ peer }) => peer !== undefined).sort((a, b) => a.ms.median - b.ms.median);
    if (!ours || !best) return [];
    const [ms, peerMs] = [ours.ms.median, best.ms.median];
    return [{ contest: name, ours: ours.name, ms, peer: best.name, peerMs, ratio: peerMs / ms }];
  });
  return {
    rows,
    geomean: rows.length > 0 ? geomean(rows.map(({ ratio }) => ratio)) : null,
    ahead: rows.filter(({ ratio }) => ratio > 1).length,
  };
}

const geomean = (values: readonly number[]): number =>
  Math.exp(values.reduce((total, value) => total + Math.log(value), 0) / values.length);
