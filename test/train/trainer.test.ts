import { readFileSync } from "node:fs";
import { describe, expect, test, vi } from "vitest";
import { openGpu } from "../../src/gpu/gpu.ts";
import { diskDirectory } from "../../src/io/files.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { readConfig } from "../../src/models/config.ts";
import { loadModel, makeModel, weightShapes } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { empty, readAll, slice, type Tensor, tensor, view } from "../../src/tensor/tensor.ts";
import { AdamW } from "../../src/train/adamw.ts";
import type { TrainingState } from "../../src/train/checkpoint.ts";
import type { Row } from "../../src/train/data.ts";
import { evaluate } from "../../src/train/loss.ts";
import { type MemoryPlan, planTraining } from "../../src/train/plan.ts";
import { scheduleFactor } from "../../src/train/schedule.ts";
import type { StepMetrics } from "../../src/train/step-metrics.ts";
import { type TrainOptions, train } from "../../src/train/trainer.ts";
import { expectClose, testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";

const row = (...inputIds: number[]): Row => ({ inputIds, labels: inputIds });
const rows = [row(1, 2, 3, 4), row(5, 6, 7, 8, 9, 10), row(11, 12), row(13, 14, 15), row(16, 17, 18, 19, 20)];

async function run(
  options: Partial<TrainOptions> | ((adapter: LoraAdapter) => Partial<TrainOptions>),
  checkpointing = false,
  onStep: (adapter: LoraAdapter) => void = () => {},
): Promise<{ metrics: StepMetrics[]; values: Float32Array[] }> {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  model.checkpointing = checkpointing;
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: "all-linear" }, 5);
  const metrics: StepMetrics[] = [];
  const base = {
    model,
    parameters: adapter.parameters,
    rows,
    steps: 2,
    batchSize: 2,
    learningRate: 1e-2,
    schedule: "constant",
  } as const;
  const more = typeof options === "function" ? options(adapter) : options;
  for await (const m of train({ ...base, adapter, ...more })) {
    metrics.push(m);
    onStep(adapter);
  }
  const values = await readAll(adapter.parameters);
  adapter.detach();
  model.destroy();
  return { metrics, values };
}

test("accumulating two halves is one step on the whole, token by token", async () => {
  const whole = await run({ rows: rows.slice(0, 4), batchSize: 4 });
  const halves = await run({ rows: rows.slice(0, 4), batchSize: 2, gradAccumulation: 2 });
  expectClose(
    halves.metrics.map((m) => m.loss),
    whole.metrics.map((m) => m.loss),
    1e-6,
    "loss",
  );
  expectClose(
    halves.metrics.map((m) => m.grad_norm),
    whole.metrics.map((m) => m.grad_norm),
    1e-5,
    "norm",
  );
  for (const [i, v] of halves.values.entries()) expectClose(v, whole.values[i] ?? [], 1e-5, "adapter");
});

test("the same seed repeats bit for bit, another seed shuffles differently", async () => {
  const first = await run({ shuffleSeed: 1, steps: 4 });
  const again = await run({ shuffleSeed: 1, steps: 4 });
  const other = await run({ shuffleSeed: 2, steps: 4 });
  expect(again.values).toEqual(first.values);
  expect(again.metrics.map((m) => m.loss)).toEqual(first.metrics.map((m) => m.loss));
  expect(other.metrics.map((m) => m.loss)).not.toEqual(first.metrics.map((m) => m.loss));
});

test("training lowers the loss it trains on", async () => {
  const { metrics } = await run({ steps: 20, batchSize: 5 });
  expect(metrics.at(-1)?.loss ?? Number.NaN).toBeLessThan(0.8 * (metrics[0]?.loss ?? 0));
  expect(metrics.map((m) => m.step)).toEqual(Array.from({ length: 20 }, (_, i) => i + 1));
  expect(metrics[0]?.tokens).toBe(20);
});

