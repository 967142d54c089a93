/** Where the rows of a run come from, step by step: an array, once in every epoch, or a stream, once. */
import { ShapeError } from "../tensor/errors.ts";
import { batchIndices, longest } from "./batches.ts";
import type { TrainingState } from "./checkpoint.ts";
import type { Row } from "./data/row.ts";

/** An array, or a stream of rows: any other iterable, of which no more is read than a step needs. */
export type Rows<R> = readonly R[] | Iterable<R> | AsyncIterable<R>;

export interface RowSourceOptions<R> {
  readonly rows: Rows<R>;
  readonly batchSize: number;
  readonly gradAccumulation?: number;
  readonly maxLength?: number | undefined;
  readonly shuffleSeed?: number | undefined;
  readonly from?: TrainingState | undefined;
  readonly signal?: AbortSignal | undefined;
}

export interface RowSource<R> {
  /** Rows of the largest batch. */
  readonly batchSize: number;
  /** No row has more tokens. */
  readonly longest: number;
  /** The first rows, where they are there. */
  readonly sample: readonly R[];
  /** The batches of the next step; fewer where the stream ends, and none where it has ended or the run was aborted. */
  next(): Promise<readonly (readonly R[])[]>;
  /** Rows of a stream in the steps so far. */
  readonly rowCount?: number;
  close(): Promise<void>;
}

type HasIds = Pick<Row, "inputIds">;

/** The rows as an array, if they are one. */
export const arrayOf = <R>(rows: Rows<R>): readonly R[] | undefined =>
  Array.isArray(rows) ? (rows as readonly R[]) : undefined;

/** Throws ShapeError where maxLength or shuffleSeed do not suit the rows, or the state that it goes on from is not of such rows. */
export function rowSource<R extends HasIds>(options: RowSourceOptions<R>): RowSource<R> {
  const { maxLength = 1, from } = options;
  if (!Number.isInteger(maxLength) || maxLength < 1)
    throw new ShapeError(`train: maxLength must be a whole number of at least 1, got ${maxLength}`);
  const rows = arrayOf(options.rows);
  if (from && from.batchCount > 0 && (from.rowCount === undefined) !== (rows !== undefined))
    throw new ShapeError(
      `train: a run must go on with rows of the kind that it had, ${rows ? "a stream, got an array" : "an array, got a stream"}`,
    );
  return rows ? new ArraySource(rows, options) : new StreamSource(options);
}

class ArraySource<R extends HasIds> implements RowSource<R> {
  readonly batchSize: number;
  readonly longest: number;
  readonly sample: readonly R[];
  readonly #rows: readonly R[];
  readonly #batches: Generator<number[], never>;
  readonly #perStep: number;

  constructor(rows: readonly R[], options: RowSourceOptions<R>) {
    const { batchSize, gradAccumulation = 1, maxLength, shuffleSeed, from } = options;
    this.#rows = rows;
    this.#batches = batchIndices({ rows: rows.length, batchSize, seed: shuffleSeed }, from?.batchCount);
    this.#perStep = gradAccumulation;
    this.batchSize = Math.min(batchSize, rows.length);
    rows.forEach((row, i) => void checkLength(row, i, maxLength));
    this.longest = maxLength ?? longest(rows);
    this.sample = rows.slice(0, batchSize);
  }

  async next(): Promise<R[][]> {
    return Array.from({ length: this.#perStep }, () => this.#batches.next().value.map((i) => this.#rows[i] as R));
  }

  async close(): Promise<void> {}
}

class StreamSource<R extends HasIds> implements RowSource<R> {
  readonly batchSize: number;
  readonly longest: number;
  readonly sample: readonly R[] = [];
  rowCount = 0;
  readonly #iterator: Iterator<R> | AsyncIterator<R>;
  readonly #perStep: number;
  readonly #signal: AbortSignal | undefined;
  /** Rows that a run before this one had. */
  readonly #before: number;
  #read = 0;
  #state: "open" | "waiting" | "ended" = "open";

  constructor({ rows, batchSize, gradAccumulation = 1, maxLength, shuffleSeed, from, signal }: RowSourceOptions<R>) {
    if (shuffleSeed !== undefined)
      throw new ShapeError(
        `train: a stream of rows has an order of its own, got shuffleSeed ${shuffleSeed}. Leave it out, or give the rows as an array`,
      );
    if (maxLength === undefined)
      throw new ShapeError(
        "train: a stream of rows needs maxLength, tokens that no row has more of, got none. Give that to which the rows are cut",
      );
    this.batchSize = batchSize;
    this.longest = maxLength;
    this.#iterator = Symbol.asyncIterator in rows ? rows[Symbol.asyncIterator]() : rows[Symbol.iterator]();
    this.#perStep = gradAccumulation;
    this.#signal = signal;
    this.#before = from?.rowCount ?? 0;
  }

  async next(): Promise<R[][]> {
    while (this.#read < this.#before && (await this.#row())) this.#read++;
    if (this.#read < this.#before && this.#state === "ended")
      throw new ShapeError(
        `train: a stream must have the ${this.#before} rows that the run has had, got ${this.#read}. Give it from its beginning`,
      );
    const batches: R[][] = [];
    for (let batch = await this.#batch(); batch.length > 0; batch = await this.#batch()) {
      batches.push(batch);
      if (batches.length === this.#perStep) break;
    }
    if (this.#signal?.aborted) return [];
    if (this.#read === 0) throw new ShapeError("train: a stream must have at least one row, got none");
    this.rowCount = this.#read;
    return batches;
  }

  /** Not waited for where it is busy with a row: it may never have one. */
  async close(): Promise<void> {
    if (this.#state === "ended") return;
    const closed = Promise.resolve(this.#iterator.return?.());
    if (this.#state === "waiting") void closed.catch(() => {});
    else await closed;
  }

  async #batch(): Promise<R[]> {
    const rows: R[] = [];
    while (rows.length < this.batchSize) {
      const row = await this.#row();
      if (!row) break;
      checkLength(row, this.#read++, this.longest);
      rows.push(row);
    }
    return rows;
  }

  /** Undefined where there is no more, and where the run was aborted meanwhile. */
  async #row(): Promise<R | undefined> {
    if (this.#state !== "open" || this.#signal?.aborted) return undefined;
    this.#state = "waiting";
    const result = await unlessAborted(this.#take(), this.#signal);
    return result?.done ? undefined : result?.value;
  }

  async #take(): Promise<IteratorResult<R>> {
    try {
      const result = await this.#iterator.next();
      this.#state = result.done ? "ended" : "open";
      return result;
    } catch (error) {
      this.#state = "ended";
      throw error;
    }
  }
}

function checkLength({ inputIds }: HasIds, at: number, maxLength = inputIds.length): void {
  if (inputIds.length > maxLength)
    throw new ShapeError(
      `train: rows must have at most maxLength = ${maxLength} tokens, got ${inputIds.length} in row ${at}. Cut them, or raise maxLength`,
    );
}

/** What comes of the promise, or undefined as soon as the signal is aborted. */
function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T | undefined> {
  if (!signal) return promise;
  return new Promise((resolve, reject) => {
    const stop = (): void => resolve(undefined);
    signal.addEventListener("abort", stop, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener("abort", stop));
  });
}
