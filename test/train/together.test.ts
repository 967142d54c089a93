// Several adapters trained in one batch: each must come out as if it were trained alone.
import { expect, test } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { SharedBase } from "../../src/lora/shared-base.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { emptyModel, loadModel } from "../../src/models/load.ts";
import type { WeightFormat } from "../../src/models/weights.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { tensorsIn } from "../../src/tensor/packed.ts";
import { Random } from "../../src/tensor/random.ts";
import { readAll, type Tensor } from "../../src/tensor/tensor.ts";
import { type Batch, collate } from "../../src/train/batches.ts";
import type { Row } from "../../src/train/data.ts";
import { LaneStep } from "../../src/train/lane-step.ts";
import { evaluate } from "../../src/train/loss.ts";
import { planTraining } from "../../src/train/plan.ts";
import { TrainingStep } from "../../src/train/step.ts";
import type { StepMetrics } from "../../src/train/step-metrics.ts";
import type { StepResult } from "../../src/train/step-ring.ts";
import { type LaneOptions, trainTogether } from "../../src/train/together.ts";
import { train } from "../../src/train/trainer.ts";
import { randomNd, testGpu } from "../harness.ts";

const MODEL = "test/golden/llama-default";
const row = (...inputIds: number[]): Row => ({ inputIds, labels: inputIds });
const ROWS = [
  row(1, 2, 3, 4),
  row(5, 6, 7, 8, 9, 10),
  row(11, 12),
  row(13, 14, 15),
  row(16, 17, 18, 19, 20),
  row(...Array.from({ length: 21 }, (_, i) => 20 + i)),
];
const OTHERS = [row(30, 31, 32, 33, 34, 35, 36), row(3, 1, 4, 1, 5), row(9, 2, 6), row(8, 8)];

interface Setup {
  readonly seed: number;
  readonly config: Partial<LoraConfig>;
  readonly options: Omit<LaneOptions, "validation">;
}

const LANES: readonly Setup[] = [
  {
    seed: 0,
    config: { r: 2, alpha: 4 },
    options: { rows: ROWS, steps: 7, batchSize: 2, learningRate: 1e-2, maxGradNorm: 0.5, shuffleSeed: 1 },
  },
  {
    seed: 1,
    config: { r: 4, alpha: 16 },
    options: { rows: OTHERS, steps: 6, batchSize: 3, learningRate: 3e-3, schedule: "cosine", weightDecay: 0.1 },
  },
  {
    seed: 2,
    config: { r: 3, alpha: 3, useRslora: true }, // its A's are no one matrix
    options: { rows: ROWS, steps: 8, batchSize: 1, learningRate: 2e-2, warmupSteps: 2, beta2: 0.99, maxGradNorm: 2 },
  },
];

interface Trained {
  readonly metrics: StepMetrics[];
  readonly values: Float32Array[];
}

function attach(model: CausalModel, config: Partial<LoraConfig>, seed: number): LoraAdapter {
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear", ...config }, seed);
  const random = new Random(seed);
  for (const { B } of adapter.pairs.values()) B.gpu.write(B, Float32Array.from(randomNd(B.shape, random, 0.1).data));
  return adapter;
}

async function apart(model: CausalModel, lanes: readonly Setup[], labelSmoothing = 0): Promise<Trained[]> {
  const all: Trained[] = [];
  for (const { seed, config, options } of lanes) {
    const adapter = attach(model, config, seed);
    const metrics: StepMetrics[] = [];
    const settings = { model, labelSmoothing, parameters: adapter.parameters };
    for await (const one of train({ ...settings, ...options })) metrics.push(one);
    all.push({ metrics, values: await readAll(adapter.parameters) });
    adapter.detach();
  }
  return all;
}

async function together(model: CausalModel, lanes: readonly Setup[], labelSmoothing = 0): Promise<Trained[]> {
  const adapters = lanes.map(({ config, seed }) => attach(model, config, seed));
  const all = lanes.map((): StepMetrics[] => []);
  const shared = new SharedBase(adapters);
  const settings = { model, shared, labelSmoothing, lanes: lanes.map(({ options }) => options) };
  for await (const { lane, metrics } of trainTogether(settings)) if (metrics) all[lane]?.push(metrics);
  const values = await Promise.all(adapters.map(({ parameters }) => readAll(parameters)));
  for (const adapter of adapters) adapter.detach();
  return all.map((metrics, i) => ({ metrics, values: values[i] ?? [] }));
}