test("padding changes neither loss nor gradient", async () => {
  const one = await run({ padId: 0 });
  const two = await run({ padId: 63 });
  expect(two.metrics.map((m) => m.loss)).toEqual(one.metrics.map((m) => m.loss));
  expect(two.values).toEqual(one.values);
});

test("a step whose gradient is not finite is not taken; five in a row end the run", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  const broken = model.weights.get("model.norm.weight") as Tensor;
  gpu.write(broken, new Float32Array(broken.size).fill(Number.NaN));
  const before = await readAll(adapter.parameters);
  const seen: StepMetrics[] = [];
  const training = async (): Promise<void> => {
    const options = {
      model,
      parameters: adapter.parameters,
      rows,
      steps: 20,
      batchSize: 2,
      learningRate: 1,
      maxGradNorm: 1,
    };
    for await (const metrics of train(options)) seen.push(metrics);
  };
  await expect(training()).rejects.toThrow(
    new ShapeError(
      "train: loss and gradient norm must stay finite, got NaN and NaN at step 5, the last of 5 such steps in a row. The parameters are those of step 0. Use a lower learning rate or a maxGradNorm",
    ),
  );
  expect(seen.map(({ step, skipped }) => [step, skipped])).toEqual([1, 2, 3, 4, 5].map((step) => [step, true]));
  expect(await readAll(adapter.parameters)).toEqual(before);
  adapter.detach();
  model.destroy();
});

test("one bad step is skipped and counted, and training goes on", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  const norm = model.weights.get("model.norm.weight") as Tensor;
  const [good = new Float32Array()] = await readAll([norm]);
  const skipped: boolean[] = [];
  const after: Float32Array[] = [];
  const options = {
    model,
    parameters: adapter.parameters,
    rows,
    steps: 4,
    batchSize: 2,
    learningRate: 1e-2,
    readEvery: 1,
  };
  for await (const metrics of train({ ...options, schedule: "constant" })) {
    skipped.push(metrics.skipped);
    after.push(...(await readAll(adapter.parameters.slice(0, 1))));
    gpu.write(norm, metrics.step === 2 ? new Float32Array(norm.size).fill(Number.NaN) : good);
  }
  expect(skipped).toEqual([false, false, true, false]);
  expect(after[2]).toEqual(after[1]);
  expect(after[3]).not.toEqual(after[2]);
  adapter.detach();
  model.destroy();
});

test("a step whose rows are all masked changes nothing and is no bad one, wherever it comes", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  const masked = { inputIds: [1, 2, 3], labels: [-100, -100, -100] };
  const all = [row(1, 2, 3, 4), ...new Array<Row>(6).fill(masked), row(5, 6, 7)];
  const settings = { model, parameters: adapter.parameters, batchSize: 1, learningRate: 1e-2, weightDecay: 0.1 };
  const states: TrainingState[] = [];
  const seen: [skipped: boolean, loss: number, norm: number][] = [];
  const options = { rows: all, steps: 8, schedule: "constant", readEvery: 1 } as const;
  const checkpoint = { every: 1, save: (state: TrainingState) => void states.push(state) };
  for await (const { skipped, loss, grad_norm } of train({ ...settings, ...options, checkpoint }))
    seen.push([skipped, loss, grad_norm]);
  expect(seen.map(([skipped]) => skipped)).toEqual([false, true, true, true, true, true, true, false]);
  expect(seen.slice(1, 7)).toEqual(new Array(6).fill([true, 0, 0]));
  for (const { optimizer, badSteps } of states.slice(1, 7)) {
    expect(optimizer.runs).toEqual(states[0]?.optimizer.runs);
    expect(badSteps).toBe(0);
  }
  expect(states[7]?.optimizer.runs).not.toEqual(states[0]?.optimizer.runs);
  await expect(evaluate(model, [masked, masked], 2)).rejects.toThrow(
    new ShapeError("evaluate: rows must have a target token, got none in 2"),
  );
  model.destroy();
});

