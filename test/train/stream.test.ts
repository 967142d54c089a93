// Training on rows that come one after the other is training on the array of them, bit for bit, and needs no more of them than it uses.
import { beforeAll, describe, expect, test } from "vitest";
import { readRecords } from "../../src/data.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { memoryDirectory, memorySource } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { readAll } from "../../src/tensor/tensor.ts";
import { decodeState, encodeState, type TrainingState } from "../../src/train/checkpoint.ts";
import { type Row, rowStream } from "../../src/train/data.ts";
import type { StepMetrics } from "../../src/train/step-metrics.ts";
import { type TrainOptions, train } from "../../src/train/trainer.ts";
import { testGpu } from "../harness.ts";

const row = (...inputIds: number[]): Row => ({ inputIds, labels: inputIds });
const rows = [row(1, 2, 3, 4), row(5, 6, 7, 8, 9, 10), row(11, 12), row(13, 14, 15), row(16, 17, 18, 19, 20)];
const maxLength = 6;

let gpu: Gpu;
beforeAll(async () => {
  gpu = await testGpu();
});

async function run(options: Partial<TrainOptions>) {
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", dropout: 0.1 }, 5);
  const metrics: StepMetrics[] = [];
  const states: TrainingState[] = [];
  try {
    const training = train({
      ...{ model, adapter, parameters: adapter.parameters, rows, steps: 3, batchSize: 2, learningRate: 1e-2 },
      checkpoint: { save: (state) => void states.push(state) },
      ...options,
    });
    for await (const m of training) metrics.push(m);
    const numbers = metrics.map((m) => [m.step, m.loss, m.grad_norm, m.learning_rate, m.tokens]);
    return { numbers, states, values: await readAll(adapter.parameters) };
  } finally {
    adapter.detach();
    model.destroy();
  }
}

test("packed rows that come in a stream, which is not told of them, are trained on as the array's, and all memory is given back", async () => {
  const packed = rows.map((one) => ({ ...one, starts: [0, 2].slice(0, one.inputIds.length - 1) }));
  const { numbers, values } = await run({ rows: packed });
  const { bytesLive } = gpu.counters();
  const streamed = await run({ rows: new Set(packed), maxLength });
  expect(streamed.numbers).toEqual(numbers);
  expect(streamed.values).toEqual(values);
  expect(gpu.counters().bytesLive).toBe(bytesLive);
});

/** Rows as they come; how many came, and whether it was closed. */
class Stream {
  came = 0;
  isClosed = false;

  async *of(all: Iterable<Row>, hangs = false): AsyncGenerator<Row> {
    try {
      for (const one of all) {
        await new Promise((done) => setTimeout(done, 1));
        this.came++;
        yield one;
      }
      if (hangs) await new Promise(() => {});
    } finally {
      this.isClosed = true;
    }
  }
}

const stream = (all: Iterable<Row> = rows): AsyncGenerator<Row> => new Stream().of(all);

test.each<[kind: string, given: () => TrainOptions["rows"]]>([
  ["an asynchronous generator", stream],
  ["a set", () => new Set(rows)],
  ["an iterator of an array", () => rows.values()],
])("%s is as the array of its rows, to the last bit, with a last batch that is short", async (_, given) => {
  const asArray = await run({});
  const streamed = await run({ rows: given(), maxLength });
  expect(streamed.numbers).toEqual(asArray.numbers);
  expect(streamed.values).toEqual(asArray.values);
});

test("a stream that ends ends the run, with fewer batches in its last step, and the state says how many rows there were", async () => {
  const { numbers, states } = await run({ rows: stream(), maxLength, steps: 9, gradAccumulation: 2 });
  const tokens = rows.map(({ inputIds }) => inputIds.length);
  expect(numbers.map(([step, , , , count]) => [step, count])).toEqual([
    [1, tokens.slice(0, 4).reduce((a, b) => a + b)],
    [2, tokens[4]],
  ]);
  expect(states.map(({ optimizer, rowCount }) => [optimizer.stepCount, rowCount])).toEqual([[2, 5]]);
});

test("a run on a stream that was cut off goes on bit for bit, given the stream from its beginning", async () => {
  const many = Array.from({ length: 4 }, () => rows).flat();
  const options = { steps: 6, gradAccumulation: 2, batchSize: 1, maxLength };
  const whole = await run({ ...options, rows: stream(many) });
  const stop = new AbortController();
  const cut: TrainingState[] = [];
  const save = (state: TrainingState): void => {
    cut.push(state);
    stop.abort();
  };
  await run({ ...options, rows: stream(many), checkpoint: { every: 2, save }, signal: stop.signal });
  const [from] = await Promise.all(cut.map(throughFile));
  expect(from?.rowCount).toBe(4);
  const rest = await run({ ...options, rows: stream(many), from });
  expect(rest.numbers).toEqual(whole.numbers.slice(2));
  expect(rest.values).toEqual(whole.values);
  await expect(run({ ...options, rows: stream(rows.slice(0, 3)), from })).rejects.toThrow(
    new ShapeError("train: a stream must have the 4 rows that the run has had, got 3. Give it from its beginning"),
  );
  await expect(run({ ...options, rows, from })).rejects.toThrow(
    new ShapeError("train: a run must go on with rows of the kind that it had, a stream, got an array"),
  );
  const ofArray: TrainingState = { optimizer: { stepCount: 1, runs: [] }, batchCount: 1, badSteps: 0 };
  await expect(run({ ...options, rows: stream(), from: ofArray })).rejects.toThrow(
    new ShapeError("train: a run must go on with rows of the kind that it had, an array, got a stream"),
  );
});