/** ‖a − b‖ / ‖b‖ */
function distance(a: readonly Float32Array[], b: readonly Float32Array[]): number {
  let [off, all] = [0, 0];
  b.forEach((values, i) => {
    values.forEach((value, j) => {
      off += ((a[i]?.[j] ?? Number.NaN) - value) ** 2;
      all += value ** 2;
    });
  });
  return Math.sqrt(off / all);
}

function expectSame(got: readonly Trained[], expected: readonly Trained[]): void {
  for (const [i, { metrics, values }] of expected.entries()) {
    const mine = got[i] as Trained;
    expect(
      mine.metrics.map(({ step, learning_rate, tokens, skipped }) => [step, learning_rate, tokens, skipped]),
    ).toEqual(metrics.map(({ step, learning_rate, tokens, skipped }) => [step, learning_rate, tokens, skipped]));
    for (const [k, { loss, grad_norm }] of metrics.entries()) {
      const one = mine.metrics[k] as StepMetrics;
      expect(Math.abs(one.loss / loss - 1), `loss of lane ${i}, step ${k + 1}`).toBeLessThanOrEqual(1e-5);
      expect(Math.abs(one.grad_norm / grad_norm - 1), `norm of lane ${i}, step ${k + 1}`).toBeLessThanOrEqual(1e-5);
    }
    expect(distance(mine.values, values), `parameters of lane ${i}`).toBeLessThanOrEqual(1e-5);
  }
}

async function withModel<T>(
  f: (model: CausalModel, gpu: Gpu) => Promise<T>,
  weights: WeightFormat = "f32",
): Promise<T> {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory(MODEL), { weights });
  try {
    return await f(model, gpu);
  } finally {
    model.destroy();
  }
}

test.each([
  ["two", "f32", false],
  ["three", "f32", false],
  ["two", "nf4", false],
  ["two", "int8", true],
] as const)(
  "%s adapters of different ranks, alphas, rows and rates come out as they do alone: %s, checkpointing %s",
  (count, weights, checkpointing) =>
    withModel(async (model) => {
      model.checkpointing = checkpointing;
      const lanes = LANES.slice(0, count === "two" ? 2 : 3);
      expectSame(await together(model, lanes), await apart(model, lanes));
    }, weights),
);

test("a lane that is not finite ends by itself, and the others come out as they do alone", () =>
  withModel(async (model, gpu) => {
    const good = LANES.slice(0, 2);
    const adapters = [
      attach(model, LANES[0]?.config ?? {}, 0),
      attach(model, {}, 7),
      attach(model, LANES[1]?.config ?? {}, 1),
    ];
    const broken = adapters[1]?.parameters ?? [];
    for (const t of broken) gpu.write(t, new Float32Array(t.size).fill(Number.POSITIVE_INFINITY));
    const before = await readAll(broken);
    const lanes = [LANES[0], { options: { rows: OTHERS, steps: 100, batchSize: 2, learningRate: 1 } }, LANES[1]];
    const all = lanes.map((): StepMetrics[] => []);
    const failures: string[] = [];
    const options = { model, shared: new SharedBase(adapters), lanes: lanes.map((lane) => (lane as Setup).options) };
    for await (const { lane, metrics, failure } of trainTogether(options)) {
      if (metrics) all[lane]?.push(metrics);
      else failures.push(`${lane}: ${failure.message}`);
    }
    expect(failures).toEqual([
      "1: train: loss and gradient norm must stay finite, got NaN and NaN at step 5, the last of 5 such steps in a row. The parameters are those of step 0. Use a lower learning rate or a maxGradNorm",
    ]);
    expect(all[1]?.map(({ step, skipped }) => [step, skipped])).toEqual([1, 2, 3, 4, 5].map((step) => [step, true]));
    expect(await readAll(broken)).toEqual(before);
    const values = await Promise.all([0, 2].map((i) => readAll(adapters[i]?.parameters ?? [])));
    for (const adapter of adapters) adapter.detach();
    const got = [0, 2].map((lane, i) => ({ metrics: all[lane] ?? [], values: values[i] ?? [] }));
    expectSame(got, await apart(model, good));
  }));

