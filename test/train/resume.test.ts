// A run that goes on from a checkpoint is the run that was never cut off, bit for bit.
import { beforeAll, describe, expect, test } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { initLora, type LoraInit } from "../../src/lora/init.ts";
import { loadModel } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { readAll, tensor } from "../../src/tensor/tensor.ts";
import { AdamW } from "../../src/train/adamw.ts";
import { decodeState, encodeState, type TrainingState } from "../../src/train/checkpoint.ts";
import type { Row } from "../../src/train/data.ts";
import { evaluate } from "../../src/train/loss.ts";
import type { StepMetrics } from "../../src/train/step-metrics.ts";
import { type TrainOptions, train } from "../../src/train/trainer.ts";
import { testGpu } from "../harness.ts";

const row = (...inputIds: number[]): Row => ({ inputIds, labels: inputIds });
const rows = [row(1, 2, 3, 4), row(5, 6, 7, 8, 9, 10), row(11, 12), row(13, 14, 15), row(16, 17, 18, 19, 20)];
const STEPS = 20;

let gpu: Gpu;
beforeAll(async () => {
  gpu = await testGpu();
});

interface Setting {
  readonly config?: Partial<LoraConfig>;
  readonly init?: LoraInit;
  readonly options?: Partial<TrainOptions>;
  /** LoRA+ */
  readonly ratio?: number;
  readonly evaluatesEvery?: number;
}

/** A run in a model of its own, as a new process would have one. */
async function run({ config, init, options, ratio, evaluatesEvery }: Setting, more: Partial<TrainOptions> = {}) {
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter: LoraAdapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", ...config }, 5);
  if (init) await initLora(adapter, init, 5);
  const metrics: StepMetrics[] = [];
  const training = train({
    ...{ model, adapter, parameters: adapter.parameters, rows, steps: STEPS, batchSize: 2, seed: 9, shuffleSeed: 3 },
    ...{ learningRate: 1e-2, warmupSteps: 2, weightDecay: 0.1, maxGradNorm: 0.5 },
    rates: ratio === undefined ? undefined : adapter.rates(ratio),
    ...(evaluatesEvery && { validation: { every: evaluatesEvery, evaluate: () => evaluate(model, rows, 2) } }),
    ...options,
    ...more,
  });
  for await (const m of training) metrics.push(m);
  const values = await readAll(adapter.parameters);
  const { loss } = await evaluate(model, rows, 2);
  adapter.detach();
  model.destroy();
  return { values, metrics, loss };
}

/** The state as it comes back from its file. */
async function throughFile(state: TrainingState): Promise<TrainingState> {
  const pieces: Uint8Array[] = [];
  for await (const piece of encodeState(state)) pieces.push(piece.slice());
  const bytes = Uint8Array.from(pieces.flatMap((piece) => [...piece]));
  return decodeState(memoryDirectory("memory", { state: bytes }), "state");
}

/** Checkpoints into a list. */
const keeping = (states: TrainingState[], every?: number): TrainOptions["checkpoint"] => ({
  every,
  save: (state) => void states.push(state),
});

const numbers = (metrics: readonly StepMetrics[]): unknown[] =>
  metrics.map((m) => [m.step, m.loss, m.grad_norm, m.learning_rate, m.tokens, m.validation]);

async function cutAt(setting: Setting, step: number): Promise<void> {
  const whole = await run(setting);
  const states: TrainingState[] = [];
  const abort = new AbortController();
  const save = (state: TrainingState): void => {
    states.push(state);
    abort.abort();
  };
  const first = await run(setting, { checkpoint: { every: step, save }, signal: abort.signal });
  expect(first.metrics).toHaveLength(step);
  expect(states).toHaveLength(1);
  const second = await run(setting, { from: await throughFile(states[0] as TrainingState) });
  expect(second.metrics[0]?.step).toBe(step + 1);
  expect([...numbers(first.metrics), ...numbers(second.metrics)]).toEqual(numbers(whole.metrics));
  expect(second.values).toEqual(whole.values);
}

describe("20 steps equal 7 and 13 more, to the last bit,", () => {
  test.each<[what: string, setting: Setting]>([
    ["as it comes", {}],
    ["with dropout and accumulation", { config: { dropout: 0.3 }, options: { gradAccumulation: 3 } }],
    ["with noise and smoothed labels", { options: { neftuneAlpha: 5, labelSmoothing: 0.1, gradAccumulation: 2 } }],
    ["with LoRA+ and DoRA", { config: { useDora: true }, ratio: 8 }],
    ["begun by PiSSA", { init: "pissa" }],
    ["begun by OLoRA with DoRA", { init: "olora", config: { useDora: true } }],
  ])("%s", (_, setting) => cutAt(setting, 7));
});

