/** What a replayed step costs the host, and what it makes: counted and timed, not compared with peers. Portable. */
import { backward } from "../../src/autograd/engine.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { axpy } from "../../src/kernels/axpy.ts";
import { copyTo } from "../../src/kernels/copy-rows.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { Decoder } from "../../src/models/decoder.ts";
import type { DecoderConfig } from "../../src/models/decoder-config.ts";
import { weightShapes } from "../../src/models/load.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss } from "../../src/train/loss.ts";
import { planTraining } from "../../src/train/plan.ts";
import { TrainingStep } from "../../src/train/step.ts";

export interface ReplayReport {
  /** Microseconds of host time per dispatch of a tiny kernel, median of the repetitions: encoded anew, and replayed. */
  readonly hostUs: { readonly eager: number; readonly replayed: number };
  /** Of a small model's training step. */
  readonly dispatches: number;
  /** Buffers and bind groups that step 3 made. */
  readonly objectsCreated: number;
  readonly submits: number;
  readonly readbacks: number;
  /** Bytes of GPU memory at most: measured over planned. */
  readonly peakOverPlan: number;
}

const DISPATCHES = 1000;
const REPETITIONS = 15;

const CONFIG: DecoderConfig = {
  ...{ modelType: "llama", bosId: undefined, eosIds: [] },
  ...{ vocabSize: 256, hiddenSize: 64, intermediateSize: 176, layers: 4, heads: 4, kvHeads: 2, headDim: 16 },
  ...{ contextLength: 128, rmsNormEps: 1e-5, activation: "silu", tiedEmbeddings: true },
  ...{ attentionBias: false, mlpBias: false, rope: { theta: 10_000, type: "default" } },
};
const BATCH = { batchSize: 2, maxLength: 64 };

/** Throws where a replayed step does not give what the eager one gives. */
export async function measureReplay(gpu: Gpu): Promise<ReplayReport> {
  return { hostUs: await hostTime(gpu), ...(await trainingStep(gpu)) };
}

async function hostTime(gpu: Gpu): Promise<ReplayReport["hostUs"]> {
  const [x, y] = [tensor(gpu, new Float32Array(64).fill(1), [64]), empty(gpu, [64], "replay")];
  const chain = (): void => {
    let z: Tensor = x;
    for (let i = 0; i < DISPATCHES; i++) z = axpy(0.5, z, 0.5, x);
    copyTo(z, y);
  };
  const workspace: GPUBuffer[] = [];
  const plan = gpu.trace(chain, workspace);
  plan.run();
  if ((await read(y)).some((value) => value !== 1)) throw new Error("replay: the chain must end in ones");
  const times = { eager: [] as number[], replayed: [] as number[] };
  const time = async (to: number[], run: () => void): Promise<void> => {
    await gpu.finish();
    const start = performance.now();
    run();
    to.push((1000 * (performance.now() - start)) / DISPATCHES);
  };
  for (let i = 0; i < REPETITIONS; i++) await time(times.replayed, () => plan.run());
  // After it: what an eager run makes would be collected while the replayed one is timed.
  for (let i = 0; i < REPETITIONS; i++)
    await time(times.eager, () => {
      gpu.scope(chain);
      gpu.flush();
    });
  await gpu.finish();
  plan.destroy();
  gpu.release(x, y, ...workspace.map((buffer) => ({ buffer })));
  const median = (values: number[]): number => values.sort((a, b) => a - b)[REPETITIONS >> 1] ?? Number.NaN;
  return { eager: median(times.eager), replayed: median(times.replayed) };
}

function build(gpu: Gpu, fill: boolean): { model: Decoder; adapter: ReturnType<typeof attachLora> } {
  const weights = new Map(
    [...weightShapes(CONFIG)].map(([name, shape]) => {
      const t = empty(gpu, shape, name);
      if (fill)
        gpu.write(
          t,
          Float32Array.from({ length: t.size }, (_, i) => Math.sin(i + shape.length) / 8),
        );
      return [name, t] as const;
    }),
  );
  const model = new Decoder(gpu, CONFIG, weights);
  return { model, adapter: attachLora(model, { r: 8, alpha: 16, targetModules: "all-linear" }) };
}

async function trainingStep(gpu: Gpu): Promise<Omit<ReplayReport, "hostUs">> {
  const before = gpu.counters().bytesLive;
  gpu.resetCounters();
  const { model, adapter } = build(gpu, true);
  const ids = Array.from({ length: BATCH.maxLength }, (_, i) => (7 * i) % CONFIG.vocabSize);
  const batch = collate(new Array(BATCH.batchSize).fill({ inputIds: ids, labels: ids }), 0);
  const step = new TrainingStep({ model, parameters: adapter.parameters });
  step.run([batch], 0);
  step.run([batch], 0);
  const results = await step.read();
  const peak = gpu.counters().bytesPeak - before;
  const loss = gpu.scope(() => {
    const inputs = batchInputs(gpu, batch);
    const made = batchLoss(model, inputs, 1 / batch.tokens);
    backward(made);
    return made;
  });
  const [eager = Number.NaN] = await read(loss);
  gpu.release(loss);
  if (results.some((result) => result.loss !== eager))
    throw new Error(`replay: the loss must be the eager one, ${eager}, got ${results.map((r) => r.loss)}`);
  gpu.resetCounters();
  step.run([batch], 0);
  const { buffersCreated, bindGroupsCreated, submits, readbacks, dispatches } = gpu.counters();
  await gpu.finish();
  step.destroy();
  adapter.detach();
  model.destroy();
  const plan = await planTraining(
    gpu,
    (dry) => {
      const planned = build(dry, false);
      return { model: planned.model, parameters: planned.adapter.parameters };
    },
    BATCH,
  );
  return {
    dispatches: [...dispatches.values()].reduce((a, b) => a + b, 0),
    objectsCreated: buffersCreated + bindGroupsCreated,
    submits,
    readbacks,
    peakOverPlan: peak / plan.peak,
  };
}