test("one whose signal is aborted drops out, and the others come out as they do alone", () =>
  withModel(async (model) => {
    const adapters = LANES.map(({ config, seed }) => attach(model, config, seed));
    const stop = new AbortController();
    const lanes = LANES.map(({ options }, i) => ({ ...options, ...(i === 1 && { signal: stop.signal }) }));
    const all = lanes.map((): StepMetrics[] => []);
    for await (const { lane, metrics } of trainTogether({
      model,
      shared: new SharedBase(adapters),
      lanes,
      readEvery: 1,
    })) {
      if (metrics) all[lane]?.push(metrics);
      if (lane === 1 && metrics?.step === 2) stop.abort();
    }
    const values = await Promise.all(adapters.map(({ parameters }) => readAll(parameters)));
    for (const adapter of adapters) adapter.detach();
    expect(all.map(({ length }) => length)).toEqual([7, 2, 8]);
    const got = [0, 2].map((i) => ({ metrics: all[i] ?? [], values: values[i] ?? [] }));
    expectSame(got, await apart(model, [LANES[0] as Setup, LANES[2] as Setup]));
  }));

test("a validation sees its own adapter alone, as it is after its step, and its patience ends its lane", () =>
  withModel(async (model) => {
    const adapters = LANES.slice(0, 2).map(({ config, seed }) => attach(model, config, seed));
    const [first] = adapters;
    const losses: number[] = [];
    const validations = [
      { every: 2, evaluate: () => evaluate(model, OTHERS, 4) },
      { every: 1, patience: 1, evaluate: async () => ({ loss: 1 }) },
    ];
    const lanes = LANES.slice(0, 2).map(({ options }, i) => ({ ...options, validation: validations[i] }));
    const steps = [0, 0];
    for await (const { lane, metrics } of trainTogether({ model, shared: new SharedBase(adapters), lanes })) {
      steps[lane] = metrics?.step ?? 0;
      if (lane === 0 && metrics?.validation) losses.push(metrics.validation.loss);
    }
    expect(steps).toEqual([7, 2]);
    expect(losses.length).toBe(4); // after steps 2, 4, 6 and 7
    first?.enable();
    expect((await evaluate(model, OTHERS, 4)).loss).toBe(losses[3]);
    for (const adapter of adapters) adapter.detach();
  }));

/** Products with each weight in the one plan of a step. */
function productsOf(plans: LaneStep["plans"], model: CausalModel): number[] {
  const [plan] = [...plans.values()];
  const weights = [...model.linears.values()].map(({ weight }) => tensorsIn(weight)[0] as Tensor);
  return [...weights, ...model.head].map(
    ({ buffer }) =>
      (plan?.dispatches ?? []).filter(
        (one) => /^matmul/.test(one.pipeline.name) && one.buffers.some((b) => b.buffer === buffer),
      ).length,
  );
}

test("each W of the base is multiplied as often for three adapters as for one, and a step makes no GPU objects", () =>
  withModel(async (model, gpu) => {
    const batch = collate([row(1, 2, 3, 4)], 0, 16);
    const alone = attach(model, {}, 0);
    const single = new TrainingStep({ model, parameters: alone.parameters });
    single.run([batch], 1e-3);
    alone.disable();
    const adapters = LANES.map(({ config, seed }) => attach(model, config, seed));

    const step = new LaneStep({ model, shared: new SharedBase(adapters), lanes: adapters.map(() => ({})) });
    const work = { batch, learningRate: 1e-3 };
    step.run([work, work, work]);
    expect(productsOf(step.plans, model)).toEqual(productsOf(single.plans, model));
    expect(Math.max(...productsOf(step.plans, model))).toBe(2);
    await step.read();
    const { buffersCreated, bindGroupsCreated, submits } = gpu.counters();
    for (let i = 0; i < 3; i++) step.run([work, work, work]);
    const after = gpu.counters();
    expect([after.buffersCreated - buffersCreated, after.bindGroupsCreated - bindGroupsCreated]).toEqual([0, 0]);
    expect(after.submits - submits).toBe(3);
    await step.read();
    step.destroy();
    single.destroy();
    for (const adapter of [alone, ...adapters]) adapter.detach();
  }));

