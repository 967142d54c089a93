/** What of a row is learned. */
import { IGNORED, type Row } from "./row.ts";

/**
 * What is learned of a row: every turn of the assistant, the last one, the completion of a prompt, or everything. Unless given, messages
 * learn by "assistant", prompts by "completion", text by "all". Rows of ids and segments say it themselves.
 */
export type LossOn = "assistant" | "last" | "completion" | "all";

export interface Encoded extends Row {
  /** Whether the ids of a prompt alone are no prefix of the whole's, so that learning starts where they part. */
  readonly unclear: boolean;
}

export type Span = readonly [start: number, end: number];

/** The ids within the spans as labels. */
export const masked = (ids: readonly number[], spans: readonly Span[]): number[] =>
  ids.map((id, t) => (spans.some(([start, end]) => t >= start && t < end) ? id : IGNORED));

export function commonPrefix(a: readonly number[], b: readonly number[]): number {
  let n = 0;
  while (n < a.length && a[n] === b[n]) n++;
  return n;
}

export function commonSuffix(a: readonly number[], b: readonly number[]): number {
  const most = Math.min(a.length, b.length);
  let n = 0;
  while (n < most && a[a.length - 1 - n] === b[b.length - 1 - n]) n++;
  return n;
}
