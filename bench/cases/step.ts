/** Whole training steps of a small Llama: LoRA's against the peers', and against those of all weights, of DoRA and of other formats. */
import type { Gpu } from "../../src/gpu/gpu.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import type { Case } from "../harness.ts";
import { type LlamaStep, parametersOf } from "../peers/peer.ts";
import type { SizedContest } from "./inputs.ts";
import type { StepValues } from "./llama-f64.ts";
import { ADAMW, costsOf, known, largestBytes, type StepKind, type StepSizes } from "./step-work.ts";
import { measured, Training } from "./training.ts";

const ADAPTER: StepKind = { trained: "adapter" };
/** Milliseconds for a case whose ratio to another is what counts: some turns even where a step takes seconds. */
const PATIENCE = 40_000;

/** A and B trained, all else frozen: made anew in each run, and replayed; and the same step written in jax-js and in tfjs. */
export function llamaStep(sizes: StepSizes): SizedContest {
  const { layers, hidden, T, r } = sizes;
  const costs = costsOf(sizes, ADAPTER);
  return {
    name: `Llama LoRA step ${layers}×${hidden} T=${T} r=${r}`,
    group: "llama-step",
    against: "replayed",
    sizes: { ...sizes },
    flops: costs.flops,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const { work, expected } = known(sizes, ADAPTER);
      const training = new Training(gpu, sizes, work, ADAPTER, true);
      const check = checkOf(work, expected, training);
      const one = (name: string, run: () => void): Case => ({
        ...{ name, ...costs, check },
        run: () => {
          run();
          return training.results();
        },
      });
      const replayed: Case = {
        ...one("replayed", () => training.replay()),
        ...measured(gpu, (own) => new Training(own, sizes, work, ADAPTER, true)),
      };
      return {
        inputs: training.tensors,
        cases: [one("made anew", () => training.eager()), replayed],
        work: { op: "llama-step", ...work },
      };
    },
  };
}

/** The same model and batch with every weight trained, and with A and B alone. */
export function loraOverFull(sizes: StepSizes): SizedContest {
  const { layers, hidden, T, r } = sizes;
  const full = costsOf(sizes, { trained: "weights" });
  return {
    name: `Llama step, full and LoRA ${layers}×${hidden} T=${T} r=${r}`,
    group: "llama-full-step",
    sizes: { ...sizes },
    flops: full.flops,
    largestBytes: largestBytes(sizes),
    setup: (gpu) => {
      const one = (name: string, kind: StepKind): [Case, Training] => {
        const { work, expected } = known(sizes, kind);
        const train = (on: Gpu): Training => new Training(on, sizes, work, kind, false);
        const training = train(gpu);
        const run = (): Record<string, Tensor> => {
          training.replay();
          return training.results();
        };
        const check = checkOf(work, expected, training);
        return [{ name, ...costsOf(sizes, kind), check, run, ...measured(gpu, train) }, training];
      };
      const [fullCase, fullTraining] = one("full", { trained: "weights" });
      const [loraCase, loraTraining] = one("LoRA", ADAPTER);
      return { inputs: [...fullTraining.tensors, ...loraTraining.tensors], cases: [fullCase, loraCase] };
    },
  };
}

/** A and B trained, and A, B and m: DoRA's step over LoRA's. Its magnitudes are not the norms, so that a gain that is missing shows. */
export function doraOverLora(sizes: StepSizes): SizedContest {
  const cases = { LoRA: ADAPTER, DoRA: { trained: "dora" } } as const;
  return replayedSteps("LoRA and DoRA", "llama-dora-step", sizes, cases);
}

/** A and B trained on frozen weights in f16, and in NF4 with its scales quantised too, each against the values that its format holds. */
export function nf4OverF16(sizes: StepSizes): SizedContest {
  const cases = { f16: { ...ADAPTER, stored: "f16" }, NF4: { ...ADAPTER, stored: "nf4" } } as const;
  return replayedSteps("f16 and NF4", "llama-nf4-step", sizes, cases);
}

/** Steps of different kinds, replayed in turns. */
function replayedSteps(
  what: string,
  group: string,
  sizes: StepSizes,
  kinds: Readonly<Record<string, StepKind>>,
): SizedContest {
  const { layers, hidden, T, r } = sizes;
  const costs = costsOf(sizes, ADAPTER);
  const trainingOf = (gpu: Gpu, name: string, kind: StepKind): [Case, Training] => {
    const { work, expected } = known(sizes, kind);
    const training = new Training(gpu, sizes, work, kind, false);
    const run = (): Record<string, Tensor> => {
      training.replay();
      return training.results();
    };
    return [{ name, ...costs, check: checkOf(work, expected, training), run }, training];
  };
  return {
    name: `Llama step, ${what} ${layers}×${hidden} T=${T} r=${r}`,
    group,
    sizes: { ...sizes },
    flops: costs.flops,
    largestBytes: largestBytes(sizes),
    maxCaseMs: PATIENCE,
    setup: (gpu) => {
      const made = Object.entries(kinds).map(([name, kind]) => trainingOf(gpu, name, kind));
      return { inputs: made.flatMap(([, { tensors }]) => tensors), cases: made.map(([one]) => one) };
    },
  };
}

/** Checks against f64, and that nothing is kept for what is frozen. */
function checkOf(work: LlamaStep, expected: StepValues, training: Training): Case["check"] {
  const after = parametersOf(work).flatMap(([name, { values }]) => {
    const g = expected.gradients.get(name);
    const { learningRate, eps } = ADAMW;
    // The first step of AdamW: both moments are those of the gradient alone.
    return g
      ? [Float64Array.from(values, (p, i) => p - (learningRate * (g[i] ?? 0)) / (Math.abs(g[i] ?? 0) + eps))]
      : [];
  });
  const adapter = after.flatMap((values) => [...values]);
  return (result, element) => {
    if (training.frozenBytes !== 0)
      throw new Error(`bench: gradients and moments of frozen weights must take 0 bytes, got ${training.frozenBytes}`);
    if (result === "loss") return expected.loss;
    if (result === "grad norm") return expected.gradNorm;
    if (result === "adapter") return adapter[element] ?? Number.NaN;
    return (expected.gradients.get(result)?.[element] ?? Number.NaN) / (work.gradients.get(result) ?? Number.NaN);
  };
}