test("an aborted run gives its state, and goes on from there", async () => {
  const whole = await run({});
  const abort = new AbortController();
  const states: TrainingState[] = [];
  const evaluateAndAbort = async (): Promise<{ loss: number }> => {
    abort.abort();
    return { loss: 1 };
  };
  await run(
    {},
    { checkpoint: keeping(states), signal: abort.signal, validation: { every: 5, evaluate: evaluateAndAbort } },
  );
  expect(states.map(({ optimizer }) => optimizer.stepCount)).toEqual([5]);
  expect((await run({}, { from: states[0] })).values).toEqual(whole.values);
});

test("steps that were not finite are counted across a checkpoint", async () => {
  const states: TrainingState[] = [];
  const checkpoint = keeping(states, 3);
  const options = { learningRate: 1e30, maxGradNorm: 0, warmupSteps: 0 };
  await expect(run({ options }, { checkpoint })).rejects.toThrow("at step 6, the last of 5 such steps in a row");
  expect(states.map(({ badSteps }) => badSteps)).toEqual([2]);
  await expect(run({ options }, { from: states[0] })).rejects.toThrow("at step 6, the last of 5 such steps in a row");
});

test("a state of other parameters is refused before anything is changed", async () => {
  const state: TrainingState = {
    optimizer: { stepCount: 1, runs: [{ p: new Float32Array(3), m: new Float32Array(3), v: new Float32Array(3) }] },
    batchCount: 1,
    badSteps: 0,
  };
  const p = tensor(gpu, [1, 2], [2]);
  const optimizer = new AdamW([p]);
  expect(() => optimizer.restore(state.optimizer)).toThrow(
    new ShapeError("AdamW: a state must have runs of [2] elements, got [3]"),
  );
  expect(optimizer.stepCount).toBe(0);
  expect(await readAll([p])).toEqual([Float32Array.of(1, 2)]);
  optimizer.destroy();
});

test("a file that is no training state says what is wrong with it", async () => {
  await expect(decodeState(memoryDirectory("m", {}), "state")).rejects.toThrow(
    new FormatError("m/state: must be a training state, got nothing there"),
  );
  const empty = async (metadata: string): Promise<Uint8Array> => {
    const header = new TextEncoder().encode(JSON.stringify({ __metadata__: { training: metadata } }));
    const file = new Uint8Array(8 + header.length);
    new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
    file.set(header, 8);
    return file;
  };
  const decode = async (metadata: string): Promise<TrainingState> =>
    decodeState(memoryDirectory("m", { state: await empty(metadata) }), "state");
  await expect(decode('{"format":7}')).rejects.toThrow(
    new FormatError("m/state: must be a training state of format 1, got 7"),
  );
  const wrong = '{"format":1,"step":-1,"batches":0,"bad_steps":0}';
  await expect(decode(wrong)).rejects.toThrow(
    new FormatError(`m/state: step, batches, bad_steps, rows and best must be numbers, got ${wrong}`),
  );
});

describe("validation", () => {
  const losses = [3, 2, 2.5, Number.NaN, 1, 4, 4, 4];
  const scripted = (from = 0): (() => Promise<{ loss: number }>) => {
    let i = from;
    return async () => ({ loss: losses[i++] ?? 9 });
  };

  test("says which step was the best, and ends training when the patience is over", async () => {
    const { metrics } = await run({}, { steps: 30, validation: { every: 2, evaluate: scripted(), patience: 3 } });
    const seen = metrics.flatMap(({ step, validation }) =>
      validation ? [[step, validation.loss, validation.best]] : [],
    );
    expect(seen).toEqual(losses.map((loss, i) => [2 * (i + 1), loss, [0, 1, 4].includes(i)]));
    expect(metrics.at(-1)?.step).toBe(16);
  });

  test("goes on from a checkpoint with its patience", async () => {
    const states: TrainingState[] = [];
    const checkpoint = keeping(states, 12);
    await run({}, { steps: 14, validation: { every: 2, evaluate: scripted(), patience: 3 }, checkpoint });
    const [from] = states as [TrainingState];
    expect(from.best).toEqual({ step: 10, loss: 1, since: 1 });
    const { metrics } = await run(
      {},
      { steps: 30, from, validation: { every: 2, evaluate: scripted(6), patience: 3 } },
    );
    expect(metrics.map(({ step }) => step)).toEqual([13, 14, 15, 16]);
  });

  test("sees the parameters of its step and changes nothing", async () => {
    const plain = await run({});
    const { values, metrics, loss } = await run({ evaluatesEvery: 8 });
    expect(values).toEqual(plain.values);
    expect(metrics.filter((m) => m.validation).map(({ step }) => step)).toEqual([8, 16, 20]);
    expect(metrics.at(-1)?.validation?.loss).toBe(loss);
  });

  test("settings out of range name the rule and the value", async () => {
    const refused = (validation: object): Promise<unknown> =>
      run({}, { validation: { every: 1, evaluate: scripted(), ...validation } });
    await expect(refused({ every: 0 })).rejects.toThrow(
      new ShapeError("train: every of the validation must be a whole number of at least 1, got 0"),
    );
    await expect(refused({ patience: 0.5 })).rejects.toThrow(
      new ShapeError("train: patience of the validation must be a whole number of at least 1, got 0.5"),
    );
  });
});