test("replayed or eager, and packed with rows that are not: the same", () =>
  withModel(async (model) => {
    const packed = collate([{ ...row(1, 2, 3, 4, 5, 6, 7), starts: [0, 3] }], 0, 16);
    const plain = collate([row(5, 6, 7, 8), row(9, 10)], 0, 16);
    const run = async (eager: boolean) => {
      const adapters = LANES.slice(0, 2).map(({ config, seed }) => attach(model, config, seed));
      const step = new LaneStep({ model, shared: new SharedBase(adapters), lanes: [{ maxGradNorm: 1 }, {}], eager });
      for (let i = 0; i < 5; i++) step.run([packed, plain].map((batch) => ({ batch, learningRate: 1e-2 })));
      const results = await step.read();
      const values = await Promise.all(adapters.map(({ parameters }) => readAll(parameters)));
      step.destroy();
      for (const adapter of adapters) adapter.detach();
      return { results, values };
    };
    const replayed = await run(false);
    expect(await run(true)).toEqual(replayed);
    for (const [i, batch] of [packed, plain].entries()) {
      const adapter = attach(model, LANES[i]?.config ?? {}, i);
      const step = new TrainingStep({ model, parameters: adapter.parameters, maxGradNorm: i === 0 ? 1 : 0 });
      for (let k = 0; k < 5; k++) step.run([batch], 1e-2);
      for (const [k, { loss }] of (await step.read()).entries())
        expect(Math.abs((replayed.results[i]?.[k]?.loss ?? Number.NaN) / loss - 1)).toBeLessThanOrEqual(1e-5);
      expect(distance(replayed.values[i] ?? [], await readAll(adapter.parameters))).toBeLessThanOrEqual(1e-5);
      step.destroy();
      adapter.detach();
    }
  }));

test.each(["gpt2", "gemma2", "phi3", "qwen3"])(
  "a step on %s has the losses and norms that its adapters have alone",
  async (name) => {
    const gpu = await testGpu();
    const model = await loadModel(gpu, diskDirectory(`test/golden/models/${name}`));
    const batches = [collate([row(1, 2, 3, 4, 5)], 0, 16), collate([row(5, 6, 7, 8), row(9, 10)], 0, 16)];
    const adapters = batches.map((_, i) => attach(model, { r: 4 * (i + 1), alpha: 3 + i }, i));
    const alone: unknown[] = [];
    for (const adapter of adapters) adapter.disable();
    for (const [i, adapter] of adapters.entries()) {
      adapter.enable();
      const single = new TrainingStep({ model, parameters: adapter.parameters });
      single.run([batches[i] as Batch], 0);
      const [{ loss, gradNorm }] = (await single.read()) as [StepResult];
      alone.push(loss, gradNorm);
      single.destroy();
      adapter.disable();
    }
    const step = new LaneStep({ model, shared: new SharedBase(adapters), lanes: [{}, {}] });
    step.run(batches.map((batch) => ({ batch, learningRate: 0 })));
    const shared = (await step.read()).flatMap(([one]) => [one?.loss ?? Number.NaN, one?.gradNorm ?? Number.NaN]);
    shared.forEach((value, i) => {
      expect(Math.abs(value / Number(alone[i]) - 1)).toBeLessThanOrEqual(1e-5);
    });
    step.destroy();
    for (const adapter of adapters) adapter.detach();
    model.destroy();
  },
);

test("with smoothed labels they come out as they do alone, and otherwise than without", () =>
  withModel(async (model) => {
    const lanes = LANES.slice(0, 2);
    const smooth = await together(model, lanes, 0.2);
    expectSame(smooth, await apart(model, lanes, 0.2));
    const [plain] = await together(model, lanes);
    expect(Math.abs(Number(smooth[0]?.metrics[0]?.loss) - Number(plain?.metrics[0]?.loss))).toBeGreaterThan(1e-2);
  }));