test("a masked row beside others changes neither loss nor gradient", async () => {
  const some = rows.slice(0, 2);
  const masked = { inputIds: [9, 8, 7], labels: [-100, -100, -100] };
  const [plain, beside] = [await run({ rows: some }), await run({ rows: [...some, masked], batchSize: 3 })];
  const halves = await run({ rows: [...some, masked], batchSize: 2, gradAccumulation: 2 });
  for (const { metrics } of [beside, halves])
    expectClose(
      [metrics[0]?.loss ?? 0, metrics[0]?.grad_norm ?? 0],
      [plain.metrics[0]?.loss ?? 0, plain.metrics[0]?.grad_norm ?? 0],
      1e-5,
    );
});

test("replayed, eager and read late: the same bits", async () => {
  const settings = { steps: 6, shuffleSeed: 3, maxGradNorm: 0.1 } as const;
  const replayed = await run(settings);
  for (const other of [{ eager: true }, { readEvery: 1 }, { readEvery: 3, pauseEvery: 2 }]) {
    const { metrics, values } = await run({ ...settings, ...other });
    expect(values).toEqual(replayed.values);
    const numbers = (all: StepMetrics[]): unknown[] => all.map((m) => [m.step, m.loss, m.grad_norm, m.tokens]);
    expect(numbers(metrics)).toEqual(numbers(replayed.metrics));
  }
  const accumulated = await run({ ...settings, gradAccumulation: 3 });
  expect((await run({ ...settings, gradAccumulation: 3, eager: true })).values).toEqual(accumulated.values);
});

test("layers of a group that learn at rates of their own, or in part: replayed as eager", async () => {
  const A = (adapter: LoraAdapter, name: string): Tensor =>
    adapter.pairs.get(`model.layers.0.self_attn.${name}`)?.A as Tensor;
  for (const settings of [
    (adapter: LoraAdapter) => ({ rates: new Map([[A(adapter, "q_proj"), 2]]) }),
    (adapter: LoraAdapter) => ({ parameters: adapter.parameters.filter((p) => p !== A(adapter, "k_proj")) }),
  ]) {
    const { values } = await run((adapter) => ({ ...settings(adapter), steps: 4 }));
    expect(values).toEqual((await run((adapter) => ({ ...settings(adapter), steps: 4, eager: true }))).values);
  }
});

test("a scale that changes between steps counts in the next one, replayed too", async () => {
  const halve = (adapter: LoraAdapter): void => adapter.setScale(adapter.factor / 2);
  const settings = { steps: 4, readEvery: 1, pauseEvery: 1 };
  const replayed = await run(settings, false, halve);
  expect(replayed.values).toEqual((await run({ ...settings, eager: true }, false, halve)).values);
  expect(replayed.values).not.toEqual((await run(settings)).values);
});

test("results are read before there are more than the device keeps, however seldom they are asked for", async () => {
  const clock = vi.spyOn(performance, "now").mockReturnValue(0);
  const { metrics } = await run({ steps: 70, readEvery: 100 }).finally(() => clock.mockRestore());
  expect(metrics).toHaveLength(70);
});

test("checkpointed or not, eager or replayed, the same adapter to the last bit after 50 steps", async () => {
  const settings = { steps: 50, shuffleSeed: 4, maxGradNorm: 1 } as const;
  const plain = await run(settings);
  for (const [options, checkpointing] of [
    [{}, false],
    [{}, true],
    [{ eager: true }, true],
    [{ eager: true }, false],
  ] as const)
    expect((await run({ ...settings, ...options }, checkpointing)).values).toEqual(plain.values);
});