async function throughFile(state: TrainingState): Promise<TrainingState> {
  const pieces: Uint8Array[] = [];
  for await (const piece of encodeState(state)) pieces.push(piece.slice());
  const bytes = Uint8Array.from(pieces.flatMap((piece) => [...piece]));
  return decodeState(memoryDirectory("memory", { state: bytes }), "state");
}

test("no more of a stream is read than the steps use, and it is closed then", async () => {
  const given = new Stream();
  await run({ rows: given.of(rows), maxLength, steps: 2 });
  expect([given.came, given.isClosed]).toEqual([4, true]);
});

test("an abort does not wait for a row that does not come: the steps sent are done, and their state is saved", async () => {
  const stop = new AbortController();
  const given = new Stream();
  const isWaiting = async function* (): AsyncGenerator<Row> {
    for await (const one of given.of(rows.slice(0, 3), true)) {
      yield one;
      if (given.came === 3) setTimeout(() => stop.abort(), 50);
    }
  };
  const { numbers, states } = await run({ rows: isWaiting(), maxLength, signal: stop.signal });
  expect(numbers).toHaveLength(1);
  expect(states.map(({ optimizer, rowCount }) => [optimizer.stepCount, rowCount])).toEqual([[1, 2]]);
});

test("an abort before the first row is no error", async () => {
  const never = new Stream();
  const signal = AbortSignal.timeout(20);
  expect((await run({ rows: never.of([], true), maxLength, signal })).numbers).toEqual([]);
});

test("the error of a stream is that of the run", async () => {
  const broken = async function* (): AsyncGenerator<Row> {
    yield* rows;
    throw new FormatError("train.jsonl:6: broken");
  };
  await expect(run({ rows: broken(), maxLength, steps: 9 })).rejects.toThrow(new FormatError("train.jsonl:6: broken"));
});

test.each<[what: string, options: Partial<TrainOptions>, message: string]>([
  [
    "a seed for its order",
    { maxLength, shuffleSeed: 3 },
    "train: a stream of rows has an order of its own, got shuffleSeed 3. Leave it out, or give the rows as an array",
  ],
  [
    "no maxLength",
    {},
    "train: a stream of rows needs maxLength, tokens that no row has more of, got none. Give that to which the rows are cut",
  ],
  ["half a maxLength", { maxLength: 2.5 }, "train: maxLength must be a whole number of at least 1, got 2.5"],
  [
    "a longer row",
    { maxLength: 5 },
    "train: rows must have at most maxLength = 5 tokens, got 6 in row 1. Cut them, or raise maxLength",
  ],
  ["nothing in it", { maxLength, rows: stream([]) }, "train: a stream must have at least one row, got none"],
])("a stream with %s is refused", async (_, options, message) => {
  await expect(run({ rows: stream(), ...options })).rejects.toThrow(new ShapeError(message));
});

test("an array may have a maxLength too, and keeps to it", async () => {
  const streamed = await run({ rows: stream(), maxLength: 7 });
  expect((await run({ maxLength: 7 })).values).toEqual(streamed.values);
  await expect(run({ maxLength: 5 })).rejects.toThrow(
    new ShapeError("train: rows must have at most maxLength = 5 tokens, got 6 in row 1. Cut them, or raise maxLength"),
  );
});

describe("a file as a stream of rows", () => {
  const limits = { maxLength: 8, contextLength: 32, vocabSize: 64 };
  const lines = (count: number): string =>
    Array.from({ length: count }, (_line, i) => JSON.stringify({ input_ids: [i % 60, 1, 2, 3 + (i % 7)] })).join("\n");

  test("is tokenised as training goes: of a large one only the first piece is read", async () => {
    const inside = memorySource(new TextEncoder().encode(lines(200_000)));
    let bytesRead = 0;
    const source = {
      ...inside,
      read(offset: number, length: number): Promise<Uint8Array> {
        bytesRead += length;
        return inside.read(offset, length);
      },
    };
    expect(inside.sizeBytes).toBeGreaterThan(4e6);
    const given = rowStream(() => readRecords(source, "train.jsonl"), "train.jsonl", undefined, limits);
    const { numbers } = await run({ rows: given, maxLength: 8 });
    expect(numbers).toHaveLength(3);
    expect(bytesRead).toBe(2 ** 20);
  });

  const all = async (text: string, epochs?: number): Promise<number[]> => {
    const source = memorySource(new TextEncoder().encode(text));
    const records = (): ReturnType<typeof readRecords> => readRecords(source, "train.jsonl");
    const first: number[] = [];
    const options = { ...limits, ...(epochs !== undefined && { epochs }) };
    for await (const { inputIds } of rowStream(records, "train.jsonl", undefined, options))
      first.push(inputIds[0] ?? -1);
    return first;
  };

  test("comes once, or as often as there are epochs", async () => {
    expect(await all(lines(3))).toEqual([0, 1, 2]);
    expect(await all(lines(3), 2)).toEqual([0, 1, 2, 0, 1, 2]);
  });

  test("names the line of a record that is none, and a file without rows", async () => {
    await expect(all(`${lines(2)}\n{"input_ids":[99]}`)).rejects.toThrow(/^train\.jsonl:3: /);
    await expect(all("", Number.POSITIVE_INFINITY)).rejects.toThrow(
      /^train\.jsonl: must have at least one row, got an empty file/,
    );
  });
});
