/** Several rows in one, so that a batch has little padding. */
import { ShapeError } from "../tensor/errors.ts";
import { longest, roundedLength } from "./batches.ts";
import { IGNORED, type Row } from "./data/row.ts";

/**
 * Packs rows into as few rows of at most `maxLength` as best-fit decreasing finds: longest first, each to where it leaves the least room
 * (Johnson et al. 1974, at most 11/9 of the fewest). Each row becomes a segment, whose tokens see only each other, and its loss stays what
 * it was: the first token of a segment is nobody's target. The packed rows come in the order of their first tokens' rows.
 *
 * Throws a ShapeError where a row is longer than maxLength or packed already.
 */
export function packRows(rows: readonly Row[], maxLength: number): Row[] {
  const bins = packLengths(
    rows.map(({ inputIds }) => inputIds.length),
    maxLength,
  );
  return bins.map((bin) => joined(bin.map((i) => rows[i] as Row)));
}

/** Which lengths go together. */
function packLengths(lengths: readonly number[], maxLength: number): number[][] {
  const tooLong = lengths.find((length) => length > maxLength);
  if (tooLong !== undefined)
    throw new ShapeError(`packRows: a row must have at most maxLength (${maxLength}) tokens, got ${tooLong}`);
  const byRoom = Array.from({ length: maxLength + 1 }, (): number[][] => []); // bins by the room they have left
  const bins: number[][] = [];
  const decreasing = [...lengths.keys()].sort((a, b) => (lengths[b] ?? 0) - (lengths[a] ?? 0) || a - b);
  for (const i of decreasing) {
    const length = lengths[i] ?? 0;
    let room = length;
    while (room < maxLength && byRoom[room]?.length === 0) room++;
    const bin = byRoom[room]?.pop() ?? [];
    if (bin.length === 0) bins.push(bin);
    bin.push(i);
    byRoom[room - length]?.push(bin);
  }
  return bins.sort(([a = 0], [b = 0]) => a - b);
}

function joined(rows: readonly Row[]): Row {
  if (rows.some(({ starts }) => starts)) throw new ShapeError("packRows: a row must be a segment, got a packed one");
  let end = 0;
  const begins = rows.map(({ inputIds }) => {
    end += inputIds.length;
    return end - inputIds.length;
  });
  return {
    inputIds: rows.flatMap(({ inputIds }) => inputIds),
    labels: rows.flatMap(({ labels }) => [IGNORED, ...labels.slice(1)]),
    starts: begins,
  };
}

/** Share of the positions of all batches that hold no token, in the order of the rows. */
export function paddingShare(rows: readonly Row[], batchSize: number): number {
  const most = longest(rows);
  let [positions, tokens] = [0, 0];
  for (let at = 0; at < rows.length; at += batchSize) {
    const batch = rows.slice(at, at + batchSize);
    positions += batch.length * roundedLength(longest(batch), most);
  }
  for (const { inputIds } of rows) tokens += inputIds.length;
  return positions === 0 ? 0 : 1 - tokens / positions;
}