test("checkpointing keeps fewer activations", async () => {
  const gpu = await openGpu();
  const config = { vocab_size: 64, num_hidden_layers: 6 };
  await writeTinyModel("out/test/checkpointing", { config });
  const plan = async (checkpointing: boolean): Promise<MemoryPlan> => {
    const settings = await readConfig(diskDirectory("out/test/checkpointing"));
    return await planTraining(
      gpu,
      (dry) => {
        const weights = new Map([...weightShapes(settings)].map(([name, shape]) => [name, empty(dry, shape, name)]));
        const planned = makeModel(dry, settings, weights);
        planned.checkpointing = checkpointing;
        const { parameters } = attachLora(planned, { r: 4, alpha: 8, targetModules: "all-linear" });
        return { model: planned, parameters };
      },
      { batchSize: 4, maxLength: 64 },
    );
  };
  const [all, few] = [await plan(false), await plan(true)];
  expect(few.activations).toBeLessThan(0.5 * all.activations);
  expect(few.peak - few.activations).toBe(all.peak - all.activations);
  gpu.destroy();
});

test("an aborted run ends after the step in progress", async () => {
  const abort = new AbortController();
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  const seen: number[] = [];
  for await (const { step } of train({
    model,
    parameters: adapter.parameters,
    rows,
    steps: 9,
    batchSize: 2,
    learningRate: 1e-3,
    readEvery: 1,
    signal: abort.signal,
  })) {
    seen.push(step);
    if (step === 2) abort.abort();
  }
  expect(seen).toEqual([1, 2]);
  adapter.detach();
  model.destroy();
});

test("settings out of range name the rule and the value", async () => {
  const refused = async (options: Partial<TrainOptions>, message: string): Promise<void> =>
    expect(run(options)).rejects.toThrow(new ShapeError(message));
  await refused({ steps: 0 }, "train: steps must be a whole number of at least 1, got 0");
  await refused({ batchSize: 1.5 }, "train: batchSize must be a whole number of at least 1, got 1.5");
  await refused({ gradAccumulation: 0 }, "train: gradAccumulation must be a whole number of at least 1, got 0");
  await refused({ learningRate: -1 }, "train: learningRate must be a number of at least 0, got -1");
  await refused({ maxGradNorm: Number.NaN }, "train: maxGradNorm must be a number of at least 0, got NaN");
  await refused({ parameters: [] }, "AdamW: at least one parameter is needed, got none");
});

test("evaluation is the mean over tokens, not over batches", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const together = await evaluate(model, rows, 5);
  const apart = await evaluate(model, rows, 2);
  expect(together.tokens).toBe(15);
  expect(apart.tokens).toBe(15);
  expectClose([apart.loss], [together.loss], 1e-6, "loss");
  expect(together.perplexity).toBeCloseTo(Math.exp(together.loss), 10);
  model.destroy();
});

test("the accuracy is the share of target tokens that are the argmax of the model's logits", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const guess = async (ids: readonly number[]): Promise<number[]> => {
    const logits = gpu.scope(() => model.logits(tensor(gpu, Int32Array.from(ids), [1, ids.length])));
    const [values = new Float32Array()] = await readAll([logits]);
    gpu.release(logits);
    const V = values.length / ids.length;
    return ids.map((_, t) => {
      const scores = values.subarray(t * V, (t + 1) * V);
      return scores.indexOf(Math.max(...scores));
    });
  };
  // A greedy continuation is all hits; the other rows are as they come.
  const greedy = [7];
  for (let t = 0; t < 8; t++) greedy.push((await guess(greedy))[t] as number);
  const all = [...rows, { inputIds: greedy, labels: [-100, -100, ...greedy.slice(2)] }];
  let hits = 0;
  for (const { inputIds, labels } of all) {
    const guesses = await guess(inputIds);
    hits += labels.slice(1).filter((label, t) => label === guesses[t]).length;
  }
  gpu.resetCounters();
  const { accuracy, tokens } = await evaluate(model, all, 4);
  expect(tokens).toBe(15 + 7);
  expect(hits).toBeGreaterThanOrEqual(7);
  expect(accuracy).toBe(hits / tokens);
  expect(gpu.counters().dispatches.get("token-hits")).toBeGreaterThan(0);
  gpu.resetCounters();
  const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"] });
  const settings = { parameters: adapter.parameters, steps: 1, batchSize: 2, learningRate: 1e-3 };
  for await (const _ of train({ model, rows, ...settings }));
  expect(gpu.counters().dispatches.has("token-hits")).toBe(false);
  model.destroy();
});