test("a lane whose rows are all masked stays as it is and goes on, and the others come out as they do alone", () =>
  withModel(async (model) => {
    const [first, second] = LANES as [Setup, Setup];
    const masked = ROWS.map(({ inputIds }) => ({ inputIds, labels: inputIds.map(() => -100) }));
    const lanes = [{ ...first, options: { ...first.options, rows: masked } }, second];
    const adapter = attach(model, first.config, first.seed);
    const before = await readAll(adapter.parameters);
    adapter.detach();
    const [idle, other] = await together(model, lanes);
    expect(idle?.metrics.map(({ skipped, loss, grad_norm }) => [skipped, loss, grad_norm])).toEqual(
      new Array(first.options.steps).fill([true, 0, 0]),
    );
    expect(idle?.values).toEqual(before);
    expectSame([other as Trained], await apart(model, [second]));
  }));

test("takes the memory that is planned for it, with rows of many lengths, but for constants", async () => {
  const gpu = await testGpu();
  const config = { r: 2, alpha: 4, targetModules: "all-linear" };
  const plan = await planTraining(
    gpu,
    async (dry) => {
      const model = await emptyModel(dry, diskDirectory(MODEL));
      return { model, shared: new SharedBase([attachLora(model, config), attachLora(model, { ...config, r: 4 })]) };
    },
    { batchSize: 2, maxLength: 32 },
  );
  const { bytesLive } = gpu.counters();
  gpu.resetCounters();
  const model = await loadModel(gpu, diskDirectory(MODEL));
  const adapters = [attachLora(model, config), attachLora(model, { ...config, r: 4 })];
  const full = row(...Array.from({ length: 32 }, (_, i) => i));
  const shared = new SharedBase(adapters);
  const peakOf = async (rows: readonly Row[], ...steps: number[]): Promise<number> => {
    const lanes = steps.map((count) => ({ rows, steps: count, batchSize: 2, learningRate: 1e-3 }));
    for await (const { metrics } of trainTogether({ model, shared, lanes })) expect(metrics?.skipped).toBe(false);
    return gpu.counters().bytesPeak - bytesLive;
  };
  const one = [full, full];
  expect(await peakOf(one, 2, 2)).toBe(plan.peak);
  expect((await peakOf([...one, ...ROWS, ...OTHERS], 6, 8)) - plan.peak).toBeLessThanOrEqual(16 * 256); // each shape has a constant of its own, the gradient's seed
  for (const adapter of adapters) adapter.detach();
  model.destroy();
});

test("settings out of range, batches that do not fit and missing settings are refused", () =>
  withModel(async (model) => {
    const adapters = [attach(model, {}, 0), attach(model, {}, 1)];
    const shared = new SharedBase(adapters);
    const lane = { rows: ROWS, steps: 2, batchSize: 2, learningRate: 1e-3 };
    const run = async (lanes: readonly LaneOptions[]): Promise<void> => {
      for await (const _ of trainTogether({ model, shared, lanes }));
    };
    await expect(run([lane, { ...lane, steps: 0 }])).rejects.toThrow(
      new ShapeError("train: steps must be a whole number of at least 1, got 0"),
    );
    await expect(run([lane])).rejects.toThrow(
      new ShapeError("LaneStep: each adapter needs settings, got 1 for 2 adapters"),
    );
    const step = new LaneStep({ model, shared, lanes: [{}, {}] });
    const of = (T: number) => ({ batch: collate([row(1, 2, 3)], 0, T), learningRate: 1 });
    const rule = "LaneStep: a step needs batches of one length, a multiple of 16, got";
    expect(() => step.run([])).toThrow(new ShapeError(`${rule} none`));
    expect(() => step.run([of(16), of(32)])).toThrow(new ShapeError(`${rule} 16 and 32`));
    expect(() => step.run([undefined, of(12)])).toThrow(new ShapeError(`${rule} 12`));
    step.destroy();
    for (const adapter of adapters) adapter.detach();
  }));
