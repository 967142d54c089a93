/** A label that takes no part in the loss. */
export const IGNORED = -100;

export interface Row {
  readonly inputIds: readonly number[];
  /** As long as inputIds and not shifted: labels[t] is inputIds[t], or IGNORED. */
  readonly labels: readonly number[];
  /** Where the segments of a packed row begin, the first at 0: no token sees one of another segment. */
  readonly starts?: readonly number[];
}

/** Two answers to one prompt. Labels are IGNORED in the prompt. */
export interface PreferencePair {
  readonly chosen: Row;
  readonly rejected: Row;
}

/** Targets of the loss in a row: the first label is nobody's target. */
export const trainedCount = ({ labels }: Row): number =>
  labels.reduce((n, label, t) => n + Number(t > 0 && label !== IGNORED), 0);