test("an evaluation that is aborted throws the reason, and leaves nothing behind", async () => {
  const gpu = await testGpu();
  const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  const before = gpu.counters().bytesLive;
  const reason = new Error("enough");
  await expect(evaluate(model, rows, 2, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  const later = new AbortController();
  const running = evaluate(model, rows, 1, { signal: later.signal });
  later.abort(reason);
  await expect(running).rejects.toBe(reason);
  expect(gpu.counters().bytesLive).toBe(before);
  model.destroy();
});

test("schedules equal transformers'", () => {
  const { schedules } = JSON.parse(readFileSync("test/golden/adamw.json", "utf8")) as {
    schedules: Record<string, number[]>;
  };
  for (const [key, name, warmup] of [
    ["constant_with_warmup", "constant", 3],
    ["linear", "linear", 3],
    ["cosine", "cosine", 3],
    ["linear_no_warmup", "linear", 0],
  ] as const) {
    const factors = Array.from({ length: 21 }, (_, k) => scheduleFactor(name, k, 20, warmup));
    expectClose(factors, schedules[key] ?? [], 1e-12, key);
  }
});

describe("AdamW", () => {
  test("gives each parameter its own rate, as optimizers apart would, with one dispatch for each rate", async () => {
    const gpu = await testGpu();
    const flat = (): Tensor => tensor(gpu, Float32Array.from({ length: 64 * 4 }, Math.sin), [64 * 4]);
    const partsOf = (of: Tensor): Tensor[] => [0, 1, 2, 3].map((i) => slice(of, 64 * i, [60]));
    const gradients = (parts: readonly Tensor[]): Map<Tensor, Tensor> =>
      new Map(
        parts.map((p, i) => [
          p,
          tensor(
            gpu,
            Float32Array.from({ length: 60 }, (_, k) => Math.cos(i + k)),
            [60],
          ),
        ]),
      );
    const [together, apart] = [partsOf(flat()), partsOf(flat())];
    const settings = { weightDecay: 0.1, rates: new Map(together.slice(2).map((p) => [p, 16])) };
    const optimizer = new AdamW(together, settings);
    const alone = [new AdamW(apart.slice(0, 2), { weightDecay: 0.1 }), new AdamW(apart.slice(2), { weightDecay: 0.1 })];
    for (let step = 0; step < 3; step++) {
      gpu.resetCounters();
      optimizer.step(gradients(together), 0.01);
      expect(gpu.counters().dispatches.get("adamw")).toBe(2);
      alone[0]?.step(gradients(apart), 0.01);
      alone[1]?.step(gradients(apart), 0.16);
    }
    expect(await readAll(together)).toEqual(await readAll(apart));
    for (const one of [optimizer, ...alone]) one.destroy();
  });

  test("lets matrices decay, and nothing that has one axis", async () => {
    const gpu = await testGpu();
    const flat = tensor(gpu, new Float32Array(128).fill(2), [128]);
    const [matrix, vector] = [slice(flat, 0, [4, 16]), slice(flat, 64, [64])];
    const optimizer = new AdamW([matrix, vector], { weightDecay: 0.5 });
    const still = tensor(gpu, new Float32Array(64), [64]);
    optimizer.step(new Map([matrix, vector].map((p) => [p, view(still, p.shape)])), 0.5);
    expect(await readAll([matrix, vector])).toEqual([new Float32Array(64).fill(1.5), new Float32Array(64).fill(2)]);
    optimizer.destroy();
  });

  test("refuses a parameter without a gradient", async () => {
    const gpu = await testGpu();
    const p = tensor(gpu, [1, 2], [2]);
    expect(() => new AdamW([p]).step(new Map(), 0.1)).toThrow(
      new ShapeError(
        "AdamW: every parameter needs a gradient, got none for one of shape [2]. Is it part of the model?",
      ),
    );
  });
});
