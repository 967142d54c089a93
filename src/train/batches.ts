/** Rows → batches: which rows, in which order, and side by side. */
import { ShapeError } from "../tensor/errors.ts";
import { Random } from "../tensor/random.ts";
import { IGNORED, type Row } from "./data/row.ts";

export interface Batch {
  /** [B,T], padded on the right. */
  readonly ids: Int32Array;
  /** [B,T], shifted: labels[b,t] is the target of position t, or IGNORED; the last position of a row has none. */
  readonly labels: Int32Array;
  readonly B: number;
  /** Positions of each row, the longest and more. */
  readonly T: number;
  /** Targets that are not IGNORED: what the loss is the mean over. */
  readonly tokens: number;
  /** Positions b·T + t that have a target, padded with −1, or all where nearly all have one: only there are logits worked out. */
  readonly targets: Int32Array;
  /** Of packed rows, each [B,T]: the position of each token within its segment, and where in the row that begins. */
  readonly packing?: { readonly positions: Int32Array; readonly starts: Int32Array };
}

/** Share of all positions by which the number of `targets` grows, so that there are few shapes. */
const TARGET_STEP = 1 / 4;

/** Lengths are rounded up to multiples of this in training, so that there are few shapes, each traced once. */
const LENGTH_STEP = 16;

/** Tokens of the longest row. */
export const longest = (rows: readonly Pick<Row, "inputIds">[]): number =>
  rows.reduce((most, row) => Math.max(most, row.inputIds.length), 0);

/** Whether the batches of these rows may be packed. */
export const isPacked = (rows: readonly Pick<Row, "starts">[]): boolean => rows.some(({ starts }) => starts);

/** `collate` to a length that is a multiple of 16, or `most`, the longest that any row is. */
export function collateRounded(rows: readonly Row[], padId: number, most: number): Batch {
  return collate(rows, padId, roundedLength(longest(rows), most));
}

/** A length rounded up, but to no more than `most`, if that is given. */
export const roundedLength = (length: number, most: number = Number.POSITIVE_INFINITY): number =>
  Math.min(most, Math.ceil(length / LENGTH_STEP) * LENGTH_STEP);

/** The largest batch that rows of a run may make: `batchSize` of the longest, of which every token counts. */
export function largestBatch(batchSize: number, length: number, hasPacked = false): Batch {
  const ids = new Array<number>(length).fill(0);
  return collate(new Array<Row>(batchSize).fill({ inputIds: ids, labels: ids, ...(hasPacked && { starts: [0] }) }), 0);
}

/** Lays rows side by side, padded to the longest or to `length`; with a packed row among them all are. Throws a ShapeError if there are none. */
export function collate(rows: readonly Row[], padId: number, length: number = longest(rows)): Batch {
  const B = rows.length;
  if (B === 0) throw new ShapeError("collate: a batch must have at least one row, got none");
  const T = length;
  const ids = new Int32Array(B * T).fill(padId);
  const labels = new Int32Array(B * T).fill(IGNORED);
  for (const [b, row] of rows.entries()) {
    ids.set(row.inputIds, b * T);
    labels.set(row.labels.slice(1), b * T);
  }
  const counted = Int32Array.from(labels.keys()).filter((at) => labels[at] !== IGNORED);
  const step = Math.ceil(B * T * TARGET_STEP);
  const places = Math.min(B * T, Math.max(1, Math.ceil(counted.length / step)) * step);
  const targets = new Int32Array(places).fill(-1);
  targets.set(places === B * T ? labels.map((_, at) => at) : counted);
  const packing = isPacked(rows) && { packing: packingOf(rows, T) };
  return { ids, labels, B, T, tokens: counted.length, targets, ...packing };
}

/** Batches of one length as one, one below the other. With a packed one among them it is packed. */
export function stackBatches(batches: readonly Batch[]): Batch {
  const [{ T } = { T: 0 }] = batches;
  const joined = (of: (batch: Batch, first: number) => Int32Array): Int32Array => {
    let rows = 0;
    return Int32Array.from(
      batches.flatMap((batch) => {
        rows += batch.B;
        return [...of(batch, (rows - batch.B) * T)];
      }),
    );
  };
  const positions = ({ B }: Batch): Int32Array => Int32Array.from({ length: B * T }, (_, at) => at % T);
  return {
    ids: joined(({ ids }) => ids),
    labels: joined(({ labels }) => labels),
    ...{ B: batches.reduce((sum, { B }) => sum + B, 0), T },
    tokens: batches.reduce((sum, { tokens }) => sum + tokens, 0),
    targets: joined(({ targets }, first) => targets.map((at) => (at < 0 ? at : first + at))),
    ...(batches.some(({ packing }) => packing) && {
      packing: {
        positions: joined((batch) => batch.packing?.positions ?? positions(batch)),
        starts: joined((batch) => batch.packing?.starts ?? new Int32Array(batch.B * T)),
      },
    }),
  };
}

/** Padding is a segment of its own. */
function packingOf(rows: readonly Row[], T: number): NonNullable<Batch["packing"]> {
  const positions = new Int32Array(rows.length * T);
  const starts = new Int32Array(rows.length * T);
  for (const [b, { inputIds, starts: begins = [0] }] of rows.entries()) {
    const bounds = [...begins, inputIds.length, T];
    for (let s = 0; s + 1 < bounds.length; s++) {
      const [first = 0, end = 0] = [bounds[s], bounds[s + 1]];
      for (let t = first; t < end; t++) {
        positions[b * T + t] = t - first;
        starts[b * T + t] = first;
      }
    }
  }
  return { positions, starts };
}

export interface Sampling {
  readonly rows: number;
  readonly batchSize: number;
  /** Each epoch in an order of its own, by this seed. Undefined: the order of the file. */
  readonly seed?: number | undefined;
}

/** Batches of one epoch. */
export const batchesPerEpoch = ({ rows, batchSize }: Sampling): number => Math.ceil(rows / batchSize);

/** Far from the streams that steps and layers draw from. */
const SHUFFLE_STREAM = 0x5eed0000;

/**
 * The row indices of batch after batch, without end, from batch number `from` (0 is the first of the run) on. An epoch
 * visits every row once; its last batch is short when batchSize does not divide the rows, and no batch spans two epochs.
 * The batch number is the whole state: a run that resumes at `from` sees what it would have seen. Throws a ShapeError.
 */
export function* batchIndices(sampling: Sampling, from = 0): Generator<number[], never> {
  const { rows, batchSize, seed } = sampling;
  for (const [name, n] of Object.entries({ rows, batchSize }))
    if (!Number.isInteger(n) || n < 1)
      throw new ShapeError(`batchIndices: ${name} must be a whole number above 0, got ${n}`);
  const perEpoch = batchesPerEpoch(sampling);
  let first = from % perEpoch;
  for (let epoch = Math.floor(from / perEpoch); ; epoch++) {
    const order = Array.from({ length: rows }, (_, i) => i);
    if (seed !== undefined) new Random(seed, SHUFFLE_STREAM + epoch).shuffle(order);
    for (let i = first; i < perEpoch; i++) yield order.slice(i * batchSize, (i + 1) * batchSize);
    first = 0;
  }
}
